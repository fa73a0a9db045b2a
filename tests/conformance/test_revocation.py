"""What begins after RevokeKey has returned, or after a user was locked out, does not succeed at any process."""

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import psycopg
import pytest

from kms.dev.postgres import EmbeddedPostgres
from kms.v1 import crypto_pb2 as cpb
from kms.v1 import keys_pb2 as kpb
from tests.conformance.refusals import refusal, refusal_of
from tests.conformance.requests import made
from tests.fixtures.postgres import cloned
from tests.fixtures.server import Caller, RunningServer, deployed

AT_ONCE = 8
Two = tuple[RunningServer, RunningServer]


@pytest.fixture(scope="module")
def two(postgres: EmbeddedPostgres, token_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Two]:
    """Two processes of one deployment."""
    with (
        cloned(postgres) as database,
        deployed(tmp_path_factory.mktemp("two"), database, token_template) as deployment,
        deployment.serving() as one,
        deployment.serving() as other,
    ):
        yield one, other


def outcome(call: Any) -> str:  # noqa: ANN401  # a grpc future
    error = call.exception()
    return "OK" if error is None else refusal_of(error).reason


def trial(here: Caller, there: Caller, name: str) -> tuple[str, str]:
    """Revoke a key here while it is used there; return what became of the use under way, and of one begun after that."""
    made(here, "secp256k1", name=name)
    request = cpb.SignRequest(key=name, message=name.encode())
    under_way = there.crypto.Sign.future(request, timeout=30)
    here.keys.RevokeKey(kpb.RevokeKeyRequest(key=name, reason="a trial"), timeout=30)
    after = there.crypto.Sign.future(request, timeout=30)
    return outcome(under_way), outcome(after)


def check_trials(two: Two, number: int) -> None:
    one, other = two
    callers = [(here, other.caller(here.user_id)) for here in (one.caller() for _ in range(AT_ONCE // 2))]
    callers += [(there, here) for here, there in callers]  # revoked at each process, used at the other
    with ThreadPoolExecutor(AT_ONCE) as pool:

        def work(worker: int) -> list[tuple[str, str]]:
            here, there = callers[worker]
            return [trial(here, there, f"k-{worker}-{count}") for count in range(number // AT_ONCE)]

        told = [each for done in pool.map(work, range(AT_ONCE)) for each in done]
    under_way, after = Counter(use for use, _ in told), Counter(use for _, use in told)
    print(f"{len(told)} trials; under way: {dict(under_way)}; begun after: {dict(after)}")
    assert set(after) == {"KEY_REVOKED"}
    assert set(under_way) <= {"OK", "KEY_REVOKED"}
    query = """
        SELECT count(*) FILTER (WHERE e.created_at > k.revoked_at), count(*)
        FROM audit.security_events AS e JOIN cryptography.keys AS k ON k.id = e.resource_id
        WHERE e.action = 'sign' AND e.outcome = 'success' AND k.user_id = ANY (%s)
    """
    with psycopg.connect(one.deployment.database.admin_dsn) as connection:
        users = list({here.user_id for here, _ in callers})
        assert connection.execute(query, (users,)).fetchone() == (0, under_way["OK"])


def test_no_use_begun_after_a_revocation_has_returned_succeeds_at_another_process(two: Two) -> None:
    check_trials(two, 160)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_use_of_10000_begun_after_a_revocation_has_returned_succeeds_at_another_process(two: Two) -> None:
    check_trials(two, 10_000)


@pytest.mark.parametrize("change", ["locked_until = 'tomorrow'", "deleted_at = now()"])
def test_no_use_begun_after_a_user_was_locked_or_deleted_succeeds_at_any_process(two: Two, change: str) -> None:
    one, other = two
    here = one.caller()
    there = other.caller(here.user_id)
    made(here, "aes")
    request = cpb.EncryptRequest(key="k", plaintext=b"p")
    callers = (here, there)
    ciphertexts = [caller.crypto.Encrypt(request, timeout=20).ciphertext for caller in callers]
    with psycopg.connect(one.deployment.database.admin_dsn, autocommit=True) as connection:
        connection.execute(f"UPDATE authentication.users SET {change} WHERE id = %s".encode(), (here.user_id,))
    for caller in callers:
        for call, refused in (
            (caller.crypto.Encrypt, request),
            (caller.crypto.Decrypt, cpb.DecryptRequest(ciphertext=ciphertexts[0])),
        ):
            found = refusal(call, refused)
            assert (found.code, found.reason) == (grpc.StatusCode.UNAUTHENTICATED, "CREDENTIALS_INVALID")
