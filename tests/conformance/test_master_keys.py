"""Rotation of the master keys while the service runs: every envelope moves to the new generation, and nothing is lost.

`kms kek` in a process of its own, on the token and the database of a service that serves clients.
"""

import base64
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any
from uuid import UUID

import psycopg
import pytest

from kms.v1 import crypto_pb2 as cpb
from kms.v1 import keys_pb2 as kpb
from tests.conformance.requests import create, made
from tests.fixtures.server import Caller, Deployment

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


def refused(deployment: Deployment, *arguments: str) -> str:
    """Run `kms kek`, which must be refused, and return why."""
    done = deployment.run("kek", *arguments, "--json")
    assert done.returncode == 1, (done.stdout, done.stderr)
    assert json.loads(done.stderr)["reason"] == "KEK_IN_USE", done.stderr
    return str(json.loads(done.stderr)["message"])


def states(deployment: Deployment) -> dict[int, tuple[str, int]]:
    """Return the state of each generation, and how many envelopes name it."""
    return {one["number"]: (one["state"], one["envelopes"]) for one in kek(deployment, "list")["generations"]}


def generations(admin: psycopg.Connection[Any]) -> dict[UUID, set[int]]:
    """Return the generations of the keys that each envelope names, read here by what docs/formats.md says."""
    known = {row[0]: row[1] for row in admin.execute("SELECT id, generation FROM cryptography.wrapping_keys")}
    query = "SELECT id, encrypted_private_key FROM cryptography.keys WHERE encrypted_private_key <> ''"
    found = {}
    for key_id, text in admin.execute(query):
        raw = base64.b64decode(text)
        found[key_id] = {known[named] for named in (UUID(bytes=raw[2:18]), UUID(bytes=raw[18:34])) if named.int}
    return found


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
