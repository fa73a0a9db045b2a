"""Each kind of edit in the audit tables by a superuser is found by the offline verifier, which has the public key alone."""

import asyncio
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import psycopg
import pytest

from kms.app import verifying
from kms.app.verifying import VerifyTrail
from kms.dev.postgres import EmbeddedPostgres
from kms.dev.softhsm import soft_token
from kms.domain.trail_check import Difference, NoteReader, judged
from kms.hsm.capabilities import Capabilities
from kms.hsm.token_hsm import open_hsm
from kms.store.checkpoint_file import CheckpointFile, finished_lines
from kms.store.pool import open_pool
from kms.store.sealed_trail import StoredSealedTrail
from tests.fixtures.postgres import Database
from tests.fixtures.softhsm import LABEL, settings_of
from tests.store.sealing import checked, copy_of, lines_of, sealing_of, write


@dataclass(frozen=True, slots=True)
class Sealed:
    """A database whose trail was sealed in three checkpoints, what was kept outside, and what reads it."""

    database: Database
    reader: NoteReader
    outside: tuple[bytes, ...]
    sizes: tuple[int, ...]


@pytest.fixture(scope="module")
def sealed(
    filled_database: Database,
    soft_template: Path,
    soft_capabilities: Capabilities,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Sealed]:
    directory = tmp_path_factory.mktemp("sealed")
    shutil.copytree(soft_template, directory / "token")
    token = soft_token(directory / "token", LABEL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "SOFTHSM2_CONF", token.environment["SOFTHSM2_CONF"])

        async def seal() -> Sealed:
            hsm = await open_hsm(settings_of(token), known=soft_capabilities)
            try:
                async with open_pool(filled_database.dsn, 2) as pool:
                    outside = CheckpointFile(directory / "checkpoints")
                    with psycopg.connect(filled_database.admin_dsn, autocommit=True) as admin:
                        admin.execute(EPOCH)
                        sealing = await sealing_of(pool, hsm, outside)
                        sizes = []
                        for number in range(3):
                            write(admin)
                            if number == 1:
                                admin.execute("SELECT authentication.create_service_user('auditee')")
                                admin.execute(FULL)
                            sizes.append(await sealing.seal())
                        write(admin, 1)
                    return Sealed(filled_database, sealing.key.reader, tuple(finished_lines(outside.path)), tuple(sizes))
            finally:
                await hsm.close()

        yield asyncio.run(seal())


# A row of each table that has a value in every column.
FULL: Final = b"""
    INSERT INTO audit.domain_events (
        aggregate_id, aggregate_type, aggregate_version, event_type, event_data, correlation_id, causation_id, initiated_by,
        processed_at, error_message
    ) VALUES (gen_random_uuid(), 'key', 1, 'full', '{"a": 1}', gen_random_uuid(), gen_random_uuid(), 'alice', now(), 'none');
    INSERT INTO audit.security_events (
        event_type, severity, user_id, session_id, source_ip, user_agent, resource_type, resource_id, action, outcome, risk_score,
        event_details
    )
    SELECT 'full', 'low', min(id::text)::uuid, gen_random_uuid(), '192.0.2.1', 'curl', 'key', gen_random_uuid(), 'sign',
        'success', 0, '{"n": 1}'
    FROM authentication.users
"""
# What jobs change, and nothing else.
NOT_PROVED: Final = {
    "security_events": frozenset[str](),
    "domain_events": frozenset({"processed_at", "processing_status", "retry_count", "error_message"}),
}
# Another value of a column, by its name or by its type.
OTHER: Final = {
    "severity": "'critical'",
    "outcome": "'failure'",
    "processing_status": "'processed'",
    "user_id": "(SELECT max(id::text)::uuid FROM authentication.users)",
    "uuid": "gen_random_uuid()",
    "character varying": "{column} || 'x'",
    "text": "{column} || 'x'",
    "bigint": "{column} + 1",
    "integer": "{column} + 1",
    "jsonb": "'{{\"other\": 2}}'",
    "inet": "'192.0.2.2'",
    "timestamp with time zone": "{column} + interval '1 microsecond'",
}
COLUMNS: Final = """
    SELECT column_name::text, data_type::text FROM information_schema.columns WHERE table_schema = 'audit' AND table_name = %s
"""
LINES: Final = "SELECT line FROM audit.trail_lines(0, '', '00000000-0000-0000-0000-000000000000', NULL, 1000)"
EPOCH: Final = b"INSERT INTO cryptography.epochs VALUES (1, 'FIRST_START', now(), NULL, 1, '00000001', 1)"
TABLES: Final = ("security_events", "domain_events")
COLUMN: Final = {"security_events": ("outcome", "blocked"), "domain_events": ("event_type", "forged")}
# A row in the middle of the second checkpoint.
ROW: Final = """(
    SELECT e.id FROM audit.{table} AS e
    WHERE e.commit_order >= (SELECT min(horizon) FROM audit.checkpoints) ORDER BY e.commit_order, e.id LIMIT 1 OFFSET 1
)"""
COPY: Final = {
    "security_events": """INSERT INTO audit.security_events (event_type, severity, commit_order)
        SELECT 'forged', 'low', commit_order FROM audit.security_events WHERE id = {row}""",
    "domain_events": """INSERT INTO audit.domain_events (
            aggregate_id, aggregate_type, aggregate_version, event_type, event_data, commit_order
        ) SELECT aggregate_id, 'key', 9, 'forged', '{{}}', commit_order FROM audit.domain_events WHERE id = {row}""",
}
ROW_EDITS: Final = {
    "changed": ("UPDATE audit.{table} SET {column} = '{value}' WHERE id = {row}", Difference.ROW_CHANGED),
    "given another place": (
        "UPDATE audit.{table} SET commit_order = (SELECT max(horizon) FROM audit.checkpoints) + 1000000 WHERE id = {row}",
        Difference.ROW_REMOVED,
    ),
    "removed": ("DELETE FROM audit.{table} WHERE id = {row}", Difference.ROW_REMOVED),
    "inserted": ("{copy}", Difference.ROW_INSERTED),
    "swapped": (
        """UPDATE audit.{table} AS e SET commit_order = o.commit_order
            FROM audit.{table} AS o
            WHERE e.id <> o.id AND (e.id = {row} OR o.id = {row})
                AND (e.id IN (SELECT id FROM audit.{table} ORDER BY commit_order DESC, id LIMIT 1 OFFSET 2)
                    OR o.id IN (SELECT id FROM audit.{table} ORDER BY commit_order DESC, id LIMIT 1 OFFSET 2))""",
        Difference.ROW_CHANGED,
    ),
    "moment changed": (
        "UPDATE audit.{table} SET {moment} = {moment} + interval '1 microsecond' WHERE id = {row}", Difference.ROW_CHANGED
    ),
    "truncated": (
        "DELETE FROM audit.{table} WHERE commit_order >= (SELECT min(horizon) FROM audit.checkpoints)", Difference.ROW_REMOVED
    ),
}  # fmt: skip
CHECKPOINT_EDITS: Final = {
    "its note changed": (
        "UPDATE audit.checkpoints SET note = replace(note, 'epoch 1', 'epoch 2') WHERE tree_size = {middle}",
        Difference.CHECKPOINT_CHANGED,
    ),
    "its note given to another": (
        """UPDATE audit.checkpoints SET note = (SELECT note FROM audit.checkpoints WHERE tree_size = {first})
            WHERE tree_size = {middle}""",
        Difference.ROW_INSERTED,
    ),
    "its horizon changed": (
        "UPDATE audit.checkpoints SET horizon = horizon - 1 WHERE tree_size = {middle}", Difference.ROW_REMOVED
    ),
    "removed": ("DELETE FROM audit.checkpoints WHERE tree_size = {middle}", Difference.CHECKPOINT_REMOVED),
    "the first removed": ("DELETE FROM audit.checkpoints WHERE tree_size = {first}", Difference.CHECKPOINT_REMOVED),
    "the last removed": ("DELETE FROM audit.checkpoints WHERE tree_size = {last}", Difference.CHECKPOINT_REMOVED),
    "all removed": ("DELETE FROM audit.checkpoints", Difference.CHECKPOINT_REMOVED),
}  # fmt: skip


EDITED: Final = ("audit.security_events", "audit.domain_events", "audit.checkpoints", "audit.archived_partitions")


@pytest.fixture(scope="module")
def copy(postgres: EmbeddedPostgres, sealed: Sealed) -> Iterator[Database]:
    """A copy of the sealed database to be edited, with what `edited` puts it back from."""
    with copy_of(postgres, sealed.database) as copy:
        with psycopg.connect(copy.admin_dsn) as admin:
            for table in TABLES:  # as whoever makes such an edit can
                admin.execute(f"ALTER TABLE audit.{table} DROP CONSTRAINT commit_order_of_a_transaction".encode())
                admin.execute(f"ALTER TABLE audit.{table} ALTER COLUMN commit_order DROP NOT NULL".encode())
            for table in EDITED:
                admin.execute(f"CREATE TABLE saved_{table.replace('.', '_')} AS TABLE {table}".encode())
        yield copy


def edited(copy: Database, sealed: Sealed, statement: str, after_size: int = 0) -> tuple[list[bytes], Any]:
    """Run a statement as the superuser and undo it; return the trail as it was exported, and what verifying it found."""

    async def look() -> tuple[list[bytes], Any]:
        async with open_pool(copy.dsn, 2) as pool:
            return await lines_of(copy.dsn, after_size), await VerifyTrail(StoredSealedTrail(pool), sealed.reader).verify()

    with psycopg.connect(copy.admin_dsn, autocommit=True) as admin:
        try:
            assert admin.execute(statement.encode()).rowcount > 0
            return asyncio.run(look())
        finally:
            with admin.transaction():
                admin.execute("SET LOCAL session_replication_role = replica")
                for table in EDITED:
                    admin.execute(f"DELETE FROM {table}".encode())
                    admin.execute(f"INSERT INTO {table} SELECT * FROM saved_{table.replace('.', '_')}".encode())


def test_a_trail_that_nobody_edited_verifies(copy: Database, sealed: Sealed) -> None:
    lines, online = edited(copy, sealed, "SELECT 1")
    report = checked(sealed.reader, lines, sealed.outside)
    assert (report.finding, report.verified_size, report.checkpoints, report.unsealed) == (None, sealed.sizes[-1], 3, 2)
    assert online == report == judged(report, 0, ())


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("edit", ROW_EDITS)
def test_an_edited_row_is_found(copy: Database, sealed: Sealed, table: str, edit: str) -> None:
    statement, difference = ROW_EDITS[edit]
    row, (column, value) = ROW.format(table=table), COLUMN[table]
    moment = "created_at" if table == "security_events" else "occurred_at"
    filled = statement.format(table=table, row=row, column=column, value=value, copy=COPY[table].format(row=row), moment=moment)
    lines, online = edited(copy, sealed, filled)
    finding = checked(sealed.reader, lines).finding
    assert finding is not None
    assert finding == online.finding
    assert (finding.difference, finding.after_size, finding.by_size) == (difference, *sealed.sizes[:2])


# Where no transaction puts a row: the table, the order, how many checkpoints lie before it.
OUT_OF_PLACE: Final = (("security_events", -5, 0), ("domain_events", -(2**63), 0), ("security_events", 2**62, 3),
    ("domain_events", 2**63 - 1, 3))  # fmt: skip


@pytest.mark.parametrize(("table", "order", "checkpoints"), OUT_OF_PLACE)
def test_a_row_of_an_order_that_no_transaction_has_is_found(
    copy: Database, sealed: Sealed, table: str, order: int, checkpoints: int
) -> None:
    copied = COPY[table].format(row=ROW.format(table=table)).replace("commit_order FROM", f"{order} FROM").replace("{{}}", "{}")
    lines, online = edited(copy, sealed, copied)
    finding = checked(sealed.reader, lines).finding
    assert finding is not None
    assert online.finding is not None
    # The messages name how far transactions were when each looked, and PostgreSQL's own processes have some, too.
    assert replace(finding, message="") == replace(online.finding, message="")
    assert (finding.difference, finding.after_size) == (Difference.ROW_INSERTED, (0, *sealed.sizes)[checkpoints])


@pytest.mark.parametrize("table", TABLES)
def test_a_row_without_an_order_is_found(copy: Database, sealed: Sealed, table: str) -> None:
    forged = COPY[table].format(row=ROW.format(table=table)).replace("commit_order FROM", "NULL FROM")
    for after_size in (0, sealed.sizes[0]):
        lines, online = edited(copy, sealed, forged, after_size)
        for report in (online, checked(sealed.reader, lines), checked(sealed.reader, lines, sealed.outside)):
            assert report.finding is not None
            assert report.finding.difference is Difference.ROW_INSERTED
            assert f"of audit.{table} has no order" in report.finding.message


@pytest.mark.parametrize("table", TABLES)
def test_a_change_in_any_column_is_found(copy: Database, sealed: Sealed, table: str) -> None:
    # A column that is new fails here: until it is in the line that is hashed, or is named as not proved.
    exported = asyncio.run(lines_of(copy.dsn))
    with psycopg.connect(copy.admin_dsn) as admin:
        columns: dict[str, str] = dict(admin.execute(COLUMNS, (table,)).fetchall())
        assert columns.keys() > NOT_PROVED[table]
        before = {line for (line,) in admin.execute(LINES).fetchall()}
        for column, kind in columns.items():
            value = OTHER.get(column, OTHER.get(kind, "")).format(column=column)
            with admin.transaction(force_rollback=True):
                update = f"UPDATE audit.{table} SET {column} = {value} WHERE event_type = 'full' AND {column} IS NOT NULL"
                assert admin.execute(update.encode()).rowcount == 1, column
                after = {line for (line,) in admin.execute(LINES).fetchall()}
            edits = dict(zip(before - after, after - before, strict=True))
            lines = [edits.get(line.decode(), line.decode()).encode() for line in exported]
            assert (checked(sealed.reader, lines).finding is None) == (column in NOT_PROVED[table]), column


def test_a_row_does_not_hide_behind_another_of_its_id_and_order_at_the_end_of_a_page(
    copy: Database, sealed: Sealed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verifying, "_ROWS_READ_MAX", 1)
    lines, online = edited(copy, sealed, f"""
        INSERT INTO audit.security_events (id, event_type, severity, commit_order, created_at)
        SELECT id, 'forged', 'low', commit_order, created_at + interval '1 second'
        FROM audit.security_events WHERE id = {ROW.format(table="security_events")}
    """)  # fmt: skip
    finding = checked(sealed.reader, lines).finding
    assert finding is not None
    assert online.finding is not None
    # The messages name how far transactions were when each looked, and PostgreSQL's own processes have some, too.
    assert replace(finding, message="") == replace(online.finding, message="")
    assert (finding.difference, finding.after_size) == (Difference.ROW_INSERTED, sealed.sizes[0])


@pytest.mark.parametrize("edit", CHECKPOINT_EDITS)
def test_an_edited_checkpoint_is_found(copy: Database, sealed: Sealed, edit: str) -> None:
    statement, difference = CHECKPOINT_EDITS[edit]
    first, middle, last = sealed.sizes
    lines, _ = edited(copy, sealed, statement.format(first=first, middle=middle, last=last))
    finding = checked(sealed.reader, lines, sealed.outside).finding
    assert finding is not None
    assert finding.difference is difference


def test_a_trail_cut_off_with_its_checkpoints_is_found_by_those_kept_outside(copy: Database, sealed: Sealed) -> None:
    # One statement, as a superuser would who knows the tables: everything behind the first checkpoint goes.
    cut = """
        WITH last AS (SELECT min(horizon) AS horizon FROM audit.checkpoints),
            a AS (DELETE FROM audit.security_events WHERE commit_order >= (SELECT horizon FROM last)),
            b AS (DELETE FROM audit.domain_events WHERE commit_order >= (SELECT horizon FROM last))
        DELETE FROM audit.checkpoints WHERE horizon > (SELECT horizon FROM last)
    """
    lines, _ = edited(copy, sealed, cut)
    assert checked(sealed.reader, lines).finding is None
    finding = checked(sealed.reader, lines, sealed.outside).finding
    assert finding is not None
    assert (finding.difference, finding.by_size) == (Difference.TRAIL_TRUNCATED, sealed.sizes[1])


def test_rows_that_are_said_to_be_archived_and_rows_without_a_checkpoint_are_found(copy: Database, sealed: Sealed) -> None:
    archived = """INSERT INTO audit.archived_partitions
        VALUES ('security_events_2020_01', (SELECT max(horizon) - 1 FROM audit.checkpoints))"""
    for statement, difference in ((archived, Difference.ROWS_LEFT_OUT), ("DELETE FROM audit.checkpoints", Difference.NOT_SEALED)):
        lines, online = edited(copy, sealed, statement)
        for report in (online, checked(sealed.reader, lines)):
            assert report.finding is None
            finding = judged(report, 0, ()).finding
            assert finding is not None
            assert finding.difference is difference


FILE_EDITS: Final[dict[str, tuple[Callable[[list[bytes]], object], Difference]]] = {
    "a byte": (lambda lines: lines.__setitem__(1, lines[1].swapcase()), Difference.ROW_CHANGED),
    "a space": (lambda lines: lines.__setitem__(1, lines[1].replace(b":", b": ", 1)), Difference.ROW_CHANGED),
    "two lines swapped": (lambda lines: lines.insert(1, lines.pop(2)), Difference.ROWS_REORDERED),
    "a line left out": (lambda lines: lines.pop(1), Difference.ROW_REMOVED),
    "a line twice": (lambda lines: lines.insert(1, lines[1]), Difference.ROW_INSERTED),
    "a line that is none": (lambda lines: lines.insert(1, b"{}"), Difference.ROW_CHANGED),
}  # fmt: skip


@pytest.mark.parametrize("edit", FILE_EDITS)
def test_an_edited_file_is_found(sealed: Sealed, edit: str) -> None:
    lines = asyncio.run(lines_of(sealed.database.dsn))
    change, difference = FILE_EDITS[edit]
    change(lines)
    finding = checked(sealed.reader, lines).finding
    assert finding is not None
    assert (finding.difference, finding.after_size) == (difference, 0)


def test_an_export_that_begins_at_a_checkpoint_is_verified_from_its_frontier(sealed: Sealed) -> None:
    lines = asyncio.run(lines_of(sealed.database.dsn, sealed.sizes[0]))
    report = checked(sealed.reader, lines, sealed.outside)
    assert (report.finding, report.begun_at, report.verified_size) == (None, sealed.sizes[0], sealed.sizes[-1])
    lines[1:2] = []
    assert checked(sealed.reader, lines).finding is not None
