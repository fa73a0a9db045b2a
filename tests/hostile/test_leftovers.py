"""What a RESIDENT key leaves in the token when its creation fails, and what may be removed from the token afterwards.

The service runs, with a token and a database of its own. The test looks into both from outside.
"""

import asyncio
import itertools
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from statistics import median
from typing import Any
from uuid import UUID

import grpc
import psycopg
import pytest
from pkcs11 import Attribute, ObjectClass

from kms.domain.ids import KeyId
from kms.domain.residents import Holdings
from kms.hsm import residents
from kms.hsm.one_session import OneSession, one_session
from kms.v1 import admin_pb2 as apb
from kms.v1 import crypto_pb2 as cpb
from kms.v1 import keys_pb2 as kpb
from tests.conformance.requests import create
from tests.fixtures.server import Caller, Deployment, RunningServer, _port
from tests.fixtures.softhsm import settings_of

WAIT_SECONDS = 90.0


@pytest.fixture
def token(deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> Iterator[OneSession]:
    """The deployment's token, beside the service."""
    for name, value in deployment.token.environment.items():
        monkeypatch.setenv(name, value)
    with one_session(settings_of(deployment.token)) as opened:
        yield opened


def held(token: OneSession) -> Holdings:
    return asyncio.run(token.holdings())


def rows(deployment: Deployment) -> set[KeyId]:
    query = "SELECT id FROM cryptography.keys WHERE custody = 'RESIDENT'"
    with psycopg.connect(deployment.database.admin_dsn) as connection:
        return {KeyId(row[0]) for row in connection.execute(query)}


def execute(deployment: Deployment, statement: str, *parameters: object) -> None:
    """Run a statement as a superuser whom no trigger stops."""
    with psycopg.connect(deployment.database.admin_dsn) as connection:
        connection.execute("SET session_replication_role = replica")
        connection.execute(statement.encode(), parameters)


def wait_for(what: Callable[[], Any], expected: object) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while (seen := what()) != expected:
        assert time.monotonic() < deadline, (seen, expected)
        time.sleep(0.2)


def wait_for_audit_key(deployment: Deployment, token: OneSession) -> KeyId:
    """Wait until the service has made the key for checkpoints, and return its id."""
    wait_for(lambda: (len(rows(deployment)), rows(deployment) == held(token).objects.keys(), held(token).marks), (1, True, {}))
    return next(iter(rows(deployment)))


def resident(kind: str = "aes", name: str = "k") -> kpb.CreateKeyRequest:
    return create(kind, name=name, custody=kpb.CUSTODY_RESIDENT)


def made(caller: Caller, name: str = "k") -> KeyId:
    return KeyId(UUID(caller.keys.CreateKey(resident(name=name), timeout=30).key.id))


def works(caller: Caller, name: str = "k") -> bool:
    return bool(caller.crypto.Encrypt(cpb.EncryptRequest(key=name, plaintext=b"x"), timeout=30).ciphertext)


def age_marks(token: OneSession) -> None:
    """Put every mark of the token back by two hours."""
    with_two_hours_less = (datetime.now(UTC) - timedelta(hours=2)).isoformat().encode()
    session = token.connection.open_session()
    marks = list(session.raw.get_objects({Attribute.CLASS: ObjectClass.DATA, Attribute.TOKEN: True}))
    labels = [item[Attribute.LABEL] for item in marks if item[Attribute.LABEL].startswith("neo-kms pending ")]
    for item in marks:
        if item[Attribute.LABEL] in labels:
            item.destroy()
    for label in labels:
        session.raw.create_object(
            {
                Attribute.CLASS: ObjectClass.DATA,
                Attribute.TOKEN: True,
                Attribute.PRIVATE: True,
                Attribute.APPLICATION: residents.APPLICATION,
                Attribute.LABEL: label,
                Attribute.VALUE: with_two_hours_less,
            }
        )
    token.connection.close_session(session)


def checked(deployment: Deployment, *options: str, answer: str = "") -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "kms", "--config", str(deployment.config_file), "hsm", "check", *options]
    return subprocess.run(
        command, env=deployment.environment, input=answer, capture_output=True, text=True, timeout=100, check=False
    )


def found(deployment: Deployment) -> tuple[int, dict[KeyId, str]]:
    """Return the exit code of `kms hsm check`, and what it found."""
    done = checked(deployment, "--json")
    assert done.stdout, done.stderr
    return done.returncode, {KeyId(UUID(key["id"])): key["finding"] for key in json.loads(done.stdout)["keys"]}


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_creates_with_short_deadlines_leave_no_key_that_no_row_names(deployment: Deployment, token: OneSession) -> None:
    deployment.write_config(resident_keys_max=400)
    with deployment.serving() as server:
        wait_for_audit_key(deployment, token)
        callers = [server.caller() for _ in range(4)]
        names, chance = itertools.count(), random.Random(9)

        def attempt(caller: Caller, seconds: float) -> float | None:
            """Return how long a creation took, None for one that did not end in time."""
            began, kind = time.monotonic(), chance.choice(("aes", "secp256k1"))
            try:
                caller.keys.CreateKey(resident(kind, f"k-{next(names)}"), timeout=seconds)
            except grpc.RpcError:
                return None
            return time.monotonic() - began

        with ThreadPoolExecutor(8) as threads:
            # Deadlines are short by the measure of this machine, so that they pass in every step of a creation.
            taken = [each for each in threads.map(lambda n: attempt(callers[n % 4], 30), range(16)) if each is not None]
            usual = median(taken)
            answered = [
                each is not None
                for each in threads.map(lambda n: attempt(callers[n % 4], usual * chance.uniform(0.1, 1.5)), range(240))
            ]
        assert not all(answered)
        # What the service had begun ends by itself: no key and no mark is left that no row names, and every place is counted.
        wait_for(lambda: (held(token).marks, held(token).objects.keys() == rows(deployment)), ({}, True))
        assert any(answered)
        wait_for(lambda: resident_keys(server), len(rows(deployment)))
        made(callers[0], "last")


def resident_keys(server: RunningServer) -> int:
    """Return how many places the service counts as taken, as `kms status` shows it."""
    return server.auditor().admin.GetStatus(apb.GetStatusRequest(), timeout=20).detail.resident_keys


KILLER = """
import asyncio, os, pathlib, signal, sys
from kms.hsm import token_hsm

step, switch = sys.argv.pop(1), pathlib.Path(sys.argv.pop(1))

def die():
    if switch.exists():
        os.kill(os.getpid(), signal.SIGKILL)

def after(holder, name):
    real = getattr(holder, name)
    def wrapped(*arguments):
        result = real(*arguments)
        die()
        return result
    setattr(holder, name, wrapped)

confirm = token_hsm.TokenHsm.confirm

async def confirmed(*arguments):
    if step == "row":
        die()
    await confirm(*arguments)
    die()

if step == "mark":
    after(token_hsm._ResidentMaking, "_mark")
elif step == "object":
    after(token_hsm._ResidentMaking, "_make")
else:
    token_hsm.TokenHsm.confirm = confirmed

from kms.__main__ import main
main()
"""


@contextmanager
def killed_at(step: str, deployment: Deployment, token: OneSession) -> Iterator[RunningServer]:
    """Run a service that kills itself after *step* of a creation; it must be dead at the end."""
    switch, log_file = deployment.directory / "kill", deployment.directory / "killed.log"
    command = [sys.executable, "-c", KILLER, step, str(switch), "--config", str(deployment.config_file), "serve"]
    with ExitStack() as stack, log_file.open("wb") as log:
        process = subprocess.Popen(command, env=deployment.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        stack.callback(process.wait)
        stack.callback(process.kill)
        server = RunningServer(deployment, process, log_file, _port(process, log_file), stack)
        wait_for_audit_key(deployment, token)
        switch.touch()
        yield server
        assert process.wait(WAIT_SECONDS) == -signal.SIGKILL, log_file.read_text()
    switch.unlink()


@pytest.mark.parametrize(
    ("step", "has_object", "has_mark", "has_row"),
    [("mark", False, True, False), ("object", True, True, False), ("row", True, True, True), ("confirmed", True, False, True)],
)
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_service_that_is_killed_between_two_steps_leaves_what_the_next_start_sets_right(
    deployment: Deployment, token: OneSession, step: str, has_object: bool, has_mark: bool, has_row: bool
) -> None:
    user = deployment.new_user()
    with killed_at(step, deployment, token) as server:
        with pytest.raises(grpc.RpcError):
            server.caller(user).keys.CreateKey(resident(), timeout=60)
        with pytest.raises(grpc.RpcError):  # it may be the first that finds the service dead
            server.caller(user).keys.GetKey(kpb.GetKeyRequest(key="k"), timeout=5)
    audit = next(key_id for key_id, bound_to in held(token).objects.items() if bound_to == "audit")
    stored = rows(deployment) - {audit}
    assert (len(held(token).objects) - 1, len(held(token).marks), len(stored)) == (has_object, has_mark, has_row)

    with deployment.serving() as server:  # a young mark may be of a call that goes on elsewhere
        expected = {"mark": "pending", "object": "pending"}.get(step, "stored")
        wait_for(lambda: sorted(found(deployment)[1].values()), sorted([expected, "stored"]))
        assert len(held(token).objects) - 1 == has_object
    age_marks(token)
    with deployment.serving() as server:
        wait_for(lambda: (set(held(token).objects), held(token).marks), ({audit, *stored}, {}))
        caller = server.caller(user)
        if not has_row:
            made(caller)
        assert works(caller)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_deleted_row_never_has_a_key_removed_from_the_token(deployment: Deployment, token: OneSession) -> None:
    with deployment.serving() as server:
        audit = wait_for_audit_key(deployment, token)
        caller = server.caller()
        lost, kept = made(caller, "lost"), made(caller, "kept")
        execute(deployment, "DELETE FROM cryptography.keys WHERE id = %s", lost)
        assert found(deployment) == (1, {lost: "row_missing", kept: "stored", audit: "stored"})
    with deployment.serving():  # reconciles at its start
        assert found(deployment) == (1, {lost: "row_missing", kept: "stored", audit: "stored"})
    text = checked(deployment)
    assert "restore it from a backup" in text.stdout
    for refused in (kept, audit):
        done = checked(deployment, "--remove", str(refused), "--yes")
        assert (done.returncode, done.stderr.startswith("kms: WRONG_PURPOSE: ")) == (1, True), done.stderr
    assert checked(deployment, "--remove", str(lost), answer="n\n").returncode != 0
    assert held(token).objects.keys() == {lost, kept, audit}
    done = checked(deployment, "--remove", str(lost), answer="y\n")
    assert done.returncode == 0, done.stderr
    assert found(deployment) == (0, {kept: "stored", audit: "stored"})
    assert checked(deployment, "--remove", str(lost), "--yes").returncode == 3
    # A bound key is not removed at all: here its row is deleted too.
    execute(deployment, "DELETE FROM cryptography.keys WHERE id = %s", audit)
    done = checked(deployment, "--remove", str(audit), "--yes")
    assert (done.returncode, "audit" in done.stderr) == (1, True), done.stderr
    assert held(token).objects.keys() == {kept, audit}


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_row_that_is_not_proven_changes_nothing_in_the_token(deployment: Deployment, token: OneSession) -> None:
    user = deployment.new_user()
    with killed_at("object", deployment, token) as server:
        with pytest.raises(grpc.RpcError):
            server.caller(user).keys.CreateKey(resident(), timeout=60)
        with pytest.raises(grpc.RpcError):
            server.caller(user).keys.GetKey(kpb.GetKeyRequest(key="k"), timeout=5)
    (left,) = held(token).marks
    execute(  # the row of another key, under the id of the one that is left
        deployment,
        "INSERT INTO cryptography.keys (id, user_id, key_name, key_type, key_purpose, key_curve, key_strength, custody, origin,"
        " public_key, encrypted_private_key, hsm_key_id)"
        " SELECT %s, %s, 'planted', key_type, key_purpose, key_curve, key_strength, custody, origin, public_key,"
        " encrypted_private_key, %s FROM cryptography.keys LIMIT 1",
        left,
        user,
        left.hex,
    )
    age_marks(token)
    before = held(token)
    with deployment.serving():
        code, seen = found(deployment)
    assert (code, seen[left], held(token)) == (1, "row_unproven", before)
    done = checked(deployment, "--remove", str(left), "--yes")
    assert (done.returncode, held(token)) == (1, before), done.stderr
