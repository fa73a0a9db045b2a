"""A service that is killed while it issues: each serial number is accounted for, issued or revoked."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import grpc
import psycopg
import pytest

from kms.app.records import Records
from kms.certificates.certificate import Issuance
from kms.certificates.jobs import Abandoning
from kms.certificates.postgres.certificates import StoredCertificates
from kms.store.pool import open_pool
from tests.conformance.certificates import issue_from, platform
from tests.conformance.test_rotation_kills import wait_for
from tests.fixtures.server import Deployment, RunningServer

# Where the database stops, and waits for a lock that the test holds.
STAND = "PERFORM pg_advisory_xact_lock(4711);"
STEPS = {
    "intent stored, not charged": ("settle", "\nBEGIN\n", f"\nBEGIN\n    {STAND}\n"),
    "signed and charged, outcome not begun": ("complete_certificate", "\nBEGIN\n", f"\nBEGIN\n    {STAND}\n"),
    "outcome not committed": ("complete_certificate", "RETURN 'OK';", f"{STAND} RETURN 'OK';"),
}
ALWAYS = "signed and charged, outcome not begun"
DEFINITION = "SELECT pg_get_functiondef(oid) FROM pg_proc WHERE pronamespace = 'cryptography'::regnamespace AND proname = %s"
STANDING = """
    SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'advisory'
        AND EXISTS (SELECT FROM cryptography.certificates WHERE issuance_status = 'intended')
"""
END = (
    "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = current_database() AND usename = 'kms_service'"
)


@pytest.mark.parametrize("step", [step if step == ALWAYS else pytest.param(step, marks=pytest.mark.slow) for step in STEPS])
async def test_a_certificate_whose_issuing_was_cut_off_is_revoked_and_was_never_handed_out(
    deployment: Deployment, step: str
) -> None:
    function, before, after = STEPS[step]
    with psycopg.connect(deployment.database.admin_dsn, autocommit=True) as admin:
        with pytest.raises(AssertionError), deployment.serving() as server:  # it does not end in good order
            kill_while_issuing(server, admin, function, before, after)
        states = "SELECT issuance_status, count(*) FROM cryptography.certificates GROUP BY 1"
        assert dict(admin.execute(states.encode()).fetchall()) == {"issued": 2, "intended": 1}

        async def mac(data: bytes) -> bytes:
            return deployment.macs.mac(data)

        async with open_pool(deployment.database.dsn, 2) as pool:
            certificates = StoredCertificates(pool, Records(mac, lambda: datetime.now(UTC)))
            [intent] = await certificates.without_outcome(0, 10)
            await Abandoning(certificates, seconds=0).abandon()
            found = await certificates.find_any(intent)
        assert found is not None
        assert (found.issuance, found.der) == (Issuance.ABANDONED, b"")
        assert found.revocation is not None
        assert dict(admin.execute(states.encode()).fetchall()) == {"issued": 2, "abandoned": 1}


def kill_while_issuing(
    server: RunningServer, admin: psycopg.Connection[tuple[object, ...]], function: str, before: str, after: str
) -> None:
    """Issue a certificate, and have the service killed while it issues another."""
    shop = platform(server)
    shop.issue()
    row = admin.execute(DEFINITION, (function,)).fetchone()
    assert row is not None
    definition = str(row[0])
    assert before in definition
    admin.execute("SELECT pg_advisory_lock(4711)")
    admin.execute(definition.replace(before, after, 1).encode())
    with ThreadPoolExecutor(1) as pool:
        issuing = pool.submit(issue_from, shop.issuer, shop.name)
        wait_for(lambda: admin.execute(STANDING.encode()).fetchone() != (0,))
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait(20)
        with pytest.raises(grpc.RpcError):
            issuing.result(60)
    admin.execute(END)
    admin.execute(definition.encode())
    admin.execute("SELECT pg_advisory_unlock(4711)")
