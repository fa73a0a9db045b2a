"""What each state allows, through the API; the row's times are moved, never the clock."""

from collections.abc import Callable
from typing import Final

import grpc
import pytest

from kms.v1 import crypto_pb2 as cpb
from kms.v1 import keys_pb2 as kpb
from tests.conformance.refusals import refusal
from tests.conformance.requests import made
from tests.fixtures.server import Caller, RunningServer

# state: (the change of the row, the state shown, reason for protecting, reason for decrypting)
STATES: Final[dict[str, tuple[str, "kpb.KeyState.ValueType", str, str]]] = {
    "pre-active": (
        "activated_at = now() + interval '1 hour', key_status = 'inactive'",
        kpb.KEY_STATE_PRE_ACTIVE,
        "KEY_PRE_ACTIVE",
        "KEY_PRE_ACTIVE",
    ),
    "activated by time": (
        "activated_at = now() - interval '1 second', key_status = 'inactive'",
        kpb.KEY_STATE_ACTIVE,
        "",
        "",
    ),
    "deactivated": ("deactivated_at = now(), key_status = 'inactive'", kpb.KEY_STATE_INACTIVE, "KEY_INACTIVE", ""),
    "superseded": ("superseded_at = now(), key_status = 'inactive'", kpb.KEY_STATE_INACTIVE, "KEY_INACTIVE", ""),
    "expired": (
        "created_at = now() - interval '2 hours', expires_at = now() - interval '1 second'",
        kpb.KEY_STATE_EXPIRED,
        "KEY_EXPIRED",
        "",
    ),
    "compromised": (
        "key_status = 'compromised', compromised_at = now()",
        kpb.KEY_STATE_COMPROMISED,
        "KEY_COMPROMISED",
        "KEY_COMPROMISED",
    ),
    "revoked": ("key_status = 'revoked', revoked_at = now()", kpb.KEY_STATE_REVOKED, "KEY_REVOKED", "KEY_REVOKED"),
    "pending destruction": (
        "key_status = 'inactive', destruction_scheduled_at = now() + interval '7 days'",
        kpb.KEY_STATE_PENDING_DESTRUCTION,
        "KEY_PENDING_DESTRUCTION",
        "KEY_PENDING_DESTRUCTION",
    ),
    "destroyed": (
        "key_status = 'inactive', destroyed_at = now(), encrypted_private_key = ''",
        kpb.KEY_STATE_DESTROYED,
        "KEY_DESTROYED",
        "KEY_DESTROYED",
    ),
}


@pytest.mark.parametrize("state", STATES)
def test_a_state_allows_what_the_table_says_also_for_a_key_that_is_loaded(
    caller: Caller, server: RunningServer, state: str
) -> None:
    change, shown, protecting, processing = STATES[state]
    made(caller, "aes", name="aes")
    made(caller, "secp256k1", name="ec")
    ciphertext = caller.crypto.Encrypt(cpb.EncryptRequest(key="aes", plaintext=b"p")).ciphertext
    signature = caller.crypto.Sign(cpb.SignRequest(key="ec", message=b"m")).signature
    server.deployment.edit_keys(f"UPDATE cryptography.keys SET {change} WHERE user_id = %s", caller.user_id)

    def check(call: Callable[..., object], request: object, reason: str) -> None:
        if not reason:
            call(request)
            return
        found = refusal(call, request)  # type: ignore[arg-type]
        assert (found.code, found.reason) == (grpc.StatusCode.FAILED_PRECONDITION, reason)

    check(caller.crypto.Sign, cpb.SignRequest(key="ec", message=b"m"), protecting)
    check(caller.crypto.Encrypt, cpb.EncryptRequest(key="aes", plaintext=b"p"), protecting)
    check(caller.crypto.GenerateDataKey, cpb.GenerateDataKeyRequest(key="aes"), protecting)
    check(caller.crypto.Decrypt, cpb.DecryptRequest(ciphertext=ciphertext), processing)
    assert caller.crypto.Verify(cpb.VerifyRequest(key="ec", message=b"m", signature=signature)).valid
    assert caller.keys.GetPublicKey(kpb.GetPublicKeyRequest(key="ec")).public_key_der
    assert caller.keys.GetKey(kpb.GetKeyRequest(key="ec")).key.state == shown
    listed = caller.keys.ListKeys(kpb.ListKeysRequest(state=shown)).keys
    assert [key.name for key in listed] == ["aes", "ec"]
