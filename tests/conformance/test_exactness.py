"""Limits are exact while workers are killed: at most N results are had, all N can be, and each has its record."""

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


@dataclass(frozen=True, slots=True)
class Load:
    """How many clients each of how many processes has, and how often a worker is killed beside them, after the first use.

    Half of the processes use a key without `request_id`, the others another key with it.
    """

    processes: int
    clients: int
    seconds_between_kills: tuple[float, float]
    seconds_max: float


SHORT = Load(processes=2, clients=8, seconds_between_kills=(1.0, 2.5), seconds_max=60)
LONG = Load(processes=4, clients=16, seconds_between_kills=(2.0, 5.0), seconds_max=900)


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


def any_is_used(deployment: Deployment, keys: Sequence[str]) -> bool:
    """Whether one of the keys was charged."""
    return any(facts(deployment, key).counter for key in keys)


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
            began = time.monotonic()
            jobs = {repeats: job_of(server, caller.user_id, name, load, repeats=repeats) for repeats, name in names.items()}
            used, kills = driven(jobs, server, load, has_begun=partial(any_is_used, deployment, list(names.values())))
            killed += kills
            seconds = time.monotonic() - began
            for repeats, uses in used.items():
                found = facts(deployment, names[repeats])
                outcomes = dict(Counter(use.outcome for use in uses))
                print(f"N = {limit}, request_id {repeats}: {outcomes}, charged {found.counter}, {kills} kills, {seconds:.0f} s")
                assert LIMIT_REACHED in outcomes
                check(limit, repeats, found, uses)
                # What the killed workers had in flight, and no more, is charged without a result.
                assert found.counter - outcomes["OK"] <= kills * load.clients * load.processes // 2
        assert killed > 0


def job_of(server: RunningServer, user: UserId, key: str, load: Load, *, repeats: bool) -> Job:
    """Return the job of one process."""
    issued = server.deployment.certificate(identity_uri(DEPLOYMENT, user))
    ca = (server.deployment.directory / "authority.crt").read_text()
    certificate, private_key = issued.certificate.decode(), issued.key.decode()
    return Job([server.address], ca, certificate, private_key, key, load.clients, repeats, load.seconds_max)


def driven(
    jobs: Mapping[bool, Job], server: RunningServer, load: Load, *, has_begun: Callable[[], bool]
) -> tuple[dict[bool, list[Use]], int]:
    """Run the clients and kill workers beside them; return the uses of each job and how many workers were killed."""
    kills = 0
    with ThreadPoolExecutor(load.processes) as pool:
        working = {name: [pool.submit(told, started(job)) for _ in range(load.processes // 2)] for name, job in jobs.items()}
        clients = [*chain(*working.values())]
        # The first kill follows the first use, so that it falls among them however fast the machine is.
        while not has_begun() and not done_within(clients, 0):
            time.sleep(0.01)
        while not done_within(clients, 0):
            if serving := list(server.workers()):
                os.kill(random.choice(serving), signal.SIGKILL)
                kills += 1
            done_within(clients, random.uniform(*load.seconds_between_kills))
        return {name: [use for each in processes for use in each.result()] for name, processes in working.items()}, kills


def done_within(working: "Sequence[Future[list[Use]]]", seconds: float) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until and not all(each.done() for each in working):
        time.sleep(0.05)
    return all(each.done() for each in working)


@pytest.mark.timeout(180)
def test_limits_are_exact_while_workers_are_killed(deployment: Deployment) -> None:
    run(deployment, [7, 600], SHORT)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_limits_of_up_to_20000_are_exact_while_workers_are_killed(deployment: Deployment) -> None:
    run(deployment, [1, 7, 1000, 20_000], LONG)
