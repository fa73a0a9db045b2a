"""The database is cut off, stopped and killed under load: no result without a record, no charge that an answer denies."""

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from uuid import uuid4

import grpc
import psycopg
import pytest

from kms.dev.postgres import FAST_UNSAFE, EmbeddedPostgres, embedded_postgres
from kms.v1 import crypto_pb2 as cpb
from tests.conformance.refusals import refusal_of
from tests.conformance.requests import made
from tests.conformance.test_outages import soon
from tests.fixtures.clusters import Clusters, passable_directory
from tests.fixtures.postgres import Database, template_of
from tests.fixtures.server import Caller, RunningServer, deployed
from tests.fixtures.wire import CHARGE, Decision, Wire, wired

CLIENTS = 8
DEADLINE_SECONDS = 4.0
SETTINGS = {**FAST_UNSAFE, "synchronous_commit": "on"}
CUTS: tuple[Decision, ...] = ("cut", "cut after it arrived", "cut and it arrives late")
# The caller is told that nothing is known; whatever else refuses says that nothing was charged.
UNKNOWN = {"OUTCOME_UNKNOWN", "DEADLINE_EXCEEDED"}


@dataclass(slots=True)
class Load:
    """Clients that sign, each message once, until told to stop; it gathers what they were told, so it grows."""

    caller: Caller
    is_over: threading.Event = field(default_factory=threading.Event)
    told: list[tuple[str, str, float]] = field(default_factory=list)

    def work(self, _: int) -> None:
        """Sign until told to stop: each outcome with the digest of its message and how long it took."""
        while not self.is_over.is_set():
            message, began = uuid4().bytes, time.monotonic()
            outcome = "OK"
            try:
                self.caller.crypto.Sign(cpb.SignRequest(key="k", message=message), timeout=DEADLINE_SECONDS)
            except grpc.RpcError as error:
                outcome = refusal_of(error).reason or refusal_of(error).code.name
                time.sleep(0.02)
            self.told.append((outcome, sha256(message).hexdigest(), time.monotonic() - began))

    def await_results(self, number: int = 20) -> None:
        """Wait until so many more results are had."""
        enough = self._results() + number
        soon(lambda: self._results() >= enough)

    def _results(self) -> int:
        return sum(outcome == "OK" for outcome, _, _ in list(self.told))


def check(load: Load, database: Database) -> None:
    """Compare what was told with what is durable."""
    with psycopg.connect(database.admin_dsn) as connection:
        query = "SELECT event_details ->> 'input_sha256' FROM audit.security_events WHERE action = 'sign' AND outcome = 'success'"
        charged = Counter(digest for (digest,) in connection.execute(query).fetchall())
        counted = connection.execute(
            "SELECT usage_counter FROM cryptography.keys WHERE user_id = %s", (load.caller.user_id,)
        ).fetchone()
    assert counted == (charged.total(),)
    assert set(charged.values()) == {1}
    assert {digest for outcome, digest, _ in load.told if outcome == "OK"} <= set(charged)
    assert not {digest for outcome, digest, _ in load.told if outcome not in {"OK", *UNKNOWN}} & set(charged)
    assert set(charged) <= {digest for outcome, digest, _ in load.told if outcome in {"OK", *UNKNOWN}}
    assert max(seconds for _, _, seconds in load.told) < DEADLINE_SECONDS + 1
    assert {outcome for outcome, _, _ in load.told} <= {"OK", "STORE_UNAVAILABLE", *UNKNOWN}


def postmaster(postgres: EmbeddedPostgres) -> int:
    return int((postgres.directory / "data" / "postmaster.pid").read_text().split()[0])


@contextmanager
def stopped(postgres: EmbeddedPostgres) -> Iterator[None]:
    """Stand all processes of the server still within the block."""
    pid = postmaster(postgres)
    family = [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]
    try:
        for each in family:
            os.kill(each, signal.SIGSTOP)
        yield
    finally:
        for each in family:
            with suppress(ProcessLookupError):
                os.kill(each, signal.SIGCONT)


def trouble(postgres: EmbeddedPostgres, wire: Wire, load: Load, server: RunningServer) -> None:
    """Cut, stop and in the end kill the database; after each but the last, results are had again."""
    for decision in CUTS:
        load.await_results()
        stop = wire.stop_at(CHARGE)
        stop.wait()
        stop.decide(decision)
    load.await_results()
    with stopped(postgres):
        time.sleep(DEADLINE_SECONDS / 2)
    load.await_results()
    os.kill(postmaster(postgres), signal.SIGKILL)
    time.sleep(0.5)
    assert server.process.poll() is None


def run(clusters: Clusters, directory: Path, token_template: Path, rounds: int) -> None:
    with passable_directory() as home, ExitStack() as stack:
        clusters.copy_migrated(home)
        with embedded_postgres(home, SETTINGS) as postgres:
            database = template_of(postgres)
            wire, dsn = stack.enter_context(wired(database.dsn))
            through_wire = Database(database.name, dsn, database.admin_dsn)
            server = stack.enter_context(stack.enter_context(deployed(directory, through_wire, token_template)).serving())
            load = Load(server.caller())
            made(load.caller, "secp256k1")
            pool = stack.enter_context(ThreadPoolExecutor(CLIENTS))
            stack.callback(load.is_over.set)
            working = [pool.submit(load.work, number) for number in range(CLIENTS)]
            trouble(postgres, wire, load, server)
        for _ in range(rounds - 1):
            with embedded_postgres(home, SETTINGS) as postgres:
                trouble(postgres, wire, load, server)
        with embedded_postgres(home, SETTINGS):
            load.await_results()
            load.is_over.set()
            for each in working:
                each.result()
            print(Counter(outcome for outcome, _, _ in load.told))
            check(load, database)
            stack.close()


@pytest.mark.timeout(180)
def test_a_database_in_trouble_under_load_gives_no_result_without_a_record_and_denies_no_charge(
    clusters: Clusters, token_template: Path, tmp_path: Path
) -> None:
    run(clusters, tmp_path, token_template, rounds=1)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_database_in_trouble_again_and_again_gives_no_result_without_a_record(
    clusters: Clusters, token_template: Path, tmp_path: Path
) -> None:
    run(clusters, tmp_path, token_template, rounds=8)
