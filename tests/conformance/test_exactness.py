"""Limits are exact while workers are killed: at most N results are returned, all N can be, and each has its record.

A worker is killed only while all of them serve, so that a slow machine has as many results as a fast one. It only takes longer.
"""

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from itertools import chain

import psycopg
import pytest

from kms.domain.ids import UserId, identity_uri
from tests.conformance.driver import LIMIT_REACHED, Job, Use, started, told
from tests.conformance.requests import create
from tests.fixtures.server import DEPLOYMENT, Deployment, RunningServer

WORKERS = 3
SERVING_SECONDS = 300.0  # until a killed worker serves again, also on a machine that does much else


@dataclass(frozen=True, slots=True)
class Load:
    """How many clients each of how many processes has, and how many workers at most are killed beside them.

    Half of the processes use a key without `request_id`, the others another key with it.
    """

    processes: int
    clients: int
    kills_max: int
    seconds_max: float


SHORT = Load(processes=2, clients=8, kills_max=3, seconds_max=600)
LONG = Load(processes=4, clients=16, kills_max=40, seconds_max=1800)


@dataclass(frozen=True, slots=True)
class Facts:
    """What the database holds of a key: its counter, and the digests of the messages in its records of success."""

    counter: int
    charged: Counter[str]


def facts(deployment: Deployment, key: str) -> Facts:
    with psycopg.connect(deployment.database.admin_dsn) as connection:
        found = connection.execute("SELECT id, usage_counter FROM cryptography.keys WHERE key_name = %s", (key,)).fetchone()
        assert found is not None
        query = """
            SELECT event_details ->> 'input_sha256' FROM audit.security_events
            WHERE resource_id = %s AND action = 'sign' AND outcome = 'success'
        """
        digests = connection.execute(query, (found[0],)).fetchall()
    return Facts(found[1], Counter(digest for (digest,) in digests))


def charged(deployment: Deployment, keys: Sequence[str]) -> int:
    """Return how often the keys were charged, all together."""
    return sum(facts(deployment, key).counter for key in keys)


def digests(uses: Sequence[Use]) -> set[str]:
    return {sha256(bytes.fromhex(use.message)).hexdigest() for use in uses}


def check(limit: int, repeats: bool, facts: Facts, uses: Sequence[Use]) -> None:
    """Compare what was told with what is durable."""
    received = [use for use in uses if use.outcome == "OK"]
    lost = [use for use in uses if use.is_lost]
    refused = [use for use in uses if use.outcome != "OK" and not use.is_lost]
    assert len({use.signature for use in received}) == len(received)
    assert facts.counter == facts.charged.total() == len(facts.charged) == limit
    assert digests(received) <= set(facts.charged)
    assert set(facts.charged) - digests(received) <= digests(lost)
    assert not set(facts.charged) & digests(refused)
    if repeats:
        assert len(received) == limit


def run(deployment: Deployment, limits: Sequence[int], load: Load) -> None:
    deployment.write_config(sessions_max=64)
    with deployment.serving("--workers", str(WORKERS)) as server:
        caller, killed = server.caller(), 0
        for limit in limits:
            names = {repeats: f"k-{limit}-{repeats}" for repeats in (False, True)}
            for name in names.values():
                request = create("secp256k1", name=name)
                request.max_usage_count = limit
                caller.keys.CreateKey(request, timeout=60, wait_for_ready=True)
            began, replaced = time.monotonic(), ended_workers(server)
            jobs = {repeats: job_of(server, caller.user_id, name, load, repeats=repeats) for repeats, name in names.items()}
            used, victims = driven(jobs, server, load, charged=partial(charged, deployment, list(names.values())), limit=limit)
            await_workers(server, without=victims)
            kills = ended_workers(server) - replaced
            killed += len(victims)
            seconds = time.monotonic() - began
            for repeats, uses in used.items():
                found = facts(deployment, names[repeats])
                outcomes = dict(Counter(use.outcome for use in uses))
                print(f"N = {limit}, request_id {repeats}: {outcomes}, charged {found.counter}, {kills} kills, {seconds:.0f} s")
                assert LIMIT_REACHED in outcomes
                check(limit, repeats, found, uses)
                # What the ended workers had in flight, and what was answered as unknown, is charged without a result. No more.
                unknown = sum(outcomes.get(each, 0) for each in ("DEADLINE_EXCEEDED", "OUTCOME_UNKNOWN"))
                assert found.counter - outcomes.get("OK", 0) <= kills * load.clients * load.processes // 2 + unknown
        assert killed > 0


def job_of(server: RunningServer, user: UserId, key: str, load: Load, *, repeats: bool) -> Job:
    """Return the job of one process."""
    issued = server.deployment.certificate(identity_uri(DEPLOYMENT, user))
    ca = (server.deployment.directory / "authority.crt").read_text()
    certificate, private_key = issued.certificate.decode(), issued.key.decode()
    return Job([server.address], ca, certificate, private_key, key, load.clients, repeats, load.seconds_max)


def driven(
    jobs: Mapping[bool, Job], server: RunningServer, load: Load, *, charged: Callable[[], int], limit: int
) -> tuple[dict[bool, list[Use]], set[int]]:
    """Run the clients and kill workers beside them; return the uses of each job and the pids of the killed workers.

    The kills are spread over the uses: the first follows the first use, each other the next part of what can be charged.
    """
    killed: set[int] = set()
    with ThreadPoolExecutor(load.processes) as pool:
        working = {name: [pool.submit(told, started(job)) for _ in range(load.processes // 2)] for name, job in jobs.items()}
        clients = [*chain(*working.values())]
        while len(killed) < load.kills_max and not done_within(clients, 0.05):
            serving = list(server.workers().keys() - killed)
            if len(serving) == WORKERS and charged() > len(jobs) * limit * len(killed) // load.kills_max:
                victim = random.choice(serving)
                os.kill(victim, signal.SIGKILL)
                killed.add(victim)
        return {name: [use for each in processes for use in each.result()] for name, processes in working.items()}, killed


def await_workers(server: RunningServer, *, without: set[int]) -> None:
    """Wait until all workers serve. Those in *without* do not count: a killed process is a child until it is waited for."""
    until = time.monotonic() + SERVING_SECONDS
    while len(server.workers().keys() - without) < WORKERS:
        assert time.monotonic() < until, server.log_file.read_text()
        time.sleep(0.05)


def ended_workers(server: RunningServer) -> int:
    """Return how many workers have ended and were replaced, whether they were killed by us or found stuck."""
    return server.log_file.read_text().count('"worker replaced"')


def done_within(working: "Sequence[Future[list[Use]]]", seconds: float) -> bool:
    until = time.monotonic() + seconds
    while not (is_done := all(each.done() for each in working)) and time.monotonic() < until:
        time.sleep(0.01)
    return is_done


@pytest.mark.timeout(1500)
def test_limits_are_exact_while_workers_are_killed(deployment: Deployment) -> None:
    run(deployment, [7, 1000], SHORT)


@pytest.mark.slow
@pytest.mark.timeout(8000)
def test_limits_of_up_to_20000_are_exact_while_workers_are_killed(deployment: Deployment) -> None:
    run(deployment, [1, 7, 1000, 20_000], LONG)
