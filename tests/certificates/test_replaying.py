"""A backup is restored that is older than a revocation: the journal revokes again, and the record is the service's."""

import hmac
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest

from kms.certificates.certificate import Revocation, RevocationReason
from kms.certificates.postgres.replaying import renew_revoked
from kms.domain.errors import KmsError
from kms.store.epoch import Cause, begin_epoch
from kms.store.journal import read_journal
from kms.store.pool import Pool
from tests.certificates.stored_authority import StoredAuthority, stored_authority
from tests.fixtures.postgres import Database


@pytest.fixture
async def root(store: Pool, database: Database, tmp_path: Path) -> StoredAuthority:
    return await stored_authority(store, database, tmp_path)


def mac(data: bytes) -> bytes:
    """The MAC that the token of `StoredAuthority` makes."""
    return hmac.digest(b"key", data, "sha256")


async def test_a_certificate_that_the_journal_revokes_again_has_a_record_of_the_service(root: StoredAuthority) -> None:
    certificates = [certificate for certificate, _ in await root.issue(count=3)]
    revoked, planted, valid = certificates
    for each in (revoked, planted):
        rows = root.run("SELECT record_mac FROM cryptography.certificates WHERE id = %s", each.certificate_id)
        at = await root.certificates.now()
        assert await root.certificates.revoke(root.manager, each.revoked(Revocation(at, RevocationReason.KEY_COMPROMISE)))
        # As the backup has it.
        root.run(
            "UPDATE cryptography.certificates SET revocation_status = 'valid', revoked_at = NULL, revocation_reason = NULL, "
            "version = 2, record_mac = %s WHERE id = %s",
            rows[0][0],
            each.certificate_id,
        )
    root.run("UPDATE cryptography.certificates SET subject = 'CN=other' WHERE id = %s", planted.certificate_id)
    lines = read_journal(root.journal.path)
    with psycopg.connect(root.database.admin_dsn, autocommit=True) as connection:
        begin_epoch(connection, Cause.RECOVERED, lines, is_complete=True, mac=mac)
    subjects = {line.subject for line in lines} | {uuid4()}
    assert renew_revoked(root.database.admin_dsn, subjects, mac) == 1
    assert renew_revoked(root.database.admin_dsn, subjects, mac) == 0, "it may be done again"
    root.restart()
    found = await root.certificates.find_any(revoked.certificate_id)
    assert found is not None
    assert found.revocation is not None
    assert found.version == 3
    assert await root.certificates.find_any(valid.certificate_id) == valid
    with pytest.raises(KmsError, match="not as the service left it"):
        await root.certificates.find_any(planted.certificate_id)
