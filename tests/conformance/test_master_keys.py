"""Rotation of the master keys while the service runs: every envelope moves to the new generation, and nothing is lost.

`kms kek` in a process of its own, on the token and the database of a service that serves clients.
"""

import base64
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Event
from typing import Any
from uuid import UUID

import grpc
import psycopg
import pytest

from kms.v1 import crypto_pb2 as cpb
from kms.v1 import keys_pb2 as kpb
from tests.conformance.refusals import refusal
from tests.conformance.requests import create, made
from tests.fixtures.server import Caller, Deployment, RunningServer

LEASES_RUN_OUT = "UPDATE cryptography.rewrapping SET next_attempt_at = next_attempt_at - interval '1 hour'"
KINDS = ("secp256k1", "secp256r1", "ed25519", "rsa", "aes")


@pytest.fixture
def admin(deployment: Deployment) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(deployment.database.admin_dsn, autocommit=True) as connection:
        yield connection


def kek(deployment: Deployment, *arguments: str) -> dict[str, Any]:
    """Run `kms kek` to its good end, and return what it says."""
    done = deployment.run("kek", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def refused(deployment: Deployment, *arguments: str, reason: str = "KEK_IN_USE") -> str:
    """Run `kms kek`, which must be refused, and return why."""
    done = deployment.run("kek", *arguments, "--json")
    assert done.returncode in (1, 5), (done.stdout, done.stderr)
    assert json.loads(done.stderr)["reason"] == reason, done.stderr
    return str(json.loads(done.stderr)["message"])


def states(deployment: Deployment) -> dict[int, tuple[str, int]]:
    """Return the state of each generation, and how many envelopes name it."""
    return {one["number"]: (one["state"], one["envelopes"]) for one in kek(deployment, "list")["generations"]}


def generations(admin: psycopg.Connection[Any]) -> dict[UUID, set[int]]:
    """Return the generations of the keys that each envelope names, read here by what docs/formats.md says."""
    known = {row[0]: row[1] for row in admin.execute("SELECT id, generation FROM cryptography.wrapping_keys")}
    query = "SELECT id, encrypted_private_key FROM cryptography.keys WHERE length(encrypted_private_key) > 0"
    return {key_id: {known[named] for named in named_by(text)} for key_id, text in admin.execute(query)}


def named_by(text: str) -> set[UUID]:
    """Return the ids of the token's keys that an envelope names."""
    raw = base64.b64decode(text)
    return {named for named in (UUID(bytes=raw[2:18]), UUID(bytes=raw[18:34])) if named.int}


def all_are_of(admin: psycopg.Connection[Any], generation: int) -> bool:
    return all(one == {generation} for one in generations(admin).values())


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


class Users:
    """Keys of every type and custody, and what was made with them before the rotation."""

    def __init__(self, caller: Caller) -> None:
        self.caller = caller
        for kind in KINDS:
            made(caller, kind, name=kind)
        caller.keys.CreateKey(create("secp256k1", name="resident", custody=kpb.CUSTODY_RESIDENT))
        self.sealed = self.encrypt()
        self.signed = {name: self.sign(name) for name in (*KINDS[:4], "resident")}

    def encrypt(self) -> bytes:
        return self.caller.crypto.Encrypt(cpb.EncryptRequest(key="aes", plaintext=b"p")).ciphertext

    def sign(self, name: str) -> bytes:
        return self.caller.crypto.Sign(cpb.SignRequest(key=name, message=b"m")).signature

    def check(self) -> None:
        """Use every key, also for what was made before."""
        assert self.caller.crypto.Decrypt(cpb.DecryptRequest(ciphertext=self.sealed)).plaintext == b"p"
        assert self.caller.crypto.Decrypt(cpb.DecryptRequest(ciphertext=self.encrypt())).plaintext == b"p"
        for name, before in self.signed.items():
            for signature in (before, self.sign(name)):
                assert self.caller.crypto.Verify(cpb.VerifyRequest(key=name, message=b"m", signature=signature)).valid


def test_every_key_moves_to_the_new_generation_while_clients_use_it(
    deployment: Deployment, admin: psycopg.Connection[Any]
) -> None:
    with deployment.serving() as server:
        users = Users(server.caller())
        versions = admin.execute("SELECT id, version, record_mac FROM cryptography.keys ORDER BY id").fetchall()
        stopped = Event()

        def client(caller: Caller) -> int:
            uses = 0
            while not stopped.is_set():
                for name in users.signed:
                    caller.crypto.Sign(cpb.SignRequest(key=name, message=b"m"))
                caller.crypto.Encrypt(cpb.EncryptRequest(key="aes", plaintext=b"p"))
                uses += 1
            return uses

        with ThreadPoolExecutor(4) as pool:
            clients = [pool.submit(client, server.again(users.caller)) for _ in range(4)]
            try:
                assert kek(deployment, "rotate") == {"generation": 2}
                wait_for(lambda: all_are_of(admin, 2))
            finally:
                stopped.set()
            assert min(one.result() for one in clients) > 0
        users.check()
        assert admin.execute("SELECT id, version, record_mac FROM cryptography.keys ORDER BY id").fetchall() == versions
        made(users.caller, "aes", name="later")
        assert all_are_of(admin, 2)
        count = len(generations(admin))
        old, new = kek(deployment, "list")["generations"]
        assert (old["state"], old["envelopes"], old["moved"], old["not_opened"]) == ("old", 0, count - 1, 0)
        assert old["moved_sealed"] == 1  # the Ed25519 key
        assert (new["state"], new["envelopes"]) == ("in_use", count)
        assert refused(deployment, "retire", "2")
        assert refused(deployment, "destroy", "1", "--yes")
        kek(deployment, "retire", "1")
        users.check()
        assert states(deployment)[1] == ("retired", 0)
        assert kek(deployment, "destroy", "1", "--yes") == {"destroyed": 1}
        users.check()
        assert states(deployment) == {1: ("destroyed", 0), 2: ("in_use", count)}
        assert not [line for line in server.log() if line["level"] in ("error", "critical")]
    with deployment.serving() as server:
        users.caller = server.caller(users.caller.user_id)
        users.check()


@pytest.mark.slow
def test_workers_share_the_envelopes_and_what_is_left_when_they_are_killed_is_moved_after_them(
    deployment: Deployment, admin: psycopg.Connection[Any]
) -> None:
    deployment.write_config(sessions_max=18)
    with deployment.serving("--workers", "2") as server:
        caller = server.caller()
        keys = [made(caller, "aes", name=f"k{number}") for number in range(24)]
        held = UUID(keys[0].id)
        with admin.transaction():
            # The workers move all but this key, and wait for nobody.
            admin.execute("SELECT FROM cryptography.keys WHERE id = %s FOR UPDATE", (held,))
            kek(deployment, "rotate")
            wait_for(lambda: {key_id for key_id, one in generations(admin).items() if one == {1}} == {held})
            victims = server.workers()
            for pid in victims:
                os.kill(pid, signal.SIGKILL)
            wait_for(lambda: not server.workers().keys() & victims.keys())
        admin.execute(LEASES_RUN_OUT)
        wait_for(lambda: all_are_of(admin, 2))
        old, _ = kek(deployment, "list")["generations"]
        assert (old["moved"], old["not_opened"]) == (len(generations(admin)), 0)
        wait_for(lambda: bool(server.workers().keys() - victims.keys()))
        caller = server.caller(caller.user_id)
        for key in keys:
            caller.crypto.Encrypt(cpb.EncryptRequest(key=key.name, plaintext=b"p"))


def test_a_planted_envelope_is_left_where_it_is_and_stops_nothing(deployment: Deployment, admin: psycopg.Connection[Any]) -> None:
    plant = "UPDATE cryptography.keys SET encrypted_private_key = %s WHERE id = %s"
    with deployment.serving() as server:
        caller = server.caller()
        victim, other, foreign = (made(caller, "aes", name=name) for name in ("victim", "other", "foreign"))
        encrypted = caller.crypto.Encrypt(cpb.EncryptRequest(key="victim", plaintext=b"p")).ciphertext
        own, others, before = (envelope(admin, key) for key in (victim, other, foreign))
        admin.execute(plant, (others, victim.id))
        admin.execute(plant, ("x" * 200, foreign.id))
        kek(deployment, "rotate")
        wait_for(lambda: named_by(envelope(admin, other)).isdisjoint(named_by(own)))
        wait_for(lambda: kek(deployment, "list")["generations"][0]["not_opened"] == 1)
        assert envelope(admin, victim) == others
        assert envelope(admin, foreign) == "x" * 200
        assert {line["key"] for line in server.log() if line["event"] == "envelope not moved"} == {victim.id}
        wait_for(lambda: refusal(caller.crypto.Decrypt, cpb.DecryptRequest(ciphertext=encrypted)).reason == "ENVELOPE_INVALID")
        assert "1 keys are kept under generation 1" in refused(deployment, "retire", "1")
        admin.execute(plant, (own, victim.id))
        admin.execute(LEASES_RUN_OUT)
        wait_for(lambda: named_by(envelope(admin, victim)) == named_by(envelope(admin, other)))
        wait_for(lambda: served(caller, encrypted))
        # The envelope of before is the same key, and nobody stores it under a generation that is retired.
        kek(deployment, "retire", "1")
        with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState):
            admin.execute(plant, (own, victim.id))
        # What is no envelope may be one of the old generation when it is restored, as docs/operations.md says how.
        message = refused(deployment, "destroy", "1", "--yes")
        assert "1 keys name no known master key" in message
        assert foreign.id in message
        with admin.transaction():
            admin.execute("SET LOCAL session_replication_role = replica")
            admin.execute(plant, (before, foreign.id))
        wait_for(lambda: named_by(envelope(admin, foreign)) == named_by(envelope(admin, other)))
        kek(deployment, "destroy", "1", "--yes")


def test_no_row_has_a_retired_generation_make_envelopes(deployment: Deployment, admin: psycopg.Connection[Any]) -> None:
    with deployment.serving() as server:
        caller = server.caller()
        made(caller, "aes", name="before")
        kek(deployment, "rotate")
        wait_for(lambda: all_are_of(admin, 2))
        kek(deployment, "retire", "1")
        admin.execute("SET session_replication_role = replica")
        admin.execute("UPDATE cryptography.wrapping_keys SET retired_at = NULL, backup_confirmed_at = NULL")
        lost = admin.execute("DELETE FROM cryptography.wrapping_keys WHERE generation = 2 RETURNING id").fetchall()
        for _ in range(2):  # the first round may have begun before
            await_round(server)
        later = made(caller, "aes", name="later")
        assert named_by(envelope(admin, later)) == {row[0] for row in lost}


def await_round(server: RunningServer) -> None:
    """Return when the service has looked once more which generation makes envelopes."""
    name, labels = "kms_job_success_age_seconds", frozenset({("name", "master_keys")})
    begun = time.monotonic()
    wait_for(lambda: server.metrics()[name, labels] < time.monotonic() - begun)


def envelope(admin: psycopg.Connection[Any], key: kpb.Key) -> str:
    row = admin.execute("SELECT encrypted_private_key FROM cryptography.keys WHERE id = %s", (key.id,)).fetchone()
    assert row is not None
    return str(row[0])


def served(caller: Caller, ciphertext: bytes) -> bool:
    """Whether the ciphertext opens: a worker may remember another envelope for a second."""
    with suppress(grpc.RpcError):
        return caller.crypto.Decrypt(cpb.DecryptRequest(ciphertext=ciphertext)).plaintext == b"p"
    return False


def test_a_token_that_lacks_the_newest_generation_is_not_rotated(deployment: Deployment, tmp_path: Path) -> None:
    token, behind = deployment.token.directory, tmp_path / "behind"
    shutil.copytree(token, behind)
    kek(deployment, "rotate")
    kek(deployment, "rotate")
    shutil.rmtree(token)
    shutil.copytree(behind, token)
    assert "lacks generation 2, 3" in refused(deployment, "rotate", reason="HSM_KEK_MISSING")
    found = kek(deployment, "list")["generations"]
    assert [(one["number"], one["state"]) for one in found] == [(1, "in_use"), (2, "missing"), (3, "missing")]
    with deployment.serving() as server:
        warnings = [line for line in server.log() if "lacks generations" in line["event"]]
        assert warnings[0]["generations"] == [2, 3]
