"""`kms serve --workers N`: several processes on one port, under a supervisor."""

import itertools
import json
import os
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import grpc
import psycopg
import pytest

from kms.dev.postgres import EmbeddedPostgres
from kms.v1 import crypto_pb2 as cpb
from kms.v1 import keys_pb2 as kpb
from kms.wiring.shared_port import reserved
from kms.wiring.supervisor import pause_seconds
from tests.conformance.requests import create, made
from tests.fixtures.postgres import cloned
from tests.fixtures.server import Caller, Deployment, RunningServer, children, deployed

WORKERS = 2
TRIES = 60  # of connections: that all of them go to one worker of two happens once in 2⁵⁹
STUCK_SECONDS = 3
LOW_LIMIT = 1000  # of descriptors, as many hosts have it
_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def crew(postgres: EmbeddedPostgres, token_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A service of two workers that the tests of this module share."""
    with (
        cloned(postgres) as database,
        deployed(tmp_path_factory.mktemp("crew"), database, token_template) as deployment,
        supervised(deployment) as server,
    ):
        yield server


@contextmanager
def supervised(deployment: Deployment) -> Iterator[RunningServer]:
    """Run the service with two workers, soon found stuck."""
    prepare(deployment)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (LOW_LIMIT, before[1]))  # what it inherits
    try:
        with deployment.serving("--workers", str(WORKERS)) as server:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
            yield server
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def prepare(deployment: Deployment) -> None:
    deployment.write_config(sessions_max=64)
    text = deployment.config_file.read_text()
    deployment.config_file.write_text(text.replace("[server]\n", f"[server]\nstuck_seconds = {STUCK_SECONDS}\n"))


def eventually(condition: Callable[[], bool], seconds: float = 100) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def answered_by(server: RunningServer, request_id: str) -> int:
    """Return the number of the worker that has logged the call."""
    found: list[int] = []

    def is_logged() -> bool:
        found.extend(line["worker"] for line in server.log() if line.get("request_id") == request_id)
        return bool(found)

    eventually(is_logged)
    return found[0]


def by_every_worker(server: RunningServer, caller: Caller, use: Callable[[Caller, tuple[tuple[str, str]]], object]) -> None:
    """Do *use* over connections of its own until every worker has done it."""
    seen: set[int] = set()
    for _ in range(TRIES):
        request_id = f"use-{next(_numbers)}"
        use(server.again(caller), (("x-request-id", request_id),))
        seen.add(answered_by(server, request_id))
        if len(seen) == WORKERS:
            return
    raise AssertionError(f"only {seen} answered")


def test_calls_are_spread_over_the_workers_and_each_has_the_keys_that_another_made(crew: RunningServer) -> None:
    caller = crew.caller()
    made(caller, "secp256k1", name="wrapped")
    caller.keys.CreateKey(create("aes", name="resident", custody=kpb.CUSTODY_RESIDENT), timeout=30)

    def use(again: Caller, metadata: tuple[tuple[str, str]]) -> None:
        again.crypto.Sign(cpb.SignRequest(key="wrapped", message=b"m"), timeout=20)
        again.crypto.Encrypt(cpb.EncryptRequest(key="resident", plaintext=b"p"), timeout=20, metadata=metadata)

    by_every_worker(crew, caller, use)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_worker_that_ends_or_is_stuck_is_replaced_while_the_others_serve(crew: RunningServer, how: signal.Signals) -> None:
    caller = crew.caller()
    eventually(lambda: len(crew.workers()) == WORKERS)
    victim, number = next(iter(crew.workers().items()))
    os.kill(victim, how)

    def is_replaced() -> bool:
        found = crew.workers()
        return victim not in found and number in found.values()

    eventually(is_replaced)
    made(caller, "ed25519")
    by_every_worker(
        crew, caller, lambda again, metadata: again.keys.ListKeys(kpb.ListKeysRequest(), timeout=20, metadata=metadata)
    )


@pytest.mark.slow
def test_a_service_without_any_worker_soon_has_one(deployment: Deployment) -> None:
    prepare(deployment)
    with deployment.serving("--workers", str(WORKERS)) as server:
        for _ in range(4):
            victims = server.workers()
            for victim in victims:
                os.kill(victim, signal.SIGKILL)
            eventually(lambda: bool(server.workers().keys() - victims.keys()))  # noqa: B023  # it is called at once
        told = (line[line.rindex("{") :] for line in server.log_file.read_text().splitlines() if "worker replaced" in line)
        pauses = [json.loads(line)["pause_seconds"] for line in told]
        assert min(pauses[-WORKERS:]) == 1  # of the last to end: the others may have seen him serve


@pytest.mark.slow
def test_a_service_without_any_worker_waits_for_a_token_that_is_away(deployment: Deployment) -> None:
    prepare(deployment)
    away = deployment.token.directory.with_name("away")
    with deployment.serving("--workers", str(WORKERS)) as server:
        deployment.token.directory.rename(away)
        victims = server.workers()
        for victim in victims:
            os.kill(victim, signal.SIGKILL)
        eventually(lambda: server.log_file.read_text().count("worker replaced") > 2 * WORKERS)
        assert not server.workers().keys() - victims.keys()
        away.rename(deployment.token.directory)
        eventually(lambda: len(server.workers().keys() - victims.keys()) == WORKERS)
        made(server.caller(), "ed25519")


def test_secrets_are_in_no_command_line_or_environment_and_the_supervisor_has_neither_token_nor_grpc(crew: RunningServer) -> None:
    deployment, supervisor = crew.deployment, crew.process.pid
    secrets = [deployment.token.pin_file.read_bytes(), (deployment.directory / "dsn").read_bytes()]
    for pid in (supervisor, *children(supervisor)):
        shown = inside(pid, "cmdline") + inside(pid, "environ")
        assert b"kms" in shown
        assert not [secret for secret in secrets if secret in shown]
    loaded = inside(supervisor, "maps")
    assert not [name for name in (b"softhsm", b"cygrpc", b"pkcs11", b"psycopg") if name in loaded]


def inside(pid: int, what: str) -> bytes:
    """Return what /proc shows of a process; nothing where not even root may look into others, as in a container."""
    try:
        return Path(f"/proc/{pid}/{what}").read_bytes()
    except PermissionError:
        return b""


def test_a_second_service_is_refused_the_port_of_several_workers(crew: RunningServer, deployment: Deployment) -> None:
    text = deployment.config_file.read_text().replace("127.0.0.1:0", crew.address, 1)  # that of [server]
    deployment.config_file.write_text(text)
    for options in ((), ("--workers", "2")):
        done = deployment.run("serve", *options)
        told = [line for line in done.stderr.splitlines() if line.startswith("kms: ")]
        assert (done.returncode, len(told), f"FILE: cannot listen on {crew.address}" in told[0]) == (1, 1, True), done.stderr


def test_stopping_ends_calls_in_flight_and_then_every_worker_whoever_gets_the_signal(deployment: Deployment) -> None:
    with supervised(deployment) as server:
        caller = server.caller()
        made(caller, "ed25519")
        with locked_keys(deployment):
            slow = caller.keys.GetKey.future(kpb.GetKeyRequest(key="k"), timeout=20)
            eventually(lambda: waits_for_a_lock(deployment))
            # As systemd and a terminal do it: every process gets it.
            for pid in (*children(server.process.pid), server.process.pid):
                os.kill(pid, signal.SIGTERM if pid != server.process.pid else signal.SIGINT)
            eventually(lambda: not lets_in(server, caller))
            assert not slow.done()
        assert slow.result().key.name == "k"
        assert server.process.wait(20) == 0
        ends = [line for line in server.log() if line.get("event") == "stopped"]
        assert sorted(line.get("worker", 0) for line in ends) == [0, 1, 2]


@pytest.mark.slow
def test_a_second_signal_does_not_wait_for_the_calls_in_flight(deployment: Deployment) -> None:
    with supervised(deployment) as server:
        caller = server.caller()
        made(caller, "ed25519")
        with locked_keys(deployment):
            slow = caller.keys.GetKey.future(kpb.GetKeyRequest(key="k"), timeout=20)
            eventually(lambda: waits_for_a_lock(deployment))
            server.process.send_signal(signal.SIGTERM)
            eventually(lambda: not lets_in(server, caller))
            server.process.send_signal(signal.SIGTERM)
            eventually(slow.done)
            assert slow.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
            assert server.process.wait(20) == 0


def waits_for_a_lock(deployment: Deployment) -> bool:
    """Whether a call has got as far as a lock that another session holds."""
    query = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    with psycopg.connect(deployment.database.admin_dsn) as connection:
        return connection.execute(query).fetchone() != (0,)


def lets_in(server: RunningServer, caller: Caller) -> bool:
    """Whether the service answers on a new connection. The call reads no key."""
    try:
        server.again(caller).crypto.GenerateRandom(cpb.GenerateRandomRequest(size_bytes=1), timeout=20)
    except grpc.RpcError as error:
        assert isinstance(error, grpc.Call)
        assert error.code() == grpc.StatusCode.UNAVAILABLE, error
        return False
    return True


@contextmanager
def locked_keys(deployment: Deployment) -> Iterator[None]:
    """Hold up every call that reads a key."""
    with psycopg.connect(deployment.database.admin_dsn) as connection:
        connection.execute("LOCK TABLE cryptography.keys IN ACCESS EXCLUSIVE MODE")
        yield


def test_workers_do_not_outlive_a_supervisor_that_is_killed(deployment: Deployment) -> None:
    with ExitStack() as stack:
        server = stack.enter_context(supervised(deployment))
        pids = children(server.process.pid)
        assert len(pids) == WORKERS
        server.process.kill()
        eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
        with pytest.raises(AssertionError):  # it has not ended with code 0
            stack.close()


def test_what_the_workers_refuse_to_start_with_is_told_once_and_as_one_process_tells_it(deployment: Deployment) -> None:
    prepare(deployment)
    with psycopg.connect(deployment.database.admin_dsn, autocommit=True) as connection:
        connection.execute(
            "DELETE FROM public.schema_migrations WHERE version = (SELECT max(version) FROM public.schema_migrations)"
        )
    alone, together = deployment.run("serve"), deployment.run("serve", "--workers", "3")
    assert "kms migrate" in together.stderr
    assert (together.returncode, together.stderr) == (alone.returncode, alone.stderr)


@pytest.mark.slow
def test_a_pin_that_is_wrong_is_tried_once(deployment: Deployment, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong-pin"
    wrong.write_text("not-the-pin-1234")
    wrong.chmod(0o400)
    deployment.write_config(sessions_max=64, pin_file=str(wrong))
    done = deployment.run("serve", "--workers", "3")
    assert done.returncode == 5
    assert done.stderr.count("kms: HSM_UNAVAILABLE: the HSM refuses the login") == 1, done.stderr


def test_more_workers_than_the_token_has_sessions_for_are_refused(deployment: Deployment) -> None:
    done = deployment.run("serve", "--workers", "3")
    assert done.returncode == 1
    assert "hsm.sessions_max: expected at least 27" in done.stderr


def test_crashes_in_a_row_are_met_with_longer_and_longer_pauses() -> None:
    crashes = (1, 2, 3, 4, 6, 7, 10_000)
    assert [pause_seconds(number, is_served=True) for number in crashes] == [0, 1, 2, 4, 16, 30, 30]
    assert [pause_seconds(number, is_served=False) for number in crashes] == [0, 1, 1, 1, 1, 1, 1]


def test_the_port_is_free_again_after_an_earlier_service(deployment: Deployment) -> None:
    with reserved("127.0.0.1:0") as address:
        port = int(address.rpartition(":")[2])
        with pytest.raises(OSError, match=f"cannot listen on {address}"), reserved(address):
            pass
        listening = socket.socket()
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listening.bind(("127.0.0.1", port))
        listening.listen()
        with socket.create_connection(("127.0.0.1", port)):
            listening.accept()[0].close()
        listening.close()
    with reserved(address) as found:
        assert found == address


def test_workers_publish_on_one_port(crew: RunningServer) -> None:
    lines = [line for line in crew.log() if line["event"] == "publishing"]
    assert {line["worker"] for line in lines} == set(range(1, WORKERS + 1))
    assert len({line["port"] for line in lines}) == 1
    with pytest.raises(HTTPError, match="404"):
        urlopen(crew.publishing_url, timeout=30)  # noqa: S310 - an address of the test's own server


def test_supervisor_and_workers_may_open_as_much_as_the_host_lets_them(crew: RunningServer) -> None:
    for pid in (crew.process.pid, *crew.workers()):
        soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        assert soft == hard > LOW_LIMIT


def test_one_address_shows_every_worker_and_those_that_replace_them(crew: RunningServer) -> None:
    def seen(name: str, **labels: str) -> dict[str, float]:
        """Return the samples of *name* with *labels*, by worker."""
        found = {}
        for (sample, given), value in crew.metrics().items():
            told = dict(given)
            number = told.pop("worker", "")
            if sample == name and told == labels:
                found[number] = value
        return found

    caller = crew.caller()
    made(caller, "ed25519")
    sign = {"method": "CryptoService/Sign", "code": "OK"}
    before = sum(seen("kms_calls_total", **sign).values())
    for _ in range(10):
        crew.again(caller).crypto.Sign(cpb.SignRequest(key="k", message=b"m"), timeout=20)
    assert sum(seen("kms_calls_total", **sign).values()) == before + 10
    assert set(seen("kms_ready")) == {"1", "2"}
    assert seen("kms_workers") == {"": 2.0}
    assert crew.seen("/readyz") == (200, "worker 1: ready\nworker 2: ready\n")
    assert crew.seen("/livez") == (200, "alive\n")
    killed, number = next(iter(crew.workers().items()))
    os.kill(killed, signal.SIGKILL)
    eventually(lambda: killed not in crew.workers() and number in crew.workers().values() and len(seen("kms_ready")) == 2)
