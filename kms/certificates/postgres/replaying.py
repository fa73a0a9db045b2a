"""The MACs of certificates that the replay of a journal has revoked: the row is as the service would have left it.

The replay sets the columns of a revocation, so the MAC of such a row is still that of the row before. A row whose MAC is of
something else is left: it is refused (RECORD_INVALID), and a CRL lists it all the same, since the journal knows it.
"""
# ruff: noqa: S608  # queries are put together from literals alone: LiteralString, which basedpyright checks

import hmac
from collections.abc import Iterable
from dataclasses import replace
from typing import Final
from uuid import UUID

from psycopg.rows import dict_row

from kms.certificates.postgres.certificates import COLUMNS, certificate_of
from kms.domain.errors import KmsError
from kms.store.backup import check_login_sees_all, connected
from kms.store.pool import connection_settings
from kms.store.renewed_macs import TokenMac

REVOKED: Final = f"""
    SELECT {COLUMNS} FROM cryptography.certificates WHERE id = ANY (%(ids)s::uuid[]) AND revocation_status = 'revoked'
    FOR NO KEY UPDATE
"""
RENEW: Final = """
    UPDATE cryptography.certificates SET version = %(version)s, record_mac = %(mac)s WHERE id = %(id)s
"""


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
