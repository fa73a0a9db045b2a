"""A service that is killed at any step of a rotation: after the restart there is one successor, and nothing is lost."""

import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import grpc
import psycopg
import pytest

from kms.domain.ids import UserId
from kms.v1 import crypto_pb2 as cpb
from kms.v1 import keys_pb2 as kpb
from kms.v1 import rotation_pb2 as rpb
from tests.conformance.requests import create, made
from tests.conformance.test_rotation import key_of, rotate
from tests.fixtures.server import Caller, Deployment

# Where the database stops: at the beginning of a function, or after its work and before its transaction ends. It waits there for
# a lock that `standing_still` holds.
STAND = "PERFORM pg_advisory_xact_lock(4711);"
BEGINNING = ("\nBEGIN\n", f"\nBEGIN\n    {STAND}\n")
STEPS = {
    "request, not made": ("request_rotation", *BEGINNING),
    "request, not committed": ("request_rotation", "RETURN rotation;", f"{STAND} RETURN rotation;"),
    "claim": ("claim_rotations", *BEGINNING),
    "successor made, switch not begun": ("switch_key", *BEGINNING),
    "switch, not committed": ("switch_key", "RETURN 'OK';", f"{STAND} RETURN 'OK';"),
    "switched, dependents not begun": ("copy_grants", *BEGINNING),
    "dependents, not committed": ("copy_grants", "RETURN in_common;", f"{STAND} RETURN in_common;"),
    "end, not begun": ("complete_rotation", *BEGINNING),
    "end, not committed": ("complete_rotation", "RETURN FOUND;", f"{STAND} RETURN TRUE;"),
}
# The others are in the slow set: each costs three starts of a service.
ALWAYS = {"switch, not committed", "switched, dependents not begun"}
DEFINITION = "SELECT pg_get_functiondef(oid) FROM pg_proc WHERE pronamespace = 'cryptography'::regnamespace AND proname = %s"
REQUESTED = "SELECT count(*) > 0 FROM cryptography.key_rotations"
STANDING = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'advisory'"
END = (
    "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = current_database() AND usename = 'kms_service'"
)
# As if the time of a lease, and of the wait before another attempt, had passed.
LEASES_RUN_OUT = """
    UPDATE cryptography.key_rotations SET next_attempt_at = next_attempt_at - interval '1 hour' WHERE next_attempt_at > now()
"""


@pytest.fixture
def admin(deployment: Deployment) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(deployment.database.admin_dsn, autocommit=True) as connection:
        yield connection


@contextmanager
def standing_still(admin: psycopg.Connection[Any], step: str) -> Iterator[None]:
    """Let the database stand still at *step* within the block. At its end the database goes on, be it killed or not."""
    function, before, after = STEPS[step]
    row = admin.execute(DEFINITION, (function,)).fetchone()
    assert row is not None
    definition = str(row[0])
    assert before in definition
    admin.execute("SELECT pg_advisory_lock(4711)")
    admin.execute(definition.replace(before, after, 1).encode())
    try:
        yield
    finally:
        if not admin.closed:
            admin.execute(definition.encode())
            admin.execute("SELECT pg_advisory_unlock(4711)")


def await_standing(admin: psycopg.Connection[Any], step: str) -> None:
    """Wait until a rotation stands at *step*."""
    # The job of the service stands still in its claim too, and perhaps before anybody asked for a rotation.
    asked = "SELECT true" if step.startswith("request") else REQUESTED
    wait_for(lambda: admin.execute(STANDING).fetchone() != (0,) and admin.execute(asked.encode()).fetchone() == (True,))


def rotate_and_kill(deployment: Deployment, admin: psycopg.Connection[Any], step: str, caller_id: UserId) -> None:
    """Start a service, have the key k rotated, and kill the service at *step*."""
    is_killed = False
    with ThreadPoolExecutor(1) as pool, suppress(AssertionError), deployment.serving() as server:
        with standing_still(admin, step):
            rotating = pool.submit(ended, server.caller(caller_id))
            await_standing(admin, step)
            os.kill(server.process.pid, signal.SIGKILL)
            server.process.wait(20)
            rotating.result(60)
            admin.execute(END)
        is_killed = True
    assert is_killed
    admin.execute(LEASES_RUN_OUT)


@pytest.mark.parametrize("step", [step if step in ALWAYS else pytest.param(step, marks=pytest.mark.slow) for step in STEPS])
def test_a_service_that_is_killed_in_a_rotation_has_one_successor_after_its_restart(
    deployment: Deployment, admin: psycopg.Connection[Any], step: str
) -> None:
    with deployment.serving() as server:
        caller = server.caller()
        made(caller, "aes")
        sealed = caller.crypto.Encrypt(cpb.EncryptRequest(key="k", plaintext=b"before")).ciphertext
    rotate_and_kill(deployment, admin, step, caller.user_id)
    with deployment.serving() as server:
        caller = server.caller(caller.user_id)
        if step.startswith("request"):
            assert statuses(caller) == []
            rotate(caller)
        wait_for(lambda: statuses(caller) == [rpb.ROTATION_STATUS_COMPLETED])
        keys = caller.keys.ListKeys(kpb.ListKeysRequest()).keys
        assert [key.name for key in keys] == ["k", "k@1"]
        [rotation] = caller.rotation.ListRotations(rpb.ListRotationsRequest()).rotations
        assert (rotation.old_key_id, rotation.new_key_id) == (keys[1].id, keys[0].id)
        assert caller.crypto.Decrypt(cpb.DecryptRequest(ciphertext=sealed)).plaintext == b"before"
        again = caller.crypto.Encrypt(cpb.EncryptRequest(key="k", plaintext=b"after"))
        assert again.key_id == keys[0].id
        assert caller.crypto.Decrypt(cpb.DecryptRequest(ciphertext=again.ciphertext)).plaintext == b"after"


@pytest.mark.parametrize(
    "step", ["successor made, switch not begun", pytest.param("switched, dependents not begun", marks=pytest.mark.slow)]
)
def test_of_a_resident_key_what_was_made_in_vain_has_a_mark_and_its_successor_has_none(
    deployment: Deployment, admin: psycopg.Connection[Any], step: str
) -> None:
    with deployment.serving() as server:
        caller = server.caller()
        caller.keys.CreateKey(create("secp256k1", custody=kpb.CUSTODY_RESIDENT), timeout=30)
    rotate_and_kill(deployment, admin, step, caller.user_id)
    with deployment.serving() as server:
        caller = server.caller(caller.user_id)
        wait_for(lambda: statuses(caller) == [rpb.ROTATION_STATUS_COMPLETED])
        key, predecessor = key_of(caller), key_of(caller, "k@1")
        assert caller.crypto.Sign(cpb.SignRequest(key="k", message=b"m"), timeout=15).key_id == key.id
    found = {each["id"]: each["finding"] for each in json.loads(deployment.run("hsm", "check", "--json").stdout)["keys"]}
    assert (found.pop(key.id), found.pop(predecessor.id)) == ("stored", "stored")
    # The service's own key is there too. By its mark reconciliation removes what was made in vain, once it is old enough.
    assert sorted(found.values()) == (["pending", "stored"] if step.startswith("successor made") else ["stored"])


def ended(caller: Caller) -> None:
    with suppress(grpc.RpcError):
        rotate(caller)


def statuses(caller: Caller) -> list[int]:
    return [rotation.status for rotation in caller.rotation.ListRotations(rpb.ListRotationsRequest()).rotations]


def wait_for(condition: Any) -> None:  # noqa: ANN401
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)
