"""A flood of bad calls beside signing: they are refused and counted, and signing goes on."""

import statistics
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from uuid import uuid4

import grpc
import psycopg
import pytest

from kms.domain.ids import UserId, identity_uri
from kms.store.misses import MISSES_MAX, MISSES_PER_SECOND
from kms.v1 import crypto_pb2 as cpb
from kms.v1 import keys_pb2 as kpb
from tests.conformance.crew import crew
from tests.conformance.driver import Job, Use, started, told
from tests.conformance.refusals import refusal
from tests.conformance.refuser import refusal_seconds
from tests.conformance.requests import made
from tests.fixtures.server import DEPLOYMENT, Caller, Deployment, RunningServer

ROUNDS = 5
ROUND_SECONDS = 6.0
SIGNATURES_A_SECOND = 50
BAD_CALLS_A_SECOND = 1000
BARE_SECONDS = 204e-6  # of a core, for a bare call of gRPC, on the machine for which these rates are meant
REFUSED = ("KEY_NOT_FOUND", "RATE_LIMITED")


def job_of(deployment: Deployment, addresses: list[str], user: UserId) -> Job:
    issued = deployment.certificate(identity_uri(DEPLOYMENT, user))
    ca = (deployment.directory / "authority.crt").read_text()
    return Job(addresses, ca, issued.certificate.decode(), issued.key.decode(), "k", 8, False, ROUND_SECONDS)


def driven(signing: Job, flood: Job | None = None) -> tuple[list[Use], int]:
    """Return the signings and the number of refused bad calls."""
    with ThreadPoolExecutor(2) as pool:
        flooding = pool.submit(told, started(flood)) if flood is not None else None
        uses = pool.submit(told, started(signing)).result()
        bad = flooding.result() if flooding is not None else []
    assert {use.outcome for use in uses} == {"OK"}
    return uses, sum(use.outcome in REFUSED for use in bad)


def p99(uses: list[Use]) -> float:
    return sorted(use.seconds for use in uses)[len(uses) * 99 // 100]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_signing_keeps_its_rate_beside_a_flood_of_bad_calls(deployment: Deployment) -> None:
    """On a slower machine there is less of both, so that a bare server would have as much to do with the flood."""
    with deployment.serving() as server, crew(deployment, 2) as members:
        caller, flooder = server.caller(), deployment.new_user()
        made(caller, "secp256k1")
        addresses = [server.address, *(member.address for member in members)]
        whole_flood = replace(job_of(deployment, addresses, flooder), bad_calls_a_second=BAD_CALLS_A_SECOND)
        bare_seconds = refusal_seconds(deployment, lambda address: told(started(replace(whole_flood, addresses=[address]))))
        share = min(1.0, BARE_SECONDS / bare_seconds)
        assert share > 0.2, "this machine is too slow for these rates to say anything"
        print(f"a bare refusal takes {bare_seconds * 1e6:.0f} us here: {share:.2f} of the rates")
        flood = replace(whole_flood, bad_calls_a_second=round(BAD_CALLS_A_SECOND * share))
        signing = replace(
            job_of(deployment, addresses, caller.user_id), calls_a_second=max(1, round(SIGNATURES_A_SECOND * share))
        )
        driven(signing)
        measured = [(driven(signing)[0], *driven(signing, flood)) for _ in range(ROUNDS)]
    for alone, beside, refused in measured:
        print(
            f"{len(alone) / ROUND_SECONDS:.0f} signatures/s alone, p99 {p99(alone):.2f} s; {len(beside) / ROUND_SECONDS:.0f}/s "
            f"beside {refused / ROUND_SECONDS:.0f} refusals/s, p99 {p99(beside):.2f} s: {len(beside) / len(alone):.2f}"
        )
    assert statistics.median(len(beside) / len(alone) for alone, beside, _ in measured) >= 0.9
    assert max(p99(beside) for _, beside, _ in measured) < 2
    assert statistics.median(refused for _, _, refused in measured) >= 0.9 * flood.bad_calls_a_second * ROUND_SECONDS
    query = """
        SELECT sum(coalesce((event_details ->> 'count')::int, 1)) FROM audit.security_events
        WHERE event_type = 'request.refused' AND user_id = %s
    """
    with psycopg.connect(deployment.database.admin_dsn) as connection:
        row = connection.execute(query, (flooder,)).fetchone()
    assert row is not None
    assert row[0] >= sum(refused for _, _, refused in measured)


def exhaust(caller: Caller) -> int:
    """Name keys that are not there until they are no longer looked for; return how often they were."""
    looked_for = 0
    while (reason := refusal(caller.crypto.Sign, cpb.SignRequest(key=f"none-{uuid4()}", message=b"m")).reason) == "KEY_NOT_FOUND":
        looked_for += 1
    assert reason == "RATE_LIMITED"
    return looked_for


def test_keys_that_are_not_there_are_looked_for_so_often_and_all_else_goes_on(server: RunningServer, caller: Caller) -> None:
    mine, unused = made(caller, "ed25519", name="mine"), made(caller, "ed25519", name="unused")
    began = time.monotonic()
    looked_for = exhaust(caller)
    assert MISSES_MAX <= looked_for <= MISSES_MAX + (time.monotonic() - began) * MISSES_PER_SECOND
    for key in (mine.id, "mine"):
        exhaust(caller)
        caller.crypto.Sign(cpb.SignRequest(key=key, message=b"m"))
    exhaust(caller)
    assert refusal(caller.keys.GetKey, kpb.GetKeyRequest(key="none")).reason == "KEY_NOT_FOUND"
    exhaust(caller)
    made(caller, "ed25519", name="new")
    exhaust(caller)
    caller.crypto.Sign(cpb.SignRequest(key="new", message=b"m"))
    exhaust(caller)
    caller.keys.RevokeKey(kpb.RevokeKeyRequest(key=unused.id, reason="lost"))
    other = server.caller()
    assert refusal(other.crypto.Sign, cpb.SignRequest(key="none", message=b"m")).reason == "KEY_NOT_FOUND"


def test_a_key_that_a_server_has_not_seen_is_looked_for_as_long_as_its_owner_has_not_missed_too_often(
    deployment: Deployment,
) -> None:
    with deployment.serving() as one, deployment.serving() as other:
        here = one.caller()
        there = other.caller(here.user_id)
        destroyed = made(here, "ed25519", name="destroyed")
        change = "key_status = 'inactive', destroyed_at = now(), encrypted_private_key = ''"
        deployment.edit_keys(f"UPDATE cryptography.keys SET {change} WHERE id = %s", destroyed.id)
        seen = [made(here, "ed25519", name=name).id for name in ("by-name", "by-id")]
        unseen = [made(here, "ed25519", name=f"unseen-{number}").id for number in range(10)]
        there.crypto.Sign(cpb.SignRequest(key="by-name", message=b"m"))
        there.keys.GetKey(kpb.GetKeyRequest(key=seen[1]))
        assert refusal(there.crypto.Sign, cpb.SignRequest(key=destroyed.id, message=b"m")).reason == "KEY_DESTROYED"
        for key in (*seen, "by-name", "by-id"):
            exhaust(there)
            there.crypto.Sign(cpb.SignRequest(key=key, message=b"m"))
        exhaust(there)
        for key in (destroyed.id, "destroyed"):
            assert refusal(there.crypto.Sign, cpb.SignRequest(key=key, message=b"m")).reason == "KEY_DESTROYED"
        outcomes = Counter[str]()
        for key in unseen:
            exhaust(there)
            try:
                there.crypto.Sign(cpb.SignRequest(key=key, message=b"m"))
            except grpc.RpcError as error:
                outcomes[error.code().name] += 1
        assert outcomes["RESOURCE_EXHAUSTED"] > 0
        there.keys.RevokeKey(kpb.RevokeKeyRequest(key=unseen[0], reason="lost"))
