"""The roles that a backup speaks of, made in the cluster that it is restored to. Passwords are not in a backup."""

from typing import Any, Final

import psycopg
from psycopg import errors as pg
from psycopg import sql
from psycopg.rows import class_row

from kms.store.backup_catalog import Membership, Role
from kms.store.errors import unavailable

FIND_ROLE: Final = """
    SELECT rolname::text AS name, rolcanlogin AS may_log_in, rolsuper AS is_superuser, rolbypassrls AS bypasses_row_security,
        rolcreaterole AS makes_roles, rolcreatedb AS makes_databases, rolreplication AS replicates, rolinherit AS inherits
    FROM pg_roles
    WHERE rolname = %(name)s
"""
FIND_MEMBERSHIP: Final = """
    SELECT pg_get_userbyid(roleid)::text AS role, pg_get_userbyid(member)::text AS member, bool_or(inherit_option) AS inherits,
        bool_or(set_option) AS may_set, bool_or(admin_option) AS may_grant
    FROM pg_auth_members
    WHERE roleid = to_regrole(quote_ident(%(role)s)) AND member = to_regrole(quote_ident(%(member)s))
    GROUP BY 1, 2
"""
_POWERS: Final = {
    "is_superuser": "SUPERUSER",
    "bypasses_row_security": "BYPASSRLS",
    "makes_roles": "CREATEROLE",
    "makes_databases": "CREATEDB",
    "replicates": "REPLICATION",
}


def make_roles(connection: psycopg.Connection[Any], roles: tuple[Role, ...], memberships: tuple[Membership, ...]) -> list[str]:
    """Make the roles that are missing, with their memberships, all or none; return the names of those that were made.

    Raises STORE_UNAVAILABLE for a role that exists with more power than it had, and for a missing superuser, which is not made
    from a file.
    """
    made = []
    with connection.transaction():
        for role in roles:
            found = connection.cursor(row_factory=class_row(Role)).execute(FIND_ROLE, {"name": role.name}).fetchone()
            if found is None:
                _make(connection, role)
                made.append(role.name)
            else:
                _check_power(found, role)
        for membership in memberships:
            _join(connection, membership)
    return made


def _make(connection: psycopg.Connection[Any], role: Role) -> None:
    if role.is_superuser:
        raise unavailable(f'the superuser "{role.name}" owned a part of the database and is missing here: make that role first')
    words = [word if getattr(role, name) else f"NO{word}" for name, word in _POWERS.items()]
    words += ["LOGIN" if role.may_log_in else "NOLOGIN", "INHERIT" if role.inherits else "NOINHERIT"]
    options = sql.SQL(" ").join(map(_keyword, words))
    try:
        connection.execute(sql.SQL("CREATE ROLE {} {}").format(sql.Identifier(role.name), options))
    except pg.InsufficientPrivilege:
        raise unavailable(f'the role "{role.name}" is missing and this login may not make it: use a superuser') from None


def _check_power(found: Role, wanted: Role) -> None:
    powers = [word for name, word in _POWERS.items() if getattr(found, name) and not getattr(wanted, name)]
    powers += ["LOGIN"] if found.may_log_in and not wanted.may_log_in else []
    if powers:
        raise unavailable(f'the role "{found.name}" exists here and may do more than it did: {", ".join(powers)}')


def _join(connection: psycopg.Connection[Any], wanted: Membership) -> None:
    parameters = {"role": wanted.role, "member": wanted.member}
    found = connection.cursor(row_factory=class_row(Membership)).execute(FIND_MEMBERSHIP, parameters).fetchone()
    if found is None:
        options = {"INHERIT": wanted.inherits, "SET": wanted.may_set, "ADMIN": wanted.may_grant}
        words = sql.SQL(", ").join(
            sql.SQL("{} {}").format(_keyword(word), _keyword("TRUE" if value else "FALSE")) for word, value in options.items()
        )
        names = sql.Identifier(wanted.role), sql.Identifier(wanted.member)
        connection.execute(sql.SQL("GRANT {} TO {} WITH {}").format(*names, words))
    elif found.inherits > wanted.inherits or found.may_grant > wanted.may_grant or found.may_set > wanted.may_set:
        raise unavailable(f'"{wanted.member}" is a member of "{wanted.role}" here with more rights than it had')


def _keyword(word: str) -> sql.SQL:
    """Return one of the words of this module as SQL."""
    return sql.SQL(word)  # pyright: ignore[reportArgumentType]  # not literal in the type, but only ever a word written above
