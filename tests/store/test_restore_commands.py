"""The commands on real parts: a served database is saved, tried, restored and served again, in a new epoch."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest

from kms.dev.postgres import EmbeddedPostgres
from kms.pki.private_file import write_private
from kms.store.journal import Event, Journal
from kms.v1 import crypto_pb2 as cpb
from kms.v1 import keys_pb2 as kpb
from kms.v1 import rotation_pb2 as rpb
from tests.conformance.refusals import refusal
from tests.conformance.requests import create, made
from tests.conformance.test_rotation import rotate
from tests.fixtures.server import Caller, Deployment
from tests.store.backup_rows import add_key


def run(deployment: Deployment, *arguments: str, code: int = 0) -> dict[str, Any]:
    done = deployment.run(*arguments, "--json")
    assert done.returncode == code, done.stderr + done.stdout
    found: dict[str, Any] = json.loads(done.stdout or done.stderr)
    return found


def databases(deployment: Deployment) -> int:
    with psycopg.connect(deployment.database.admin_dsn) as connection:
        row = connection.execute(b"SELECT count(*) FROM pg_database").fetchone()
    assert row is not None
    return int(row[0])


def sign(caller: Caller) -> bytes:
    return caller.crypto.Sign(cpb.SignRequest(key="signer", message=b"m"), timeout=20).signature


@pytest.fixture
def elsewhere(postgres: EmbeddedPostgres, deployment: Deployment) -> Iterator[Deployment]:
    """The deployment, its configuration naming a database that is not there."""
    name = f"elsewhere_{uuid4().hex[:8]}"
    directory = deployment.directory / "elsewhere"
    directory.mkdir()
    write_private(directory / "dsn", postgres.service_dsn(name).encode())
    write_private(directory / "admin-dsn", postgres.superuser_dsn(name).encode())
    yield deployment
    with psycopg.connect(postgres.superuser_dsn(), autocommit=True) as connection:
        connection.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)".encode())


def move(deployment: Deployment) -> None:
    for name in ("dsn", "admin-dsn"):
        (deployment.directory / "elsewhere" / name).replace(deployment.directory / name)


def await_signing_key(deployment: Deployment) -> None:
    """Return when the service has made the key that signs the checkpoints of the trail: it serves before."""
    with psycopg.connect(deployment.database.admin_dsn, autocommit=True) as connection:
        deadline = time.monotonic() + 20
        while not connection.execute("SELECT FROM cryptography.keys WHERE bound_to <> ''").fetchall():
            assert time.monotonic() < deadline, "no key for checkpoints"
            time.sleep(0.02)


@pytest.mark.slow
def test_a_restored_service_signs_on_and_counted_keys_wait(elsewhere: Deployment, tmp_path: Path) -> None:
    deployment, journal = elsewhere, str(tmp_path / "journal")
    Journal(Path(journal)).append(Event.KEY_REVOKED, uuid4(), occurred_at=datetime.now(UTC), reason="")
    with deployment.serving() as server:
        caller = server.caller()
        made(caller, "secp256r1", name="signer")
        aes = made(caller, "aes", name="aes")
        await_signing_key(deployment)
    saved = run(deployment, "backup", "--out", str(tmp_path / "one"), "--journal", journal)
    assert (saved["file"], saved["journals"]) == (str(tmp_path / "one"), 1)
    assert run(deployment, "restore", "--drill", saved["file"]) == {"opened": 3, "kek_missing": [], "invalid": []}
    assert "is not empty" in run(deployment, "restore", saved["file"], "--journal", journal, code=5)["message"]
    move(deployment)
    restored = run(deployment, "restore", saved["file"], "--journal", journal)
    assert (restored["epoch"], restored["unconfirmed"]) == (2, 1)
    assert run(deployment, "epoch", "show")["unconfirmed"][0]["key"] == aes.id
    with deployment.serving() as server:
        caller = server.caller(caller.user_id)
        assert sign(caller)
        request = cpb.EncryptRequest(key="aes", plaintext=b"p")
        assert refusal(caller.crypto.Encrypt, request).reason == "KEY_INACTIVE"
        assert run(deployment, "epoch", "confirm", aes.id, "--count", "12") == {"key": aes.id, "count": 12, "active": True}
        assert caller.crypto.Encrypt(request, timeout=20).ciphertext


@pytest.mark.slow
def test_a_backup_from_before_a_rotation_lets_the_predecessor_wait_and_names_the_successor_that_is_lost(
    elsewhere: Deployment, tmp_path: Path
) -> None:
    deployment, journal = elsewhere, str(tmp_path / "journal")
    deployment.set_server(journal=journal)
    with deployment.serving() as server:
        caller = server.caller()
        signer = made(caller, "ed25519", name="signer")
        resident = caller.keys.CreateKey(create("aes", custody=kpb.CUSTODY_RESIDENT), timeout=30).key
        early = caller.crypto.Encrypt(cpb.EncryptRequest(key="k", plaintext=b"early"), timeout=20).ciphertext
        # So that the journal is not one to which nothing was ever written.
        caller.keys.RevokeKey(kpb.RevokeKeyRequest(key=made(caller, "aes", name="other").id, reason="left"))
        await_signing_key(deployment)
        saved = run(deployment, "backup", "--out", str(tmp_path / "one"), "--journal", journal)
        successors = {name: rotate(caller, key=name).new_key_id for name in ("signer", "k")}
        signed = caller.crypto.Sign(cpb.SignRequest(key="signer", message=b"m"), timeout=20)
        late = caller.crypto.Encrypt(cpb.EncryptRequest(key="k", plaintext=b"late"), timeout=20).ciphertext
    assert signed.key_id == successors["signer"]
    move(deployment)
    restored = run(deployment, "restore", saved["file"], "--journal", journal)
    assert restored["superseded"] == [signer.id, resident.id]
    assert restored["lost_successors"] == list(successors.values())
    with deployment.serving() as server:
        caller = server.caller(caller.user_id)
        assert {each["key"] for each in run(deployment, "epoch", "show")["unconfirmed"]} == {signer.id, resident.id}
        # The predecessor has its name, and uses it for nothing.
        assert refusal(caller.crypto.Sign, cpb.SignRequest(key="signer", message=b"m")).reason == "KEY_INACTIVE"
        assert refusal(caller.crypto.Encrypt, cpb.EncryptRequest(key="k", plaintext=b"p")).reason == "KEY_INACTIVE"
        assert caller.crypto.Decrypt(cpb.DecryptRequest(ciphertext=early), timeout=20).plaintext == b"early"
        # What the successor made is its own: nothing of it is taken for the predecessor's.
        verify = cpb.VerifyRequest(key=signed.key_id, message=b"m", signature=signed.signature)
        assert refusal(caller.crypto.Verify, verify).reason == "KEY_NOT_FOUND"
        verify.key = "signer"
        assert not caller.crypto.Verify(verify, timeout=20).valid
        assert refusal(caller.crypto.Decrypt, cpb.DecryptRequest(ciphertext=late)).reason == "KEY_NOT_FOUND"
        assert refusal(caller.crypto.Decrypt, cpb.DecryptRequest(ciphertext=late, key="k")).reason == "INCORRECT_KEY"
        # The token holds the RESIDENT successor, perhaps the only copy: nobody removes it.
        found = run(deployment, "hsm", "check", code=1)["keys"]
        assert {"id": successors["k"], "finding": "row_missing"}.items() <= next(
            each for each in found if each["id"] == successors["k"]
        ).items()
        # Rotated once more, the key is served again without anybody's word on how often it was used.
        for name in successors:
            assert rotate(caller, key=name).status == rpb.ROTATION_STATUS_COMPLETED
        assert sign(caller)
        assert caller.crypto.Decrypt(cpb.DecryptRequest(ciphertext=early, key="k"), timeout=20).plaintext == b"early"
        assert run(deployment, "epoch", "confirm", resident.id, "--count", "2")["active"] is False
        assert refusal(caller.crypto.Encrypt, cpb.EncryptRequest(key="k@1", plaintext=b"p")).reason == "KEY_INACTIVE"


@pytest.mark.slow
def test_a_database_that_pg_restore_made_is_not_served(postgres: EmbeddedPostgres, elsewhere: Deployment) -> None:
    deployment = elsewhere
    with deployment.serving():
        pass
    with psycopg.connect(postgres.superuser_dsn(), autocommit=True) as connection:
        name = psycopg.conninfo.conninfo_to_dict((deployment.directory / "elsewhere" / "dsn").read_text())["dbname"]
        connection.execute(f"CREATE DATABASE {name} TEMPLATE {deployment.database.name}".encode())
        connection.execute(f"GRANT CONNECT ON DATABASE {name} TO kms_service".encode())
    move(deployment)
    refused = deployment.run("serve")
    assert (refused.returncode, "Run `kms epoch begin`" in refused.stderr) == (5, True)
    assert run(deployment, "epoch", "show")["may_be_served"] is False
    assert run(deployment, "epoch", "continue") == {"epoch": 2}
    assert "nothing to do" in run(deployment, "epoch", "continue", code=5)["message"]
    assert run(deployment, "epoch", "begin")["epoch"] == 3
    with deployment.serving():
        pass


def test_a_drill_tells_what_does_not_open_and_leaves_nothing(deployment: Deployment, tmp_path: Path) -> None:
    with deployment.serving() as server:
        caller = server.caller()
        keys = {kind: made(caller, kind, name=kind).id for kind in ("secp256k1", "ed25519", "aes")}
        await_signing_key(deployment)
    with psycopg.connect(deployment.database.admin_dsn, autocommit=True) as connection:
        # The sealing key's id is in bytes 18 to 34 of the envelope.
        connection.execute(
            b"UPDATE cryptography.keys SET encrypted_private_key = encode(overlay("
            b"decode(encrypted_private_key, 'base64') PLACING '\\x00000000000000000000000000000000' FROM 19), 'base64')"
            b"WHERE key_name = 'aes'"
        )
        connection.execute(
            b"UPDATE cryptography.keys SET encrypted_private_key = replace(encrypted_private_key, E'\\n', '')"
            b"WHERE key_name = 'aes'"
        )
        bad = add_key(connection, caller.user_id, "no-envelope")
    before = databases(deployment)
    file = run(deployment, "backup", "--out", str(tmp_path / "one"))["file"]
    found = run(deployment, "restore", "--drill", file, code=1)
    # With them the key that signs the checkpoints of the trail.
    assert found == {"opened": 3, "kek_missing": [keys["aes"]], "invalid": [str(bad)]}
    assert databases(deployment) == before


@pytest.mark.parametrize(
    ("number", "drill"),
    [
        (signal.SIGTERM, []),
        pytest.param(signal.SIGHUP, ["--drill"], marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, [], marks=pytest.mark.slow),
    ],
)
def test_a_restore_that_is_asked_to_end_leaves_no_copy_of_the_keys(
    elsewhere: Deployment, tmp_path: Path, number: signal.Signals, drill: list[str]
) -> None:
    deployment = elsewhere
    file = run(deployment, "backup", "--out", str(tmp_path / "one"))["file"]
    before = databases(deployment)
    move(deployment)
    command = [sys.executable, "-m", "kms", "--config", str(deployment.config_file), "restore", *drill, file]
    with psycopg.connect(deployment.database.admin_dsn, autocommit=True) as connection:
        process = subprocess.Popen(command, env=deployment.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while connection.execute(b"SELECT count(*) FROM pg_database").fetchone() == (before,):
            assert process.poll() is None, process.communicate()
            time.sleep(0.005)
        process.send_signal(number)
        assert (process.communicate(timeout=30)[1], process.returncode) == ("kms: INTERRUPTED: stopped\n", 130)
    assert databases(deployment) == before


def test_a_drill_takes_no_journal(deployment: Deployment, tmp_path: Path) -> None:
    assert deployment.run("restore", "--drill", "--journal", "x", str(tmp_path / "one")).returncode == 2


def test_a_file_that_is_not_there_is_named(deployment: Deployment, tmp_path: Path) -> None:
    done = deployment.run("restore", str(tmp_path / "none"))
    assert (done.returncode, done.stderr) == (1, f"kms: FILE: {tmp_path / 'none'}: No such file or directory\n")
