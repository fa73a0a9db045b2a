"""Authorities and certificates in a database whose owner is hostile: rows are edited, put back, exchanged and planted.

Whatever he writes, nobody gets a certificate whom the manager did not let have it, and no record is believed that is not ours.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, cast
from uuid import UUID, uuid4

import pytest

from kms.app.ports import Call
from kms.certificates.authority import AuthorityRef
from kms.certificates.certificate import Certificate, Issuance, Revocation, RevocationReason
from kms.certificates.issuer import Issuer
from kms.certificates.issuing import CertificateWish, Issuing
from kms.certificates.names import parse_names
from kms.certificates.profiles import BUILT_IN
from kms.domain.errors import KmsError, Reason
from kms.domain.permissions import Permission
from kms.store.pool import Pool
from tests.certificates.memory_authority import authority
from tests.certificates.stored_authority import StoredAuthority, stored_authority
from tests.conformance.certificates import csr
from tests.fixtures.postgres import Database

# What a hostile owner makes of each column. A column that is added later fails here until it has an edit.
AUTHORITY_EDITS: Final[Mapping[str, str]] = {
    "id": "gen_random_uuid()",
    "name": "'other'",
    "generation": "2",
    "manager_id": "%(user)s",
    "key_id": "%(key)s",
    "key_owner_id": "%(user)s",
    "parent_id": "id",
    "status": "'pending'",
    "subject": "'CN=other'",
    "path_length": "3",
    "certificate": "'\\x00'",
    "chain": "ARRAY['\\x00'::bytea]",
    "issuers": "ARRAY['%(user)s server']",
    "self_service": "ARRAY['client']",
    "base_url": "'http://evil.example.com'",
    "crl_shards": "1",
    "created_at": "created_at - interval '1 s'",
    "not_after": "not_after + interval '1 year'",
    "superseded_at": "now()",
    "version": "version + 1",
    "record_mac": "sha256('')",
}
CERTIFICATE_EDITS: Final[Mapping[str, str]] = {
    "id": "gen_random_uuid()",
    "user_id": "%(user)s",
    "key_id": "%(key)s",
    "certificate_data": "'AAAA'",
    "issuer": "'CN=other'",
    "subject": "'CN=other'",
    "serial_number": "'ff'",
    "not_before": "not_before - interval '1 s'",
    "not_after": "not_after + interval '1 year'",
    "is_ca_certificate": "TRUE",
    "revocation_status": "'revoked', revoked_at = now(), revocation_reason = 1",
    "revoked_at": "now(), revocation_status = 'revoked', revocation_reason = 1",
    "revocation_reason": "1, revocation_status = 'revoked', revoked_at = now()",
    "created_at": "created_at - interval '1 s'",
    "issuer_id": "%(other)s",
    "profile": "'client'",
    "issuance_status": "'intended', certificate_data = '', fingerprint = NULL",
    "names": "ARRAY['dns:evil.example.com']",
    "tbs_sha256": "sha256('')",
    "superseded_at": "now()",
    "replaces": "id",
    "requested_by": "%(user)s",
    "crl_shard": "1",
    "version": "version + 1",
    "record_mac": "sha256('')",
}
# These follow from others: the form in which the certificate is stored, and the hash of what is stored.
NOT_PROVEN: Final = {"certificate_type", "fingerprint"}


@pytest.fixture
async def root(store: Pool, database: Database, tmp_path: Path) -> StoredAuthority:
    root = await stored_authority(store, database, tmp_path, memory=authority(now=datetime.now(UTC)))
    [(leaf, _)] = await root.issue()
    own = replace(leaf, certificate_id=uuid4(), serial_number=1, der=b"", issuance=Issuance.INTENDED, version=1)
    await root.certificates.add(None, own, await root.read())
    await root.certificates.complete(None, own.issued(root.memory.der))
    return root


def columns(root: StoredAuthority, table: str) -> set[str]:
    query = "SELECT column_name FROM information_schema.columns WHERE table_schema = 'cryptography' AND table_name = %s"
    return {name for (name,) in root.run(query, table)}


async def edited(root: StoredAuthority, table: str, row_id: UUID, column: str, edit: str) -> None:
    """Write *edit* into a column of a row, with every constraint and trigger out of the way."""
    user = root.user(f"mallory-{uuid4()}").user.user_id
    [(key, other)] = root.run("SELECT gen_random_uuid(), gen_random_uuid()")
    for name, value in (("user", user), ("key", key), ("other", other)):
        edit = edit.replace(f"'%({name})s", f"'{value}").replace(f"%({name})s", f"'{value}'")
    root.run(f"SET session_replication_role = replica; UPDATE cryptography.{table} SET {column} = {edit} WHERE id = '{row_id}'")


def issuing(root: StoredAuthority) -> Issuing:
    async def random(count: int) -> bytes:
        return uuid4().bytes + bytes(count - 16)

    issuer = Issuer(root.certificates, cast(Any, root.token), random)
    absent = cast(Any, None)
    return Issuing(root.authorities, root.certificates, issuer, absent, absent, BUILT_IN, "test")


async def ask(root: StoredAuthority, call: Call) -> Reason | None:
    """Ask for a certificate, and return the reason of the refusal."""
    wish = CertificateWish(AuthorityRef(name="root"), "server", csr(), None, names=parse_names(["dns:www.example.com"]))
    try:
        await issuing(root).issue(call, wish, None)
    except KmsError as error:
        return error.reason
    return None


async def test_no_column_of_an_authority_is_believed_without_its_mac(root: StoredAuthority) -> None:
    assert columns(root, "certificate_authorities") == set(AUTHORITY_EDITS)
    issuer = root.user("issuer", Permission.CERTS_ISSUE)
    await root.let(issuer, "server")
    assert await ask(root, issuer) is None
    signatures = root.token.signatures
    rows_before = snapshot(root, "certificate_authorities")
    for column, edit in AUTHORITY_EDITS.items():
        await edited(root, "certificate_authorities", root.authority_id, column, edit)
        root.restart()
        refused = await ask(root, issuer)
        expected = {Reason.RECORD_INVALID} if column != "name" else {Reason.AUTHORITY_NOT_FOUND}
        assert refused in expected, (column, refused)
        put_back(root, "certificate_authorities", rows_before)
    assert root.token.signatures == signatures, "nothing was signed"
    root.restart()
    assert await ask(root, issuer) is None, "the row is as it was"


def snapshot(root: StoredAuthority, table: str) -> list[Mapping[str, Any]]:
    """Return the rows of a table."""
    return [row for (row,) in root.run(f"SELECT to_jsonb(t) FROM cryptography.{table} AS t")]


def put_back(root: StoredAuthority, table: str, rows: list[Mapping[str, Any]]) -> None:
    """Put the rows of a table back as they were, whatever became of them."""
    text = json.dumps(rows).replace("'", "''")
    root.run(
        f"SET session_replication_role = replica; DELETE FROM cryptography.{table};"
        f"INSERT INTO cryptography.{table} SELECT * FROM jsonb_populate_recordset(NULL::cryptography.{table}, '{text}')"
    )


async def read(root: StoredAuthority, certificate: Certificate) -> Reason | None:
    """Read a certificate, and return the reason of the refusal, None where it is not there."""
    try:
        assert await root.certificates.find_any(certificate.certificate_id) is None
    except KmsError as error:
        return error.reason
    return None


async def test_no_column_of_a_certificate_is_believed_without_its_mac(root: StoredAuthority) -> None:
    assert columns(root, "certificates") == set(CERTIFICATE_EDITS) | NOT_PROVEN
    [(certificate, _)] = await root.issue()
    rows_before = snapshot(root, "certificates")
    for column, edit in CERTIFICATE_EDITS.items():
        await edited(root, "certificates", certificate.certificate_id, column, edit)
        root.restart()
        assert await read(root, certificate) is (None if column == "id" else Reason.RECORD_INVALID), column
        put_back(root, "certificates", rows_before)
    root.restart()
    assert await root.certificates.find_any(certificate.certificate_id) == certificate


async def test_an_issuer_who_was_let_go_does_not_come_back_with_an_old_record(root: StoredAuthority) -> None:
    issuer = root.user("issuer", Permission.CERTS_ISSUE)
    await root.let(issuer, "server")
    rows_before = snapshot(root, "certificate_authorities")
    before = await root.read()
    await root.authorities.change(root.manager, before.changed(issuers=()), "authority.changed", {})
    assert await ask(root, issuer) is Reason.PERMISSION_DENIED
    put_back(root, "certificate_authorities", rows_before)
    for _ in range(2):
        assert await ask(root, issuer) is Reason.RECORD_INVALID, "the journal knows a later version"
        root.restart()
    assert root.token.signatures == 0


async def test_a_revoked_certificate_does_not_come_back_with_an_old_record(root: StoredAuthority) -> None:
    [(certificate, _)] = await root.issue()
    rows_before = snapshot(root, "certificates")
    revoked = certificate.revoked(Revocation(await root.certificates.now(), RevocationReason.KEY_COMPROMISE))
    assert await root.certificates.revoke(root.manager, revoked)
    assert await root.certificates.find_any(certificate.certificate_id) == revoked
    put_back(root, "certificates", rows_before)
    with pytest.raises(KmsError) as caught:
        await root.certificates.find_any(certificate.certificate_id)
    assert caught.value.reason is Reason.RECORD_INVALID


async def test_a_role_that_was_planted_opens_no_authority(root: StoredAuthority) -> None:
    mallory = root.user("mallory", *Permission)
    assert await ask(root, mallory) is Reason.PERMISSION_DENIED
    root.run(f"UPDATE cryptography.certificate_authorities SET issuers = ARRAY['{mallory.user.user_id} server']")
    assert await ask(root, mallory) is Reason.RECORD_INVALID
    assert root.token.signatures == 0


async def test_the_record_of_one_authority_is_no_record_of_another(root: StoredAuthority) -> None:
    """The owner of the database gives the row of another authority the name under which callers ask."""
    before = await root.read()
    mine = replace(before, authority_id=uuid4(), name="mine", manager_id=root.user("mallory").user.user_id, version=1)
    assert mine.authenticated_bytes() != before.authenticated_bytes()
    root.run("UPDATE cryptography.certificate_authorities SET name = 'renamed'")
    with pytest.raises(KmsError) as caught:
        await root.authorities.find(AuthorityRef(name="renamed"))
    assert caught.value.reason is Reason.RECORD_INVALID
