"""A key that is compromised or revoked decrypts with the permission and the flag of that state, and with nothing less."""

import json
from collections.abc import Callable
from typing import Any, Final

import grpc
import psycopg
import pytest

from kms.domain.ids import UserId
from kms.v1 import audit_pb2 as apb
from kms.v1 import crypto_pb2 as cpb
from kms.v1 import keys_pb2 as kpb
from tests.conformance.refusals import item_reason, refusal
from tests.conformance.requests import create, made
from tests.conformance.test_audit import search, take_role, wait_for
from tests.conformance.test_states import STATES
from tests.fixtures.server import Caller, Deployment, RunningServer

PERMISSIONS: Final = {"compromised": "keys:use-compromised", "revoked": "keys:use-revoked"}
FLAGS: Final = [set[str](), {"compromised"}, {"revoked"}, {"compromised", "revoked"}]


def execute(deployment: Deployment, query: str, *parameters: object) -> None:
    with psycopg.connect(deployment.database.admin_dsn, autocommit=True) as connection:
        connection.execute(query.encode(), parameters)


def recoverer(server: RunningServer) -> Caller:
    return server.caller(server.deployment.new_user(role="recovery"))


def user_with(deployment: Deployment, permission: str) -> UserId:
    """A user of a role that there is not yet, which has this permission alone."""
    name = permission.replace(":", "-")
    query = "INSERT INTO authentication.roles (name, permissions) VALUES (%s, %s::jsonb) ON CONFLICT DO NOTHING"
    execute(deployment, query, name, json.dumps([permission]))
    return deployment.new_user(role=name)


def sealed(caller: Caller, state: str, name: str = "k") -> bytes:
    """Return a ciphertext of a new key that is then brought into *state*."""
    made(caller, "aes", name=name)
    ciphertext = caller.crypto.Encrypt(cpb.EncryptRequest(key=name, plaintext=b"p")).ciphertext
    if state in ("compromised", "both"):
        caller.keys.MarkKeyCompromised(kpb.MarkKeyCompromisedRequest(key=name, reason="r"))
    if state in ("revoked", "both"):
        caller.keys.RevokeKey(kpb.RevokeKeyRequest(key=name, reason="r"))
    return bytes(ciphertext)


def opening(ciphertext: bytes, *states: str, **fields: Any) -> cpb.DecryptRequest:  # noqa: ANN401
    """Return the request that allows keys in *states*."""
    allowed: dict[str, Any] = {f"allow_{state}": True for state in states}
    return cpb.DecryptRequest(ciphertext=ciphertext, **allowed, **fields)


@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: "+".join(sorted(flags)) or "no flag")
@pytest.mark.parametrize("state", PERMISSIONS)
def test_a_compromised_or_revoked_key_decrypts_only_with_its_flag_and_its_permission(
    server: RunningServer, state: str, flags: set[str]
) -> None:
    others = next(permission for other, permission in PERMISSIONS.items() if other != state)
    callers = {
        "recovery": recoverer(server),
        "one permission": server.caller(user_with(server.deployment, PERMISSIONS[state])),
        "the other permission": server.caller(user_with(server.deployment, others)),
        "no role": server.caller(),
    }
    for who, caller in callers.items():
        request = opening(sealed(caller, state), *flags)
        if state in flags and who in ("recovery", "one permission"):
            assert caller.crypto.Decrypt(request).plaintext == b"p"
            continue
        found = refusal(caller.crypto.Decrypt, request)
        if state in flags:
            assert (found.code, found.reason) == (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED")
            assert found.metadata == {"permission": PERMISSIONS[state]}
        else:
            assert (found.code, found.reason) == (grpc.StatusCode.FAILED_PRECONDITION, f"KEY_{state.upper()}")


@pytest.mark.parametrize("role", [None, "recovery"])
@pytest.mark.parametrize("state", STATES.keys() - PERMISSIONS.keys())
def test_a_key_in_any_other_state_decrypts_with_the_flags_as_without_them(
    server: RunningServer, state: str, role: str | None
) -> None:
    change, _, _, processing = STATES[state]
    caller = server.caller(server.deployment.new_user(role=role))
    ciphertext = sealed(caller, "active")
    server.deployment.edit_keys(f"UPDATE cryptography.keys SET {change} WHERE user_id = %s", caller.user_id)
    for request in (opening(ciphertext), opening(ciphertext, "compromised", "revoked")):
        if not processing:
            assert caller.crypto.Decrypt(request).plaintext == b"p"
            continue
        found = refusal(caller.crypto.Decrypt, request)
        assert (found.code, found.reason) == (grpc.StatusCode.FAILED_PRECONDITION, processing)


@pytest.mark.parametrize("state", ["compromised", "revoked", "both"])
def test_what_is_to_be_destroyed_or_is_destroyed_opens_nothing_any_more(server: RunningServer, state: str) -> None:
    caller = recoverer(server)
    request = opening(sealed(caller, state), "compromised", "revoked")
    assert caller.crypto.Decrypt(request).plaintext == b"p"
    caller.keys.ScheduleKeyDestruction(kpb.ScheduleKeyDestructionRequest(key="k"))
    assert refusal(caller.crypto.Decrypt, request).reason == "KEY_PENDING_DESTRUCTION"
    caller.keys.CancelKeyDestruction(kpb.CancelKeyDestructionRequest(key="k"))
    assert caller.crypto.Decrypt(request).plaintext == b"p"
    destroy = "UPDATE cryptography.keys SET destruction_scheduled_at = now() WHERE user_id = %s"
    server.deployment.edit_keys(destroy, caller.user_id)
    assert refusal(caller.crypto.Decrypt, request).reason == "KEY_DESTROYED"


@pytest.mark.parametrize("state", PERMISSIONS)
def test_a_compromised_or_revoked_key_protects_nothing_for_anybody(server: RunningServer, state: str) -> None:
    caller = recoverer(server)
    sealed(caller, state)
    for call, request in (
        (caller.crypto.Encrypt, cpb.EncryptRequest(key="k", plaintext=b"p")),
        (caller.crypto.GenerateDataKey, cpb.GenerateDataKeyRequest(key="k")),
    ):
        found = refusal(call, request)
        assert (found.code, found.reason) == (grpc.StatusCode.FAILED_PRECONDITION, f"KEY_{state.upper()}")


def test_the_permission_opens_keys_of_ones_own_and_no_others(server: RunningServer) -> None:
    owner, other = recoverer(server), recoverer(server)
    ciphertext = sealed(owner, "compromised")
    for request in (opening(ciphertext, "compromised"), opening(ciphertext, "compromised", key="k")):
        found = refusal(other.crypto.Decrypt, request)
        assert (found.code, found.reason) == (grpc.StatusCode.NOT_FOUND, "KEY_NOT_FOUND")


def test_an_auditor_opens_nothing_whatever_other_role_he_has(server: RunningServer) -> None:
    caller = recoverer(server)
    request = opening(sealed(caller, "compromised"), "compromised")
    assert caller.crypto.Decrypt(request).plaintext == b"p"
    execute(server.deployment, "SELECT authentication.assign_role(%s, 'auditor')", caller.user_id)
    found = refusal(caller.crypto.Decrypt, request)
    assert (found.reason, found.metadata) == ("PERMISSION_DENIED", {"permission": "audit:read"})


def test_bare_oaep_is_opened_by_a_compromised_key_with_the_flag(server: RunningServer) -> None:
    caller = recoverer(server)
    caller.keys.CreateKey(create("rsa-encryption", size_bits=2048), timeout=30)
    bare = caller.crypto.Encrypt(cpb.EncryptRequest(key="k", plaintext=b"p", oaep_hash=cpb.HASH_ALGORITHM_SHA_1)).ciphertext[
        -256:
    ]
    caller.keys.MarkKeyCompromised(kpb.MarkKeyCompromisedRequest(key="k", reason="r"))
    fields: dict[str, Any] = {
        "key": "k",
        "format": cpb.CIPHERTEXT_FORMAT_RAW_RSA_OAEP,
        "oaep_hash": cpb.HASH_ALGORITHM_SHA_1,
    }
    assert refusal(caller.crypto.Decrypt, opening(bare, "revoked", **fields)).reason == "KEY_COMPROMISED"
    assert caller.crypto.Decrypt(opening(bare, "compromised", **fields)).plaintext == b"p"


def test_each_item_of_a_batch_has_flags_of_its_own(server: RunningServer) -> None:
    caller = recoverer(server)
    compromised, revoked, active = (sealed(caller, state, state) for state in ("compromised", "revoked", "active"))
    items = [
        opening(compromised, "compromised"),
        opening(compromised),
        opening(revoked, "compromised"),
        opening(revoked, "revoked"),
        opening(active, "compromised", "revoked"),
    ]
    answers = caller.crypto.BatchDecrypt(cpb.BatchDecryptRequest(items=items)).items
    outcomes = [item_reason(item.error) if item.WhichOneof("outcome") == "error" else item.result.plaintext for item in answers]
    assert outcomes == [b"p", "KEY_COMPROMISED", "KEY_REVOKED", b"p", b"p"]


@pytest.mark.parametrize("state", PERMISSIONS)
def test_an_auditor_sees_each_such_use_and_each_refusal_of_one_as_high(
    server: RunningServer, auditor: Caller, state: str
) -> None:
    caller = recoverer(server)
    request = opening(sealed(caller, state), "compromised", "revoked")
    assert caller.crypto.Decrypt(request).plaintext == b"p"

    def told(event: apb.Event) -> tuple[Any, ...]:
        details = json.loads(event.details_json)
        return event.action, event.severity, event.risk_score, details.get("use"), details["charged"]

    used = [told(event) for event in search(auditor, user_id=str(caller.user_id), event_type="key.used")]
    assert used == [("decrypt", apb.SEVERITY_HIGH, 60, f"process_{state}", False), ("encrypt", apb.SEVERITY_LOW, 0, None, True)]
    take_role(server.deployment, caller.user_id)
    assert refusal(caller.crypto.Decrypt, request).reason == "PERMISSION_DENIED"
    refused = wait_for(auditor, user_id=str(caller.user_id), event_type="request.refused")
    key_id = caller.keys.GetKey(kpb.GetKeyRequest(key="k")).key.id
    assert (refused.severity, refused.resource_id) == (apb.SEVERITY_HIGH, key_id)


@pytest.mark.parametrize("role", [None, "recovery"])
def test_the_flags_make_no_grave_line_of_the_use_of_an_active_key(
    server: RunningServer, auditor: Caller, role: str | None
) -> None:
    caller = server.caller(server.deployment.new_user(role=role))
    caller.crypto.Decrypt(opening(sealed(caller, "active"), "compromised", "revoked"))
    used = search(auditor, user_id=str(caller.user_id), event_type="key.used", action="decrypt")
    assert [(event.severity, "use" in json.loads(event.details_json)) for event in used] == [(apb.SEVERITY_LOW, False)]


def lapse(deployment: Deployment, user: UserId) -> None:
    """Time alone takes the role: no version advances."""
    execute(deployment, "UPDATE authentication.user_roles SET expires_at = now() WHERE user_id = %s", user)


@pytest.mark.parametrize("end", [take_role, lapse])
def test_the_next_use_after_the_role_was_taken_away_is_refused(
    server: RunningServer, end: Callable[[Deployment, UserId], None]
) -> None:
    caller = recoverer(server)
    request = opening(sealed(caller, "revoked"), "revoked")
    assert caller.crypto.Decrypt(request).plaintext == b"p"
    end(server.deployment, caller.user_id)
    found = refusal(caller.crypto.Decrypt, request)
    assert (found.reason, found.metadata) == ("PERMISSION_DENIED", {"permission": "keys:use-revoked"})
