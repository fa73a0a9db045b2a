"""Who is let in: the user that the client certificate names, and nobody else."""

import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import psycopg
import pytest
from cryptography import x509
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kms.domain.ids import UserId, identity_uri
from kms.pki.authority import issue_client, issue_crl, make_authority
from kms.rpc.bystanders import WATCHES_PER_USER_MAX
from kms.v1 import keys_pb2 as kpb
from tests.conformance.refusals import refusal, refusal_of
from tests.conformance.requests import made
from tests.fixtures.server import DEPLOYMENT, Caller, Deployment, RunningServer

NOBODY = UserId(uuid.UUID(int=7))
LIST = kpb.ListKeysRequest()


def is_refused(caller: Caller) -> bool:
    """Whether a call of *caller* fails."""
    try:
        caller.keys.ListKeys(LIST)
    except grpc.RpcError:
        return True
    return False


def eventually(condition: Callable[[], bool], seconds: float = 90.0) -> None:
    """Wait until *condition* holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition does not come true"
        time.sleep(0.05)


def admitted(connect: Callable[[], Caller]) -> Caller:
    """Connect until a handshake succeeds, and return the caller."""
    found: list[Caller] = []

    def is_admitted() -> bool:
        found.append(connect())
        return not is_refused(found[-1])

    eventually(is_admitted)
    return found[-1]


def test_without_a_client_certificate_there_is_no_connection(server: RunningServer) -> None:
    ca = (server.deployment.directory / "authority.crt").read_bytes()
    for credentials in (grpc.ssl_channel_credentials(ca), None):
        channel = grpc.secure_channel(server.address, credentials) if credentials else grpc.insecure_channel(server.address)
        with channel, pytest.raises(grpc.FutureTimeoutError):
            grpc.channel_ready_future(channel).result(timeout=1)


def test_a_certificate_of_another_authority_gives_no_connection(server: RunningServer, tmp_path: Path) -> None:
    user = server.deployment.new_user()
    other = make_authority(tmp_path, now=datetime.now(UTC))
    stranger = server.caller_with(issue_client(other, identity_uri(DEPLOYMENT, user), now=datetime.now(UTC)), user)
    with pytest.raises(grpc.FutureTimeoutError):
        grpc.channel_ready_future(stranger.channel).result(timeout=1)


@pytest.mark.parametrize(
    "uri",
    [
        identity_uri(DEPLOYMENT, NOBODY),
        identity_uri("other", NOBODY),
        "kms://test/user/",
        "https://example.invalid/",
        identity_uri(DEPLOYMENT, NOBODY).upper(),
    ],
)
def test_unknown_users_and_other_names_are_refused_all_alike(server: RunningServer, uri: str) -> None:
    found = refusal(server.caller_with(server.deployment.certificate(uri), NOBODY).keys.ListKeys, LIST)
    assert (found.code, found.reason) == (grpc.StatusCode.UNAUTHENTICATED, "CREDENTIALS_INVALID")
    assert found == refusal(server.caller(NOBODY).keys.ListKeys, LIST)


def test_who_is_not_admitted_is_recorded_by_address_with_whom_he_claims_to_be(server: RunningServer) -> None:
    claims = UserId(uuid.uuid4())
    request_id = f"stranger-{claims}"
    with pytest.raises(grpc.RpcError):
        server.caller(claims).keys.ListKeys(LIST, metadata=(("x-request-id", request_id),))
    query = """SELECT user_id, host(source_ip), action, outcome, event_details ->> 'claimed_user_id'
        FROM audit.security_events WHERE event_details ->> 'request_id' = %s"""
    deadline = time.monotonic() + 10
    found: list[Any] = []
    with psycopg.connect(server.deployment.database.admin_dsn, autocommit=True) as connection:
        while not found and time.monotonic() < deadline:
            time.sleep(0.05)
            found = connection.execute(query, (request_id,)).fetchall()
    assert found == [(None, "127.0.0.1", "ListKeys", "blocked", str(claims))]


@pytest.mark.parametrize("change", ["deleted_at = now()", "locked_until = now() + interval '1 hour'"])
def test_a_user_who_is_deleted_or_locked_is_refused_at_his_next_call(server: RunningServer, change: str) -> None:
    caller = server.caller()
    caller.keys.ListKeys(LIST)
    with psycopg.connect(server.deployment.database.admin_dsn, autocommit=True) as connection:
        connection.execute(f"UPDATE authentication.users SET {change} WHERE id = %s", (caller.user_id,))
    assert refusal(caller.keys.ListKeys, LIST).reason == "CREDENTIALS_INVALID"


def test_a_revoked_certificate_is_refused_on_the_connection_it_already_has(deployment: Deployment) -> None:
    crl_file = deployment.directory / "revoked.crl"
    crl_file.write_bytes(issue_crl(deployment.authority, [], now=datetime.now(UTC)))
    text = deployment.config_file.read_text().replace("[database]", 'client_crl_file = "revoked.crl"\n[database]')
    deployment.config_file.write_text(text)
    with deployment.serving() as server:
        caller = server.caller()
        caller.keys.ListKeys(LIST)
        user = deployment.new_user()
        issued = deployment.certificate(identity_uri(DEPLOYMENT, user))
        revoked = server.caller_with(issued, user)
        revoked.keys.ListKeys(LIST)
        serial = x509.load_pem_x509_certificate(issued.certificate).serial_number
        renewed = crl_file.with_suffix(".new")
        renewed.write_bytes(issue_crl(deployment.authority, [serial], now=datetime.now(UTC)))
        renewed.rename(crl_file)
        assert refusal(revoked.keys.ListKeys, LIST).reason == "CREDENTIALS_INVALID"
        caller.keys.ListKeys(LIST)


def test_an_authority_is_replaced_while_clients_call_and_none_is_refused(deployment: Deployment, tmp_path: Path) -> None:
    bundle = deployment.directory / "authority.crt"
    before = bundle.read_bytes()
    other = make_authority(tmp_path / "other", now=datetime.now(UTC))

    def trust(content: bytes) -> None:
        bundle.with_suffix(".new").write_bytes(content)
        bundle.with_suffix(".new").rename(bundle)

    with deployment.serving() as server:
        old = server.caller()
        new_user = deployment.new_user()
        issued = issue_client(other, identity_uri(DEPLOYMENT, new_user), now=datetime.now(UTC))
        old.keys.ListKeys(LIST)
        stopped = threading.Event()

        def call() -> int:
            calls = 0
            while not stopped.is_set() or not calls:
                old.keys.ListKeys(LIST, timeout=60)
                calls += 1
            return calls

        with ThreadPoolExecutor(1) as pool:
            calling = pool.submit(call)
            trust(b"nonsense")
            eventually(lambda: "server.client_ca_file" in server.seen("/readyz")[1])
            trust(before + (tmp_path / "other/authority.crt").read_bytes())
            new = admitted(lambda: server.caller_with(issued, new_user, ca=before))
            new.keys.ListKeys(LIST)
            stopped.set()
            assert calling.result() > 0
        trust((tmp_path / "other/authority.crt").read_bytes())
        eventually(lambda: is_refused(old))
        assert refusal(old.keys.ListKeys, LIST).reason == "CREDENTIALS_INVALID"
        new.keys.ListKeys(LIST)
        assert server.seen("/readyz") == (200, "ready\n")


def test_a_certificate_that_ends_is_refused_on_the_connection_it_already_has(server: RunningServer) -> None:
    user = server.deployment.new_user()
    for seconds in (3, 20, 60):  # on a slow machine it may end before the first call
        # A certificate of one day that began a day ago, less a few seconds.
        began = datetime.now(UTC) - timedelta(days=1) + timedelta(seconds=seconds)
        issued = issue_client(server.deployment.authority, identity_uri(DEPLOYMENT, user), now=began, days=1)
        caller = server.caller_with(issued, user)
        if not is_refused(caller):
            break
    eventually(lambda: is_refused(caller))
    assert refusal(caller.keys.ListKeys, LIST).reason == "CREDENTIALS_INVALID"


def test_health_and_reflection_ask_for_a_good_certificate_too_and_leave_room_for_calls(server: RunningServer) -> None:
    stranger = server.caller_with(server.deployment.certificate("https://example.invalid/"), NOBODY)
    stub: Any = health_pb2_grpc.HealthStub(stranger.channel)
    assert refusal(stub.Check, health_pb2.HealthCheckRequest()).reason == "CREDENTIALS_INVALID"
    with pytest.raises(grpc.RpcError) as caught:
        next(stub.Watch(health_pb2.HealthCheckRequest(), timeout=5))
    assert refusal_of(caught.value).reason == "CREDENTIALS_INVALID"

    caller = server.caller()
    watching: Any = health_pb2_grpc.HealthStub(caller.channel)
    streams = [watching.Watch(health_pb2.HealthCheckRequest(), timeout=20) for _ in range(WATCHES_PER_USER_MAX)]
    for stream in streams:
        assert next(stream).status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.RpcError) as caught:
        next(watching.Watch(health_pb2.HealthCheckRequest(), timeout=5))
    assert refusal_of(caught.value).reason == "RATE_LIMITED"
    caller.keys.ListKeys(LIST)
    watching.Check(health_pb2.HealthCheckRequest())
    for stream in streams:
        stream.cancel()


def test_one_user_has_so_many_calls_in_flight_and_another_is_not_touched(deployment: Deployment) -> None:
    text = deployment.config_file.read_text().replace("call_seconds_max = 20", "call_seconds_max = 20\ncalls_per_user_max = 2")
    deployment.config_file.write_text(text)
    with deployment.serving() as server:
        busy, other = server.caller(), server.caller()
        for name in ("k0", "k1"):
            made(busy, "ed25519", name=name)
        with psycopg.connect(deployment.database.admin_dsn) as admin:
            # Two moves wait for the locks of their keys, for as long as we like.
            admin.execute("SELECT FROM cryptography.keys WHERE user_id = %s FOR UPDATE", (busy.user_id,))
            moves = [kpb.DeactivateKeyRequest(key=name) for name in ("k0", "k1")]
            slow = [busy.keys.DeactivateKey.future(move, timeout=60) for move in moves]
            found = None
            while found is None and not all(call.done() for call in slow):
                time.sleep(0.05)
                try:
                    busy.keys.ListKeys(LIST)
                except grpc.RpcError as error:
                    found = refusal_of(error)
            assert found is not None
            assert (found.code, found.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "RATE_LIMITED")
            other.keys.ListKeys(LIST)
        for call in slow:
            call.exception()  # waits; a machine that stalled may have kept the locks too long
        busy.keys.ListKeys(LIST)
    query = "SELECT DISTINCT user_id FROM audit.security_events WHERE event_details ->> 'reason' = 'RATE_LIMITED'"
    with psycopg.connect(deployment.database.admin_dsn) as connection:
        assert connection.execute(query).fetchall() == [(busy.user_id,)], "who is crowded out by himself is no stranger"
