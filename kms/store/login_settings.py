"""What a connection of the service decides about itself, and settings of the login that it does not accept.

PostgreSQL lets every role change its own password and the defaults of its own sessions (ADR 0010). Nothing prevents this:
neither grants nor event triggers apply to `ALTER ROLE`. So a session takes nothing from these defaults. It sets what its
statements depend on, and it ends where anything else came from its login.
"""

from collections.abc import Sequence
from typing import Any, Final

import structlog
from psycopg import AsyncConnection
from psycopg.rows import tuple_row

from kms.domain.errors import KmsError
from kms.store.errors import unavailable

# Names are qualified: until the first setting holds, a search path of the login decides what a plain name means.
OWN_SETTINGS: Final = """
    SELECT pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', false), pg_catalog.set_config('role', 'none', false),
        pg_catalog.set_config('row_security', 'on', false), pg_catalog.set_config('timezone', 'UTC', false),
        pg_catalog.set_config('synchronous_commit', 'on', false),
        pg_catalog.set_config('default_transaction_read_only', 'off', false),
        pg_catalog.set_config('default_transaction_isolation', 'read committed', false),
        pg_catalog.set_config('default_transaction_deferrable', 'off', false),
        pg_catalog.set_config('transform_null_equals', 'off', false),
        pg_catalog.set_config('array_nulls', 'on', false),
        pg_catalog.set_config('standard_conforming_strings', 'on', false),
        pg_catalog.set_config('bytea_output', 'hex', false), pg_catalog.set_config('datestyle', 'ISO, YMD', false),
        pg_catalog.set_config('intervalstyle', 'postgres', false), pg_catalog.set_config('extra_float_digits', '1', false)
"""
# The catalogue has what the next session would get. What this session got is in `pg_settings`, also if it was reset since.
LOGIN_SETTINGS: Final = """
    SELECT ARRAY(
        SELECT r.rolname || ': ' || split_part(setting, '=', 1)
        FROM pg_catalog.pg_db_role_setting AS s
            JOIN pg_catalog.pg_roles AS r ON r.oid = s.setrole
            CROSS JOIN unnest(s.setconfig) AS setting
        WHERE s.setdatabase IN (0, (SELECT d.oid FROM pg_catalog.pg_database AS d WHERE d.datname = current_database()))
            AND (
                r.rolname = session_user
                OR r.oid IN (
                    SELECT m.roleid
                    FROM pg_catalog.pg_auth_members AS m JOIN pg_catalog.pg_roles AS l ON l.oid = m.member
                    WHERE l.rolname = session_user
                )
            )
        UNION
        SELECT session_user || ': ' || g.name
        FROM pg_catalog.pg_settings AS g
        WHERE g.source IN ('user', 'database user')
        ORDER BY 1
    ) AS settings
"""
_LOG = structlog.get_logger("kms.store.login_settings")


async def take_own_settings(connection: AsyncConnection[Any]) -> None:
    """Set what the session's statements depend on, or close the connection and raise STORE_UNAVAILABLE.

    A login that has settings of its own is refused: see `refused_settings`.
    """
    cursor = connection.cursor(row_factory=tuple_row)
    await cursor.execute(OWN_SETTINGS)
    row = await (await cursor.execute(LOGIN_SETTINGS)).fetchone()
    if row is None or row[0]:
        await connection.close()
        raise refused_settings([] if row is None else row[0])


def refused_settings(settings: Sequence[str]) -> KmsError:
    """Return STORE_UNAVAILABLE for a login with *settings*, each `role: name`. It says what an operator has to run."""
    roles = sorted({setting.partition(":")[0] for setting in settings})
    remedy = " ".join(f"ALTER ROLE {role} RESET ALL;" for role in roles)
    names = ", ".join(settings)
    _LOG.error("the login has settings of its own: somebody with its password may have made them", settings=names)
    return unavailable(
        f"the login has settings of its own ({names}), which nobody but its holder or an administrator makes: find out who did, "
        f"and run as a superuser, also with IN DATABASE where it was given: {remedy}"
    )
