"""The matrix role × table × right of `schema/README.md`, and its diagram of the tables, from the catalog.

    python -m tests.store.access_matrix

writes both anew, after a migration that changes tables or rights.
"""

from pathlib import Path
from typing import Any

import psycopg

from kms.dev.postgres import temporary_postgres
from kms.store.migrate import migrate

README = Path(__file__).parents[2] / "schema" / "README.md"
BEGIN = "<!-- matrix: written by python -m tests.store.access_matrix -->"
END = "<!-- end of matrix -->"
BEGIN_DIAGRAM = "<!-- diagram: written by python -m tests.store.access_matrix -->"
END_DIAGRAM = "<!-- end of diagram -->"

_RIGHTS = b"""
    SELECT c.oid::regclass::text AS name, r.rolname::text AS role, a.attname::text AS attribute,
        has_column_privilege(r.oid, c.oid, a.attnum, 'SELECT'), has_column_privilege(r.oid, c.oid, a.attnum, 'INSERT'),
        has_column_privilege(r.oid, c.oid, a.attnum, 'UPDATE'), has_table_privilege(r.oid, c.oid, 'DELETE')
    FROM pg_class AS c
        JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
        CROSS JOIN pg_roles AS r
    WHERE c.relkind IN ('r', 'p', 'v', 'm') AND NOT c.relispartition
        AND c.relnamespace::regnamespace::text !~ '^(pg_|information_schema)'
        AND r.rolname = ANY ($1) AND r.oid <> c.relowner
    ORDER BY 1, 2, a.attnum
"""
_FUNCTIONS = b"""
    SELECT p.oid::regprocedure::text, CASE WHEN p.prosecdef THEN pg_get_userbyid(p.proowner)::text END,
        ARRAY(
            SELECT r.rolname::text FROM pg_roles AS r
            WHERE r.rolname = ANY ($1) AND r.oid <> p.proowner AND has_function_privilege(r.oid, p.oid, 'EXECUTE') ORDER BY 1
        )
    FROM pg_proc AS p
    WHERE NOT EXISTS (SELECT FROM pg_depend WHERE objid = p.oid AND deptype = 'e')
        AND p.pronamespace::regnamespace::text !~ '^(pg_|information_schema)'
    ORDER BY 1
"""
_ROLES = b"""
    SELECT rolname::text FROM pg_roles
    WHERE rolname ~ '^kms_' AND rolname <> 'kms_migrator' OR rolname ~ '_(users|runner)$'
    ORDER BY 1
"""

_COLUMNS = b"""
    SELECT n.nspname::text, c.relname::text, a.attname::text,
        CASE t.typcategory WHEN 'A' THEN substr(t.typname, 2) || '[]' ELSE t.typname::text END,
        k.is_primary IS TRUE, k.is_reference IS TRUE
    FROM pg_class AS c
        JOIN pg_namespace AS n ON n.oid = c.relnamespace
        JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
        JOIN pg_type AS t ON t.oid = a.atttypid
        LEFT JOIN LATERAL (
            SELECT bool_or(contype = 'p') AS is_primary, bool_or(contype = 'f') AS is_reference
            FROM pg_constraint WHERE conrelid = c.oid AND a.attnum = ANY (conkey)
        ) AS k ON TRUE
    WHERE c.relkind IN ('r', 'p') AND NOT c.relispartition AND n.nspname !~ '^(pg_|information_schema)'
    ORDER BY 1, 2, a.attnum
"""
_REFERENCES = b"""
    SELECT DISTINCT n.nspname::text, k.confrelid::regclass::text, k.conrelid::regclass::text,
        (
            SELECT string_agg(attname, ', ' ORDER BY attnum) FROM pg_attribute
            WHERE attrelid = k.conrelid AND attnum = ANY (k.conkey)
        )
    FROM pg_constraint AS k
        JOIN pg_class AS c ON c.oid = k.conrelid AND NOT c.relispartition
        JOIN pg_namespace AS n ON n.oid = c.relnamespace
    WHERE k.contype = 'f' AND k.conparentid = 0
    ORDER BY 1, 2, 3, 4
"""


def diagram(connection: psycopg.Connection[Any]) -> str:
    """Return the tables of the connection's database as one Mermaid diagram for each schema.

    Of a table of another schema that is referred to there is the name alone.
    """
    cursor = psycopg.RawCursor(connection)
    tables: dict[str, dict[str, list[str]]] = {}
    for schema, table, column, kind, is_primary, is_reference in cursor.execute(_COLUMNS).fetchall():
        keys = ", ".join(["PK"] * is_primary + ["FK"] * is_reference)
        tables.setdefault(schema, {}).setdefault(table, []).append(f"        {kind} {column} {keys}".rstrip())
    arrows: dict[str, list[str]] = {}
    for schema, target, source, columns in cursor.execute(_REFERENCES).fetchall():
        arrow = f'    {_entity(target)} ||--o{{ {_entity(source)} : "{columns}"'
        arrows.setdefault(schema, []).append(arrow)
    lines = []
    for schema, found in tables.items():
        lines += [f"### {schema}", "", "```mermaid", "erDiagram"]
        for table, columns in found.items():
            lines += [f"    {_entity(f'{schema}.{table}')} {{", *columns, "    }"]
        lines += [*arrows.get(schema, []), "```", ""]
    return "\n".join(lines).rstrip()


def _entity(table: str) -> str:
    return table.replace(".", "_")


def matrix(connection: psycopg.Connection[Any]) -> str:
    """Return the matrix of the connection's database as two Markdown tables."""
    cursor = psycopg.RawCursor(connection)
    roles = [row[0] for row in cursor.execute(_ROLES).fetchall()]
    columns: dict[tuple[str, str], list[tuple[str, list[bool]]]] = {}
    for table, role, attribute, *rights in cursor.execute(_RIGHTS, [roles]).fetchall():
        columns.setdefault((table, role), []).append((attribute, rights))
    lines = ["| table | role | SELECT | INSERT | UPDATE | DELETE |", "|---|---|---|---|---|---|"]
    for (table, role), found in columns.items():
        cells = [_cell(found, right) for right in range(3)] + ["yes" if found[0][1][3] else "–"]
        if cells != ["–"] * 4:
            lines.append(f"| `{table}` | `{role}` | {' | '.join(cells)} |")
    lines += ["", "| function | runs as | may be called by |", "|---|---|---|"]
    for function, definer, callers in cursor.execute(_FUNCTIONS, [roles]).fetchall():
        runs_as = f"`{definer}`" if definer else "its caller"
        lines.append(f"| `{function}` | {runs_as} | {', '.join(f'`{name}`' for name in callers) or '–'} |")
    return "\n".join(lines)


def _cell(found: list[tuple[str, list[bool]]], right: int) -> str:
    granted = [name for name, rights in found if rights[right]]
    withheld = [name for name, rights in found if not rights[right]]
    if not granted or not withheld:
        return "all" if granted else "–"
    return f"all but {', '.join(withheld)}" if len(withheld) < len(granted) else ", ".join(granted)


def replaced(text: str, begin: str, end: str, content: str) -> str:
    """Return the README's text with what stands between two marks replaced."""
    head, _, rest = text.partition(begin)
    return f"{head}{begin}\n\n{content}\n\n{end}{rest.partition(end)[2]}"


def main() -> None:
    """Write the matrix and the diagram into the README."""
    with temporary_postgres() as server:
        migrate(server.superuser_dsn())
        with psycopg.connect(server.superuser_dsn()) as connection:
            text = replaced(README.read_text(), BEGIN, END, matrix(connection))
            README.write_text(replaced(text, BEGIN_DIAGRAM, END_DIAGRAM, diagram(connection)))


if __name__ == "__main__":
    main()
