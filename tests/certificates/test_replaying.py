"""A backup is restored that is older than a revocation: the journal revokes again, and the record is the service's."""

import hmac
import json
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest

from kms.certificates.authority import AuthorityStatus
from kms.certificates.certificate import Certificate, CertificateFilter, CertificatePlace, Revocation, RevocationReason
from kms.certificates.postgres.replaying import hold_authorities, renew_revoked, told_authorities
from kms.domain.errors import KmsError
from kms.domain.permissions import Permission
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


_SNAPSHOT = "SELECT to_jsonb(a) FROM cryptography.certificate_authorities AS a"
_PUT_BACK = """
    DELETE FROM cryptography.certificate_authorities;
    INSERT INTO cryptography.certificate_authorities
    SELECT (jsonb_populate_record(NULL::cryptography.certificate_authorities, '{}'::jsonb)).*
"""


def restore(root: StoredAuthority, row: object) -> None:
    """Put an authority back as a backup has it, and begin an epoch."""
    root.run(f"SET session_replication_role = replica; {_PUT_BACK.format(json.dumps(row))}")
    lines = read_journal(root.journal.path)
    with psycopg.connect(root.database.admin_dsn, autocommit=True) as connection:
        number = begin_epoch(connection, Cause.RECOVERED, lines, is_complete=True, mac=mac).number
    told = told_authorities(lines)
    assert hold_authorities(root.database.admin_dsn, told, mac) == (root.authority_id,)
    assert hold_authorities(root.database.admin_dsn, told, mac) == (), "it may be done again"
    root.journal.see_epoch(number, uuid4(), at=datetime.now(UTC))
    root.restart()


async def test_nobody_issues_after_a_restore_from_an_authority_that_was_changed_since(root: StoredAuthority) -> None:
    issuer = root.user("issuer", Permission.CERTS_ISSUE)
    await root.let(issuer, "server")
    [(row,)] = root.run(_SNAPSHOT)
    before = await root.read()
    await root.authorities.change(root.manager, before.changed(issuers=()), "authority.changed", {})
    restore(root, row)
    held = await root.read()
    assert (held.status, held.issuers, held.self_service) == (AuthorityStatus.ACTIVE, (), ())
    assert held.version == before.version + 2
    await root.let(issuer, "server")
    assert (await root.read()).issuers == before.issuers, "its manager says anew who issues"


async def test_an_authority_that_was_disabled_is_disabled_after_a_restore(root: StoredAuthority) -> None:
    [(row,)] = root.run(_SNAPSHOT)
    disabled = (await root.read()).changed(status=AuthorityStatus.DISABLED)
    await root.authorities.change(root.manager, disabled, "authority.disabled", {})
    restore(root, row)
    assert (await root.read()).status is AuthorityStatus.DISABLED


async def test_a_row_that_comes_back_without_a_restore_is_refused_in_a_new_epoch_too(root: StoredAuthority) -> None:
    [(row,)] = root.run(_SNAPSHOT)
    await root.authorities.change(root.manager, (await root.read()).changed(self_service=("client",)), "authority.changed", {})
    root.journal.see_epoch(2, uuid4(), at=datetime.now(UTC))
    root.run(f"SET session_replication_role = replica; {_PUT_BACK.format(json.dumps(row))}")
    root.restart()
    with pytest.raises(KmsError, match="not as the service left it"):
        await root.read()


async def test_a_record_that_is_not_ours_keeps_no_other_from_a_list(root: StoredAuthority) -> None:
    one, planted, other = [certificate for certificate, _ in await root.issue(count=3)]
    root.run("UPDATE cryptography.certificates SET subject = 'CN=other' WHERE id = %s", planted.certificate_id)
    for limit in (1, 2, 10):
        listed, after = list[Certificate](), None
        while page := await root.certificates.page(root.manager.user, CertificateFilter(), after=after, limit=limit):
            listed += page
            after = CertificatePlace(page[-1].created_at, page[-1].certificate_id)
        assert listed == [other, one], f"at most {limit} at a time"
