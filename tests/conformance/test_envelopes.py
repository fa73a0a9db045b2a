"""Whoever can write to the database cannot make one key pass for another, and a damaged row is told from a sick token."""

import base64
import shutil
import subprocess
import sys
from collections.abc import Callable

import grpc
import psycopg
import pytest

from kms.domain.ids import UserId
from kms.v1 import crypto_pb2 as cpb
from kms.v1 import keys_pb2 as kpb
from tests.conformance.refusals import Refusal, refusal
from tests.conformance.requests import made
from tests.fixtures.server import Caller, Deployment, RunningServer

Edit = Callable[[str, str, object], None]
SIGN = cpb.SignRequest(key="k", message=b"m")


@pytest.fixture
def edit(server: RunningServer) -> Edit:
    """Change a column of a key as the superuser does, under a MAC that fits: what holds then is the envelope."""

    def change(key_id: str, column: str, value: object) -> None:
        with psycopg.connect(server.deployment.database.admin_dsn, autocommit=True) as connection:
            connection.execute("SET session_replication_role = replica")  # no trigger, no foreign key
            query = f"UPDATE cryptography.keys SET {column} = %s, version = version + 1 WHERE id = %s"
            assert len(server.deployment.macs.edit(connection, query, value, key_id)) == 1

    return change


def envelope_of(server: RunningServer, key_id: str) -> str:
    with psycopg.connect(server.deployment.database.admin_dsn, autocommit=True) as connection:
        row = connection.execute("SELECT encrypted_private_key FROM cryptography.keys WHERE id = %s", (key_id,)).fetchone()
    assert row is not None
    return str(row[0])


def is_damaged(found: Refusal) -> bool:
    return (found.code, found.reason) == (grpc.StatusCode.DATA_LOSS, "ENVELOPE_INVALID")


@pytest.mark.parametrize("kind", ["secp256k1", "ed25519", "rsa"])
def test_each_part_of_an_envelope_matters(caller: Caller, server: RunningServer, edit: Edit, kind: str) -> None:
    key = made(caller, kind)
    good = envelope_of(server, key.id)
    raw = base64.b64decode(good)
    step = 1 if kind == "secp256k1" else 97
    for position in (*range(18), *range(34, len(raw), step)):
        bad = raw[:position] + bytes((raw[position] ^ 1,)) + raw[position + 1 :]
        edit(key.id, "encrypted_private_key", base64.b64encode(bad).decode())
        assert is_damaged(refusal(caller.crypto.Sign, SIGN)), position
    for text in (good[:-4], good + "AAAA", good + "\n", "x", good[: len(good) // 2]):
        edit(key.id, "encrypted_private_key", text)
        assert is_damaged(refusal(caller.crypto.Sign, SIGN))
    edit(key.id, "encrypted_private_key", good)
    assert caller.crypto.Sign(SIGN).signature


def test_an_envelope_that_names_a_key_that_the_token_lacks_says_kek_missing_not_data_loss(
    caller: Caller, server: RunningServer, edit: Edit
) -> None:
    key = made(caller, "secp256k1")
    raw = base64.b64decode(envelope_of(server, key.id))
    for position in range(18, 34):
        other = raw[:position] + bytes((raw[position] ^ 1,)) + raw[position + 1 :]
        edit(key.id, "encrypted_private_key", base64.b64encode(other).decode())
        found = refusal(caller.crypto.Sign, SIGN)
        assert (found.code, found.reason) == (grpc.StatusCode.UNAVAILABLE, "HSM_KEK_MISSING")


def test_a_row_copied_over_another_does_not_open(new_caller: Callable[[], Caller], server: RunningServer, edit: Edit) -> None:
    ada, bob = new_caller(), new_caller()
    hers, his = made(ada, "secp256k1"), made(bob, "secp256k1")
    edit(his.id, "encrypted_private_key", envelope_of(server, hers.id))
    assert is_damaged(refusal(bob.crypto.Sign, SIGN))
    edit(his.id, "public_key", hers.public_key_pem)
    assert is_damaged(refusal(bob.crypto.Sign, SIGN))
    assert ada.crypto.Sign(SIGN).signature


def test_a_key_given_to_another_user_behind_the_services_back_does_not_open(new_caller: Callable[[], Caller], edit: Edit) -> None:
    ada, bob = new_caller(), new_caller()
    key = made(ada, "secp256k1")
    edit(key.id, "user_id", bob.user_id)
    assert is_damaged(refusal(bob.crypto.Sign, SIGN))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("rsa", {"key_purpose": "encryption"}),
        ("rsa-encryption", {"key_purpose": "signing"}),
        ("secp256k1", {"key_type": "secp256r1", "key_curve": "secp256r1"}),
        ("secp256k1", {"custody": "SEALED"}),
        ("secp256k1", {"origin": "IMPORTED"}),
        ("rsa", {"key_strength": 4096}),
        ("aes", {"key_strength": 128}),
        ("aes", {"public_key": "kcv:000000"}),
    ],
)
def test_each_bound_attribute_is_bound(server: RunningServer, kind: str, changes: dict[str, object]) -> None:
    caller = server.caller()
    key = made(caller, kind)
    columns = ", ".join(f"{name} = %s" for name in changes)
    server.deployment.edit_keys(f"UPDATE cryptography.keys SET {columns} WHERE id = %s", *changes.values(), key.id)
    is_for_encryption = (changes.get("key_purpose") or kind) in ("aes", "rsa-encryption", "encryption")
    if kind == "aes":
        found = refusal(caller.crypto.Encrypt, cpb.EncryptRequest(key="k", plaintext=b"p"))
    elif is_for_encryption:
        # RSA encrypts with the public key; the private half is needed to decrypt.
        raw = cpb.CIPHERTEXT_FORMAT_RAW_RSA_OAEP
        request = cpb.DecryptRequest(key="k", ciphertext=bytes(255) + b"\x01", format=raw, oaep_hash=cpb.HASH_ALGORITHM_SHA_1)
        found = refusal(caller.crypto.Decrypt, request)
    else:
        found = refusal(caller.crypto.Sign, SIGN)
    assert is_damaged(found)


def test_a_key_of_the_service_itself_is_refused_to_everyone(caller: Caller, edit: Edit) -> None:
    key = made(caller, "secp256k1")
    edit(key.id, "bound_to", "audit")
    found = refusal(caller.crypto.Sign, SIGN)
    assert (found.code, found.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "WRONG_PURPOSE")


def test_with_another_token_nothing_is_lost(deployment: Deployment) -> None:
    with deployment.serving() as server:
        caller = server.caller()
        made(caller, "secp256k1")
    own = deployment.token.token_directory
    kept = own.with_name("kept")
    own.rename(kept)
    own.mkdir(mode=0o700)
    _new_token_like(deployment)
    done = deployment.run("serve")
    assert done.returncode != 0
    assert "HSM_KEK_MISSING" in done.stderr
    shutil.rmtree(own)
    kept.rename(own)
    with deployment.serving() as server:
        again = server.caller(UserId(caller.user_id))
        assert again.crypto.Sign(SIGN).signature
        assert again.keys.GetKey(kpb.GetKeyRequest(key="k")).key.state == kpb.KEY_STATE_ACTIVE


def _new_token_like(deployment: Deployment) -> None:
    """Make another token of the same label and PIN, with wrapping keys of its own."""
    pin = deployment.token.pin_file.read_text()
    done = subprocess.run(
        ["softhsm2-util", "--init-token", "--free", "--label", deployment.token.label, "--pin", pin, "--so-pin", "12345678"],
        env=deployment.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    command = [sys.executable, "-m", "kms", "--config", str(deployment.config_file), "hsm", "init"]
    subprocess.run(command, env=deployment.environment, check=True, capture_output=True)
