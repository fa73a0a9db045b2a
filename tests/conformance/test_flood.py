"""A flood of bad calls beside signing: they are refused and counted, and signing goes on."""

import statistics
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import psycopg
import pytest

from kms.domain.ids import UserId, identity_uri
from tests.conformance.crew import crew
from tests.conformance.driver import Job, started, told
from tests.conformance.requests import made
from tests.fixtures.server import DEPLOYMENT, Deployment

ROUNDS = 5
ROUND_SECONDS = 6.0
BAD_CALLS_A_SECOND = 1000


def job_of(deployment: Deployment, addresses: list[str], user: UserId) -> Job:
    issued = deployment.certificate(identity_uri(DEPLOYMENT, user))
    ca = (deployment.directory / "authority.crt").read_text()
    return Job(addresses, ca, issued.certificate.decode(), issued.key.decode(), "k", 8, False, ROUND_SECONDS)


def rates(signing: Job, flood: Job | None) -> tuple[float, float]:
    """Return signatures and refused bad calls a second."""
    with ThreadPoolExecutor(2) as pool:
        flooding = pool.submit(told, started(flood)) if flood is not None else None
        uses = pool.submit(told, started(signing)).result()
        refused = flooding.result() if flooding is not None else []
    assert {use.outcome for use in uses} == {"OK"}
    return len(uses) / ROUND_SECONDS, sum(use.outcome == "KEY_NOT_FOUND" for use in refused) / ROUND_SECONDS


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_signing_goes_on_beside_a_flood_of_bad_calls(deployment: Deployment) -> None:
    with deployment.serving() as server, crew(deployment, 2) as members:
        caller, flooder = server.caller(), deployment.new_user()
        made(caller, "secp256k1")
        addresses = [server.address, *(member.address for member in members)]
        signing = job_of(deployment, addresses, caller.user_id)
        flood = replace(job_of(deployment, addresses, flooder), bad_calls_a_second=BAD_CALLS_A_SECOND)
        rates(signing, None)
        measured = [(rates(signing, None), rates(signing, flood)) for _ in range(ROUNDS)]
        for (alone, _), (beside, refused) in measured:
            print(f"{alone:.0f} signatures/s alone, {beside:.0f}/s beside {refused:.0f} refusals/s: {beside / alone:.2f}")
    ratio = statistics.median(beside / alone for (alone, _), (beside, _) in measured)
    assert ratio >= 0.5
    query = """
        SELECT sum(coalesce((event_details ->> 'count')::int, 1)) FROM audit.security_events
        WHERE event_type = 'request.refused' AND user_id = %s
    """
    with psycopg.connect(deployment.database.admin_dsn) as connection:
        row = connection.execute(query, (flooder,)).fetchone()
    assert row is not None
    assert row[0] >= sum(refused for _, (_, refused) in measured) * ROUND_SECONDS * 0.99
