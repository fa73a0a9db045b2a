"""No private key in the clear: not in the database, not in a log, not in an answer, not in an error."""

import base64
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from uuid import UUID

import grpc
import psycopg
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from google.protobuf.message import Message
from psycopg.rows import dict_row

from kms.dev.postgres import EmbeddedPostgres
from kms.v1 import crypto_pb2 as cpb
from kms.v1 import keys_pb2 as kpb
from tests.conformance.requests import made
from tests.fixtures.server import Caller, Deployment

KINDS = ("secp256k1", "secp256r1", "ed25519", "rsa", "rsa-encryption", "aes")


def spellings(secret: bytes) -> list[bytes]:
    """Return how *secret* could be written down: raw, hex, base64 at each offset, a decimal number, escaped."""
    bare = secret.lstrip(b"\x00")
    encoded = [base64.b64encode(bytes(shift) + bare)[4:-4] for shift in range(3)]
    return [
        bare,
        bare.hex().encode(),
        bare.hex().upper().encode(),
        *encoded,
        str(int.from_bytes(bare, "big")).encode(),
        repr(bare)[2:-1].encode(),
    ]


def stored_rows(deployment: Deployment) -> list[dict[str, Any]]:
    query = """SELECT id::text, user_id::text, key_type, key_curve, key_strength, key_purpose, bound_to, custody, origin,
        public_key, encrypted_private_key
        FROM cryptography.keys WHERE custody <> 'RESIDENT' ORDER BY key_name"""  # what is resident has no bytes to look for
    with psycopg.connect(deployment.database.admin_dsn, row_factory=dict_row) as connection:
        return connection.execute(query).fetchall()


def opened(deployment: Deployment, rows: list[dict[str, Any]]) -> list[bytes]:
    """Return the secret numbers of the keys in *rows*, taken out with the token's PIN."""
    token = deployment.token
    order = {"module": str(token.module), "token_label": token.label, "pin": token.pin_file.read_text(), "rows": rows}
    command = [sys.executable, str(Path(__file__).with_name("open_envelopes.py"))]
    done = subprocess.run(
        command, input=json.dumps(order), env={**os.environ, **token.environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [bytes.fromhex(secret) for secrets in json.loads(done.stdout) for secret in secrets]


def everything_said(caller: Caller) -> list[bytes]:
    """Use every key in every way, rightly and wrongly, and return all that came back."""
    said: list[bytes] = []

    def call(method: Any, request: Message) -> Message | None:  # noqa: ANN401 - grpc's callables have no common type
        try:
            answer: Message = method(request, timeout=20)
        except grpc.RpcError as error:
            assert isinstance(error, grpc.Call)
            said.append(repr((error.details(), error.trailing_metadata())).encode())
            return None
        said.append(answer.SerializeToString())
        return answer

    for kind in KINDS:
        call(caller.keys.GetKey, kpb.GetKeyRequest(key=kind))
        call(caller.keys.GetPublicKey, kpb.GetPublicKeyRequest(key=kind))
        call(caller.crypto.Sign, cpb.SignRequest(key=kind, message=b"m"))
        call(caller.crypto.Sign, cpb.SignRequest(key=kind, digest=b"short"))
        sealed = call(caller.crypto.Encrypt, cpb.EncryptRequest(key=kind, plaintext=b"p"))
        if isinstance(sealed, cpb.EncryptResponse):
            call(caller.crypto.Decrypt, cpb.DecryptRequest(ciphertext=sealed.ciphertext))
            call(caller.crypto.Decrypt, cpb.DecryptRequest(ciphertext=sealed.ciphertext[:-1] + b"?"))
            call(caller.crypto.ReEncrypt, cpb.ReEncryptRequest(ciphertext=sealed.ciphertext))
            call(caller.crypto.ReEncrypt, cpb.ReEncryptRequest(ciphertext=sealed.ciphertext[:-1] + b"?"))
        call(caller.crypto.GenerateDataKey, cpb.GenerateDataKeyRequest(key=kind))
    call(caller.keys.ListKeys, kpb.ListKeysRequest())
    return said


def test_no_private_key_is_anywhere_in_the_clear(deployment: Deployment, postgres: EmbeddedPostgres) -> None:
    deployment.config_file.write_text('log_level = "debug"\n' + deployment.config_file.read_text())
    with deployment.serving() as server:
        caller = server.caller()
        for kind in KINDS:
            made(caller, kind, name=kind)
        said = everything_said(caller)
        commands = [deployment.run(*line) for line in (("hsm", "probe"), ("hsm", "init"), ("migrate", "--check"), ("--help",))]
    rows = stored_rows(deployment)
    secrets = opened(deployment, rows)
    assert len(secrets) == len(KINDS) + 4  # an RSA key has an exponent and two primes
    private = ec.derive_private_key(int.from_bytes(secrets[-2], "big"), ec.SECP256K1())
    assert private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode() == rows[-2]["public_key"]

    dump = subprocess.run(
        [str(postgres.bin_directory / "pg_dump"), deployment.database.admin_dsn], capture_output=True, check=False
    )
    assert dump.returncode == 0, dump.stderr
    places = {
        "dump": dump.stdout,
        "files of the database": b"".join(_files(deployment, postgres)),
        "log of the database": postgres.log_file.read_bytes(),
        "log of the server": server.log_file.read_bytes(),
        "answers": b"\n".join(said),
        "outputs of the commands": "".join(done.stdout + done.stderr for done in commands).encode(),
    }
    # It looks where the keys are.
    assert rows[0]["encrypted_private_key"].encode() in places["dump"]
    assert UUID(rows[0]["id"]).bytes in places["files of the database"]
    hidden = [*secrets, deployment.token.pin_file.read_bytes(), (postgres.service_password()).encode()]
    found = [
        (place, number)
        for number, secret in enumerate(hidden)
        for place, content in places.items()
        for spelling in spellings(secret)
        if spelling in content
    ]
    assert not found


def test_the_search_would_find_a_key_in_the_clear() -> None:
    secret = bytes(range(100, 132))
    for text in (
        secret,
        secret.hex().encode(),
        base64.b64encode(b"a" + secret + b"b"),
        str(int.from_bytes(secret, "big")).encode(),
    ):
        assert any(spelling in b"before " + text + b" after" for spelling in spellings(secret))


def _files(deployment: Deployment, postgres: EmbeddedPostgres) -> list[bytes]:
    """Write what the deployment's database holds to its files, and return these and PostgreSQL's temporary ones.

    The files of other tests' databases are not ours.
    """
    with psycopg.connect(deployment.database.admin_dsn, autocommit=True) as connection:
        connection.execute("CHECKPOINT")
        row = connection.execute("SELECT oid FROM pg_database WHERE datname = current_database()").fetchone()
    assert row is not None
    base = postgres.directory / "data" / "base"
    return [_bytes(path) for place in (base / str(row[0]), base / "pgsql_tmp") for path in place.rglob("*")]


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes() if path.is_file() else b""
    except FileNotFoundError:  # PostgreSQL has removed it meanwhile
        return b""
