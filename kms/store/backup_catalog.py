"""What a database is made of: its objects with owners, rights and policies, its rows counted, the roles it speaks of.

Taken from the database that is dumped and from the one that is made of the dump, it must be the same.
"""
# ruff: noqa: S608  # queries are put together from literals alone: LiteralString, which basedpyright checks

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import psycopg
from psycopg import sql
from psycopg.rows import class_row

# An expression that was dumped and read again may come back with its casts of text elsewhere, and brackets around them.
_CASTS: Final = re.compile(r"::(character varying|text)(\[\])?|[()\s]")
# An empty search path: every name is written with its schema.
PLAIN_NAMES: Final = "SELECT set_config('search_path', '', false), set_config('timezone', 'UTC', false)"
_RIGHTS: Final = """
    SELECT string_agg(
        concat_ws(' ', grantee::regrole, privilege_type, is_grantable), ',' ORDER BY grantee::regrole::text, privilege_type
    ) FROM aclexplode"""
# Rights are compared as they count, not as they are stored: a NULL list is the default one.
OBJECTS: Final = f"""
    WITH schemas AS (
        SELECT oid, nspname, nspowner, nspacl FROM pg_namespace
        WHERE nspname !~ '^pg_' AND nspname <> 'information_schema'
    ), objects (kind, name, definition) AS (
        SELECT 'schema', nspname::text, concat_ws(
            ' ', nspowner::regrole,
            ({_RIGHTS}(coalesce(nspacl, acldefault('n', nspowner))))
        ) FROM schemas
        UNION ALL
        SELECT 'relation', c.oid::regclass::text, concat_ws(
            ' ', c.relkind, c.relowner::regrole, c.relrowsecurity, c.relforcerowsecurity, c.reloptions::text,
            pg_get_expr(c.relpartbound, c.oid), pg_get_partkeydef(c.oid),
            CASE WHEN c.relkind IN ('v', 'm') THEN pg_get_viewdef(c.oid) END,
            ({_RIGHTS}(coalesce(c.relacl, acldefault(CASE c.relkind WHEN 'S' THEN 's'::"char" ELSE 'r' END, relowner))))
        )
        FROM pg_class AS c JOIN schemas AS s ON s.oid = c.relnamespace
        WHERE c.relkind IN ('r', 'p', 'v', 'm', 'S')
        UNION ALL
        SELECT 'column', c.oid::regclass || '.' || a.attname, concat_ws(
            ' ', format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attidentity, a.attgenerated, a.attcollation::regcollation,
            pg_get_expr(d.adbin, d.adrelid), ({_RIGHTS}(coalesce(a.attacl, acldefault('c', c.relowner))))
        )
        FROM pg_class AS c
            JOIN schemas AS s ON s.oid = c.relnamespace
            JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
            LEFT JOIN pg_attrdef AS d ON d.adrelid = c.oid AND d.adnum = a.attnum
        WHERE c.relkind IN ('r', 'p', 'v', 'm')
        UNION ALL
        SELECT 'constraint', conrelid::regclass || '.' || conname, concat_ws(' ', pg_get_constraintdef(o.oid), convalidated)
        FROM pg_constraint AS o JOIN schemas AS s ON s.oid = o.connamespace
        WHERE conrelid <> 0 AND conparentid = 0
        UNION ALL
        SELECT 'index', indexrelid::regclass::text, concat_ws(' ', pg_get_indexdef(indexrelid), indisvalid)
        FROM pg_index JOIN pg_class AS c ON c.oid = indrelid JOIN schemas AS s ON s.oid = c.relnamespace
        UNION ALL
        SELECT 'trigger', tgrelid::regclass || '.' || tgname, concat_ws(' ', pg_get_triggerdef(t.oid), tgenabled)
        FROM pg_trigger AS t JOIN pg_class AS c ON c.oid = tgrelid JOIN schemas AS s ON s.oid = c.relnamespace
        WHERE NOT tgisinternal AND tgparentid = 0
        UNION ALL
        SELECT 'policy', polrelid::regclass || '.' || polname, concat_ws(
            ' ', polcmd, polpermissive,
            (SELECT string_agg(role::regrole::text, ',' ORDER BY role::regrole::text) FROM unnest(polroles) AS role),
            pg_get_expr(polqual, polrelid), '|', pg_get_expr(polwithcheck, polrelid)
        )
        FROM pg_policy JOIN pg_class AS c ON c.oid = polrelid JOIN schemas AS s ON s.oid = c.relnamespace
        UNION ALL
        SELECT 'function', p.oid::regprocedure::text, concat_ws(
            ' ', p.proowner::regrole, pg_get_functiondef(p.oid),
            ({_RIGHTS}(coalesce(p.proacl, acldefault('f', p.proowner))))
        )
        FROM pg_proc AS p JOIN schemas AS s ON s.oid = p.pronamespace
        WHERE p.prokind IN ('f', 'p')
        UNION ALL
        SELECT 'extension', extname, extversion FROM pg_extension
    )
    SELECT kind || ' ' || name AS name, definition FROM objects
"""
# What belongs to an extension is left out: its owner is whoever the server says.
OWNERS: Final = """
    WITH owned (class, oid, kind, name, owner) AS (
        SELECT 'pg_namespace'::regclass, oid, 'schema', nspname::text, nspowner FROM pg_namespace
        WHERE nspname !~ '^pg_' AND nspname NOT IN ('information_schema', 'public')
        UNION ALL
        SELECT 'pg_class'::regclass, oid, 'relation', oid::regclass::text, relowner FROM pg_class
        WHERE relkind IN ('r', 'p', 'v', 'm', 'S') AND relnamespace::regnamespace::text !~ '^(pg_|information_schema)'
        UNION ALL
        SELECT 'pg_proc'::regclass, oid, 'function', oid::regprocedure::text, proowner FROM pg_proc
        WHERE pronamespace::regnamespace::text !~ '^(pg_|information_schema)'
    )
    SELECT kind || ' ' || name, pg_get_userbyid(owner)::text
    FROM owned AS o
    WHERE NOT EXISTS (SELECT FROM pg_depend AS d WHERE d.classid = o.class AND d.objid = o.oid AND d.deptype = 'e')
"""
TABLES: Final = """
    SELECT n.nspname::text AS schema, c.relname::text AS name
    FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
    WHERE c.relkind = 'r' AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
    ORDER BY 1, 2
"""
PROPERTIES: Final = """
    SELECT d.datname::text AS name, pg_get_userbyid(d.datdba)::text AS owner, pg_encoding_to_char(d.encoding)::text AS encoding,
        d.datcollate::text AS lc_collate, d.datctype::text AS lc_ctype, d.datlocprovider::text AS locale_provider,
        ARRAY(
            SELECT ARRAY[CASE grantee WHEN 0 THEN 'PUBLIC' ELSE pg_get_userbyid(grantee)::text END, privilege_type]
            FROM aclexplode(coalesce(d.datacl, acldefault('d', d.datdba)))
            WHERE grantee <> d.datdba
            ORDER BY 1
        ) AS acl
    FROM pg_database AS d
    WHERE d.datname = current_database()
"""
# pg_shdepend leaves out the superuser of initdb, who owns things all the same.
_SPOKEN_OF: Final = """spoken_of AS (
        SELECT refobjid AS oid FROM pg_shdepend
        WHERE refclassid = 'pg_authid'::regclass
            AND (dbid = (SELECT oid FROM pg_database WHERE datname = current_database())
                OR classid = 'pg_database'::regclass AND objid = (SELECT oid FROM pg_database WHERE datname = current_database()))
        UNION SELECT datdba FROM pg_database WHERE datname = current_database()
        UNION SELECT relowner FROM pg_class WHERE relnamespace::regnamespace::text !~ '^(pg_|information_schema)'
    )
"""
ROLES: Final = f"""
    WITH {_SPOKEN_OF}
    SELECT rolname::text AS name, rolcanlogin AS may_log_in, rolsuper AS is_superuser, rolbypassrls AS bypasses_row_security,
        rolcreaterole AS makes_roles, rolcreatedb AS makes_databases, rolreplication AS replicates, rolinherit AS inherits
    FROM pg_roles JOIN spoken_of USING (oid)
    ORDER BY 1
"""
MEMBERSHIPS: Final = f"""
    WITH {_SPOKEN_OF}
    SELECT pg_get_userbyid(m.roleid)::text AS role, pg_get_userbyid(m.member)::text AS member,
        bool_or(m.inherit_option) AS inherits, bool_or(m.set_option) AS may_set, bool_or(m.admin_option) AS may_grant
    FROM pg_auth_members AS m
    WHERE m.roleid IN (SELECT oid FROM spoken_of) AND m.member IN (SELECT oid FROM spoken_of)
    GROUP BY 1, 2
    ORDER BY 1, 2
"""


@dataclass(frozen=True, slots=True)
class DatabaseProperties:
    """What pg_dump leaves to whoever makes the database. `acl` has pairs of grantee and privilege, the owner's left out."""

    name: str
    owner: str
    encoding: str
    lc_collate: str
    lc_ctype: str
    locale_provider: str
    acl: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Role:
    """A role of the cluster that the database speaks of, without its password."""

    name: str
    may_log_in: bool
    is_superuser: bool
    bypasses_row_security: bool
    makes_roles: bool
    makes_databases: bool
    replicates: bool
    inherits: bool


@dataclass(frozen=True, slots=True)
class Membership:
    """`member` is a member of `role`."""

    role: str
    member: str
    inherits: bool
    may_set: bool
    may_grant: bool


@dataclass(frozen=True, slots=True)
class Catalog:
    """The objects of a database by kind and name, each with a digest of its definition; and the rows of each table."""

    objects: Mapping[str, str]
    rows: Mapping[str, int]

    def differences(self, other: "Catalog") -> list[str]:
        """Return a phrase for each object and each number of rows in which *other*, made from this, differs."""
        found = [f"{name} is missing" for name in sorted(self.objects.keys() - other.objects.keys())]
        found += [f"{name} was not in it" for name in sorted(other.objects.keys() - self.objects.keys())]
        both = sorted(self.objects.keys() & other.objects.keys())
        found += [f"{name} is another" for name in both if self.objects[name] != other.objects[name]]
        tables = sorted(self.rows.keys() & other.rows.keys())
        return found + [
            f"{name} has {other.rows[name]} rows instead of {self.rows[name]}"
            for name in tables
            if self.rows[name] != other.rows[name]
        ]


def read_catalog(connection: psycopg.Connection[Any]) -> Catalog:
    """Return the catalog of the connection's database. It reads every row of every table once."""
    connection.execute(PLAIN_NAMES)
    objects = {name: _digest(name, definition) for name, definition in connection.execute(OBJECTS).fetchall()}
    rows = {}
    for schema, name in connection.execute(TABLES).fetchall():
        query = sql.SQL("SELECT count(*) FROM {}").format(sql.Identifier(schema, name))
        counted = connection.execute(query).fetchone()
        assert counted is not None  # noqa: S101  # count(*) gives a row
        rows[f"{schema}.{name}"] = int(counted[0])
    return Catalog(objects, rows)


def _digest(name: str, definition: str) -> str:
    text = definition if name.startswith("function ") else _CASTS.sub("", definition)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_owners(connection: psycopg.Connection[Any]) -> Mapping[str, str]:
    """Return who owns each schema, relation and function, by kind and name."""
    connection.execute(PLAIN_NAMES)
    return dict(connection.execute(OWNERS).fetchall())


def read_properties(connection: psycopg.Connection[Any]) -> DatabaseProperties:
    """Return what the database of the connection is, apart from its contents."""
    row = connection.execute(PROPERTIES).fetchone()
    assert row is not None  # noqa: S101  # there is a current database
    acl = tuple((str(grantee), str(privilege)) for grantee, privilege in row[-1])
    return DatabaseProperties(row[0], row[1], row[2], row[3], row[4], row[5], acl)


def read_roles(connection: psycopg.Connection[Any]) -> tuple[tuple[Role, ...], tuple[Membership, ...]]:
    """Return the roles that the database of the connection speaks of, and which of them is a member of which."""
    roles = connection.cursor(row_factory=class_row(Role)).execute(ROLES).fetchall()
    memberships = connection.cursor(row_factory=class_row(Membership)).execute(MEMBERSHIPS).fetchall()
    return tuple(roles), tuple(memberships)
