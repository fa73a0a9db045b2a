"""A process is stopped in the middle of a use: what others have changed meanwhile holds for it, and it holds up nobody."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import psycopg
import pytest

from kms.dev.postgres import EmbeddedPostgres
from kms.pki.private_file import write_private
from kms.v1 import crypto_pb2 as cpb
from kms.v1 import keys_pb2 as kpb
from tests.conformance.refusals import refusal_of
from tests.conformance.requests import made
from tests.fixtures.postgres import cloned
from tests.fixtures.server import Caller, RunningServer, deployed
from tests.fixtures.wire import CHARGE, SYNC_BYTES, Stop, Wire, wired


@dataclass(frozen=True, slots=True)
class Pair:
    """Two processes of one deployment; the first reaches the database through the wire."""

    first: RunningServer
    second: RunningServer
    wire: Wire

    def execute(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        """Run a statement as the superuser."""
        with psycopg.connect(self.first.deployment.database.admin_dsn, autocommit=True) as connection:
            cursor = connection.execute(query.encode(), values)
            return cursor.fetchall() if cursor.description else []

    @contextmanager
    def stopped_at(self, stop: Stop) -> Iterator[None]:
        """Stand the first process still when *stop* has caught its bytes; in the end they go through and it goes on."""
        stop.wait()
        os.kill(self.first.process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            stop.decide("let through")
            time.sleep(0.1)
            os.kill(self.first.process.pid, signal.SIGCONT)


@pytest.fixture(scope="module")
def pair(postgres: EmbeddedPostgres, token_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with (
        cloned(postgres) as database,
        deployed(tmp_path_factory.mktemp("pair"), database, token_template) as deployment,
        deployment.serving() as second,
        wired(database.dsn) as (wire, dsn),
    ):
        (deployment.directory / "dsn").unlink()
        write_private(deployment.directory / "dsn", dsn.encode())
        with deployment.serving() as first:
            yield Pair(first, second, wire)


@dataclass(frozen=True, slots=True)
class Used:
    """A key of a user who calls at both processes, used once at the first."""

    name: str
    id: str
    here: Caller
    there: Caller

    def sign(self, message: bytes) -> Any:  # noqa: ANN401  # a grpc future
        """Begin to sign at the first process."""
        return self.here.crypto.Sign.future(cpb.SignRequest(key=self.name, message=message), timeout=15)


@pytest.fixture
def used(pair: Pair) -> Used:
    here = pair.first.caller()
    there = pair.second.caller(here.user_id)
    name = f"k-{uuid4().hex}"
    key = made(there, "secp256k1", name=name)
    assert here.crypto.Sign(cpb.SignRequest(key=name, message=b"m"), timeout=15).signature
    return Used(name, key.id, here, there)


def reason(call: Any) -> str:  # noqa: ANN401  # a grpc future
    error = call.exception()
    return "OK" if error is None else refusal_of(error).reason


def revoke(pair: Pair, used: Used) -> None:
    used.there.keys.RevokeKey(kpb.RevokeKeyRequest(key=used.name, reason="r"), timeout=15)


def compromise(pair: Pair, used: Used) -> None:
    used.there.keys.MarkKeyCompromised(kpb.MarkKeyCompromisedRequest(key=used.name, reason="r"), timeout=15)


def deactivate(pair: Pair, used: Used) -> None:
    used.there.keys.DeactivateKey(kpb.DeactivateKeyRequest(key=used.name), timeout=15)


def let_expire(pair: Pair, used: Used) -> None:
    query = "UPDATE cryptography.keys SET created_at = '2020-01-01', expires_at = clock_timestamp() WHERE key_name = %s"
    pair.first.deployment.edit_keys(query, used.name)


def lock_user(pair: Pair, used: Used) -> None:
    pair.execute("UPDATE authentication.users SET locked_until = 'tomorrow' WHERE id = %s", used.here.user_id)


def delete_user(pair: Pair, used: Used) -> None:
    pair.execute("UPDATE authentication.users SET deleted_at = now() WHERE id = %s", used.here.user_id)


REMEMBERED_SECONDS: Final = 1.05
CHANGES: Final = [
    (revoke, "KEY_REVOKED"),
    (compromise, "KEY_COMPROMISED"),
    (deactivate, "KEY_INACTIVE"),
    (let_expire, "KEY_EXPIRED"),
    (lock_user, "CREDENTIALS_INVALID"),
    (delete_user, "CREDENTIALS_INVALID"),
]


def uses_in_the_trail(pair: Pair, message: bytes) -> int:
    query = "SELECT count(*) FROM audit.security_events WHERE event_details ->> 'input_sha256' = %s AND outcome = 'success'"
    return int(pair.execute(query, sha256(message).hexdigest())[0][0])


@pytest.mark.parametrize("held", ["the charge", pytest.param("the answer to the check", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("change", "expected"), CHANGES)
def test_a_process_stopped_between_check_and_charge_gives_nothing_out_after_a_change(
    pair: Pair, used: Used, held: str, change: Callable[[Pair, Used], None], expected: str
) -> None:
    message = uuid4().bytes
    if held == "the answer to the check":
        time.sleep(REMEMBERED_SECONDS)  # so that the key is read again
    stop = pair.wire.stop_at(CHARGE) if held == "the charge" else pair.wire.stop_at(used.name.encode(), "server")
    call = used.sign(message)
    with pair.stopped_at(stop):
        change(pair, used)
    assert reason(call) == expected
    assert uses_in_the_trail(pair, message) == 0
    counted = pair.execute("SELECT usage_counter FROM cryptography.keys WHERE key_name = %s", used.name)
    assert counted == [(1,)]


def take_role(pair: Pair, used: Used) -> None:
    pair.execute("DELETE FROM authentication.user_roles WHERE user_id = %s", used.here.user_id)
    pair.execute("UPDATE authentication.users SET version = version + 1 WHERE id = %s", used.here.user_id)


def let_role_expire(pair: Pair, used: Used) -> None:
    # No version advances: the charge itself has to look.
    pair.execute("UPDATE authentication.user_roles SET expires_at = clock_timestamp() WHERE user_id = %s", used.here.user_id)


@pytest.mark.parametrize(
    ("change", "allows_revoked", "expected"),
    [
        (take_role, False, "PERMISSION_DENIED"),
        (let_role_expire, False, "PERMISSION_DENIED"),
        (revoke, False, "KEY_REVOKED"),
        (revoke, True, "OK"),
    ],
)
def test_a_process_stopped_before_it_records_the_use_of_a_compromised_key_gives_out_what_is_permitted_after_the_change(
    pair: Pair, change: Callable[[Pair, Used], None], allows_revoked: bool, expected: str
) -> None:
    user = pair.first.deployment.new_user(role="recovery")
    name = f"k-{uuid4().hex}"
    here, there = pair.first.caller(user), pair.second.caller(user)
    used = Used(name, made(there, "aes", name=name).id, here, there)
    ciphertext = there.crypto.Encrypt(cpb.EncryptRequest(key=name, plaintext=b"p")).ciphertext
    compromise(pair, used)
    request = cpb.DecryptRequest(ciphertext=ciphertext, allow_compromised=True, allow_revoked=allows_revoked)
    stop = pair.wire.stop_at(CHARGE)
    call = here.crypto.Decrypt.future(request, timeout=15)
    with pair.stopped_at(stop):
        change(pair, used)
    assert reason(call) == expected
    query = "SELECT event_details ->> 'use' FROM audit.security_events WHERE resource_id = %s AND action = 'decrypt'"
    query += " AND outcome = 'success'"
    assert pair.execute(query, used.id) == ([("process_revoked",)] if expected == "OK" else [])


def test_what_was_charged_before_the_process_was_stopped_is_given_out_though_the_key_was_revoked_since(
    pair: Pair, used: Used
) -> None:
    message = uuid4().bytes
    stop = pair.wire.stop_at(b"{OK}", "server")
    call = used.sign(message)
    with pair.stopped_at(stop):
        revoke(pair, used)
    assert reason(call) == "OK"
    assert uses_in_the_trail(pair, message) == 1


def test_a_process_stopped_with_its_batch_open_holds_up_no_other_key_and_no_revocation(pair: Pair, used: Used) -> None:
    other = made(used.there, "secp256k1", name=f"other-{used.name}").name
    message = uuid4().bytes
    # All of the batch but the end of its transaction arrives: its key is locked.
    stop = pair.wire.stop_at(CHARGE, keep_last=SYNC_BYTES)
    call = used.sign(message)
    with pair.stopped_at(stop):
        assert used.there.crypto.Sign(cpb.SignRequest(key=other, message=b"m"), timeout=5).signature
        same = used.there.crypto.Sign.future(cpb.SignRequest(key=used.name, message=b"m"), timeout=5)
        assert reason(same) == "STORE_UNAVAILABLE"
        revoke(pair, used)
    # It stood still for longer than it may wait for the ledger: either it says so, or what the ledger says now.
    assert reason(call) in ("KEY_REVOKED", "OUTCOME_UNKNOWN")
    assert uses_in_the_trail(pair, message) == 0


def test_a_process_stopped_in_a_move_holds_up_no_revocation(pair: Pair, used: Used) -> None:
    stop = pair.wire.stop_at(b"inactive", "server")  # the key as it is after the move
    call = used.here.keys.DeactivateKey.future(kpb.DeactivateKeyRequest(key=used.name), timeout=15)
    with pair.stopped_at(stop):
        began = time.monotonic()
        revoke(pair, used)
        assert time.monotonic() - began < 8
    assert reason(call) == "OK"
    history = pair.execute(
        "SELECT event_type FROM audit.domain_events WHERE aggregate_id = %s ORDER BY aggregate_version", used.id
    )
    assert history == [("key.created",), ("key.deactivated",), ("key.revoked",)]
