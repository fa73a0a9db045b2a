"""What the replay of a journal does to certificates and authorities, so that their rows are as the service would have left them.

The replay sets the columns of a revocation, so the MAC of such a row is still that of the row before. A row whose MAC is of
something else is left: it is refused (RECORD_INVALID), and a CRL lists it all the same, since the journal knows it.

Of a later change of an authority the journal has the version alone. Nobody issues from that authority until its manager has said
anew who does.
"""
# ruff: noqa: S608  # queries are put together from literals alone: LiteralString, which basedpyright checks

import hmac
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Final
from uuid import UUID

from psycopg.rows import dict_row

from kms.certificates.authority import AuthorityStatus
from kms.certificates.postgres.authorities import COLUMNS as AUTHORITY_COLUMNS
from kms.certificates.postgres.authorities import authority_of
from kms.certificates.postgres.certificates import COLUMNS, certificate_of
from kms.domain.errors import KmsError
from kms.store.backup import check_login_sees_all, connected
from kms.store.journal import Entry, Event, version_in
from kms.store.pool import connection_settings
from kms.store.renewed_macs import TokenMac

REVOKED: Final = f"""
    SELECT {COLUMNS} FROM cryptography.certificates WHERE id = ANY (%(ids)s::uuid[]) AND revocation_status = 'revoked'
    FOR NO KEY UPDATE
"""
RENEW: Final = """
    UPDATE cryptography.certificates SET version = %(version)s, record_mac = %(mac)s WHERE id = %(id)s
"""
AUTHORITIES: Final = f"""
    SELECT {AUTHORITY_COLUMNS} FROM cryptography.certificate_authorities WHERE id = ANY (%(ids)s::uuid[])
    FOR NO KEY UPDATE
"""
HOLD: Final = """
    UPDATE cryptography.certificate_authorities
    SET issuers = '{}', self_service = '{}', status = %(status)s, version = %(version)s, record_mac = %(mac)s
    WHERE id = %(id)s
"""
_DISABLED: Final = "authority.disabled"


@dataclass(frozen=True, slots=True)
class ToldAuthority:
    """What a journal tells of an authority: the last version, and whether it was disabled."""

    version: int
    is_disabled: bool


def told_authorities(journal: Iterable[Entry]) -> Mapping[UUID, ToldAuthority]:
    """Return what the lines of *journal* tell of authorities."""
    told: dict[UUID, ToldAuthority] = {}
    for line in journal:
        if line.event is Event.AUTHORITY_CHANGED:
            known = told.get(line.subject, ToldAuthority(0, is_disabled=False))
            is_disabled = known.is_disabled or _DISABLED in line.reason
            told[line.subject] = ToldAuthority(max(known.version, version_in(line)), is_disabled)
    return told


def hold_authorities(dsn: str, told: Mapping[UUID, ToldAuthority], mac: TokenMac) -> tuple[UUID, ...]:
    """Leave those authorities without issuers of which *told* knows a later version, and return their ids. It may be done again.

    One that was disabled is disabled again. A row that is not as the service left it is left: it is refused (RECORD_INVALID).
    Raises STORE_UNAVAILABLE.
    """
    held = list[UUID]()
    with connected(connection_settings(dsn)) as connection, connection.transaction():
        check_login_sees_all(connection)
        for row in connection.cursor(row_factory=dict_row).execute(AUTHORITIES, {"ids": list(told)}).fetchall():
            try:
                before = authority_of(row)
            except KmsError:
                continue
            known = told[before.authority_id]
            is_ours = hmac.compare_digest(mac(before.authenticated_bytes()), bytes(row["record_mac"]))
            if not is_ours or before.version >= known.version:
                continue
            status = AuthorityStatus.DISABLED if known.is_disabled else before.status
            after = replace(before, issuers=(), self_service=(), status=status, version=known.version + 1)
            parameters = {
                "id": after.authority_id,
                "status": status.value,
                "version": after.version,
                "mac": mac(after.authenticated_bytes()),
            }
            connection.execute(HOLD, parameters)
            held.append(after.authority_id)
    return tuple(held)


def renew_revoked(dsn: str, revoked: Iterable[UUID], mac: TokenMac) -> int:
    """Renew the MACs of those of *revoked* that the replay has changed, and return how many. It may be done again.

    Raises STORE_UNAVAILABLE.
    """
    renewed = 0
    with connected(connection_settings(dsn)) as connection, connection.transaction():
        check_login_sees_all(connection)
        for row in connection.cursor(row_factory=dict_row).execute(REVOKED, {"ids": list(revoked)}).fetchall():
            try:
                after = certificate_of(row)
            except KmsError:
                continue
            before = replace(after, revocation=None)
            if not hmac.compare_digest(mac(before.authenticated_bytes()), bytes(row["record_mac"])):
                continue
            after = replace(after, version=before.version + 1)
            parameters = {"id": after.certificate_id, "version": after.version, "mac": mac(after.authenticated_bytes())}
            connection.execute(RENEW, parameters)
            renewed += 1
    return renewed
