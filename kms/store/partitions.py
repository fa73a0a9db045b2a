"""Upkeep of the partitions of the trail: made ahead, DEFAULT kept empty, old ones put away in files."""

import contextlib
import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, Final

import psycopg
import structlog
from psycopg import errors as pg
from psycopg import sql

from kms.domain.errors import malformed
from kms.store.backup import check_login_sees_all, connected
from kms.store.backup_file import new_private_file
from kms.store.backup_tools import find_tool, run
from kms.store.errors import unavailable
from kms.store.pool import AS_JOB, Pool, connection_settings

ALONE: Final = "SELECT pg_try_advisory_lock(hashtext('kms partitions archive'))"
# Until a detachment is committed nobody appends to the trail: the server ends one whose program stands still.
BRIEFLY: Final = "SET LOCAL idle_in_transaction_session_timeout = '5s'"
AT_LEISURE: Final = "SET LOCAL idle_in_transaction_session_timeout = 0"  # pg_dump works meanwhile
ENSURE: Final = "SELECT made::text AS name FROM audit.ensure_partitions(make_interval(days => %(days)s)) AS made"
IN_DEFAULT: Final = "SELECT parent::text, default_partition::text, row_count FROM audit.default_partition_rows()"
DRAIN: Final = "SELECT audit.drain_default() AS moved"
PARTITIONS: Final = """
    SELECT c.relname::text, k.parent::text, c.relispartition
    FROM audit.partitioned_by_time() AS k
        JOIN pg_class AS p ON p.oid = k.parent
        JOIN pg_class AS c ON c.relnamespace = p.relnamespace AND c.relkind = 'r' AND starts_with(c.relname, p.relname || '_')
    ORDER BY 1
"""
DETACH: Final = (
    "SELECT audit.with_brief_locks(format('ALTER TABLE %%s DETACH PARTITION audit.%%I', %(parent)s::text, %(name)s::text))"
)
AHEAD_DAYS: Final = 2 * 366
_AHEAD_DAYS_MAX: Final = 3600  # ten years, as PostgreSQL compares intervals
_ENDING: Final = re.compile(r"_(\d{4})(?:_(\d{2}))?")
_LOG = structlog.get_logger("kms")


@dataclass(frozen=True, slots=True)
class DefaultRows:
    """Rows that found no partition of their own. `row_count` counts to 10,000."""

    parent: str
    default_partition: str
    row_count: int


@dataclass(frozen=True, slots=True)
class Archived:
    """A partition that was put away: rows from `begins_on` until before `ends_on` (UTC). `sha256` of `file`, in hex."""

    table: str
    begins_on: str
    ends_on: str
    rows: int
    file: str
    bytes: int
    sha256: str


async def ensure(pool: Pool, ahead_days: int = AHEAD_DAYS) -> Sequence[str]:
    """Make the partitions that are missing from now to *ahead_days* ahead, 0 to 3600; return their names.

    Each in a transaction of its own: the locks that one takes last for it alone.
    """
    if not 0 <= ahead_days <= _AHEAD_DAYS_MAX:
        raise malformed("ahead", "expected 0 to 3600 days")
    made: list[str] = []
    while rows := await pool.fetch(AS_JOB, ENSURE, {"days": ahead_days}):
        made += [row["name"] for row in rows]
    return made


def ensure_by(dsn: str) -> None:
    """Make the partitions that are missing from now to two years ahead, with a login that migrates. Raises STORE_UNAVAILABLE.

    Where somebody holds what must be locked they are left to `kms serve`, which tries again and tells.
    """
    with connected(connection_settings(dsn)) as connection, contextlib.suppress(pg.LockNotAvailable):
        while connection.execute(ENSURE, {"days": AHEAD_DAYS}).fetchone() is not None:
            pass


async def default_rows(pool: Pool) -> Sequence[DefaultRows]:
    """Return the DEFAULT partitions that hold rows. None is as it should be."""
    return [DefaultRows(**row) for row in await pool.fetch(AS_JOB, IN_DEFAULT)]


async def drain(pool: Pool) -> int:
    """Move the rows of the DEFAULT partitions into partitions of their own, in one transaction; return how many."""
    async with pool.transaction(AS_JOB) as connection:
        row = await (await connection.execute(DRAIN)).fetchone()
    assert row is not None  # noqa: S101  # a function that returns no set gives a row or raises
    return int(row["moved"])


async def look_after(pool: Pool) -> None:
    """Make the partitions that are missing, and log the rows in DEFAULT partitions. Raises STORE_UNAVAILABLE.

    A failure loses no row: meanwhile the DEFAULT partitions take the rows.
    """
    made = await ensure(pool)
    if made:
        _LOG.info("partitions made", names=made)
    for found in await default_rows(pool):
        _LOG.warning("rows in a default partition", **asdict(found), run="kms partitions drain")


def archive(dsn: str, before: date, directory: Path) -> list[Archived]:
    """Put every partition of the trail that ends by *before* (UTC, not in the future) into a file in *directory*, and drop it.

    A partition is detached, dumped into a file of its own, the manifest `<file>.json` is on disk, and only then is it dropped; a
    run that was interrupted is completed by the next, which trusts no file of before. Raises OSError, MALFORMED and
    STORE_UNAVAILABLE, also while another run is under way.
    """
    with connected(connection_settings(dsn)) as connection:
        version = check_login_sees_all(connection)
        if connection.execute(ALONE).fetchone() != (True,):
            # Each would wait for the other's locks, one of them through pg_dump, where PostgreSQL sees no deadlock.
            raise unavailable("partitions of this database are being archived already")
        if before > datetime.now(UTC).date():  # noqa: TID251  # a day, and the cutoff is the operator's
            raise malformed("before", "expected a day that is not in the future")
        done = []
        for name, parent, is_attached in connection.execute(PARTITIONS).fetchall():
            span = _span(name, parent)
            if span is not None and span[1] <= before:
                if is_attached:
                    _detach(connection, parent, name)
                done.append(_put_away(connection, version, name, span, directory))
        return done


def _detach(connection: psycopg.Connection[Any], parent: str, name: str) -> None:
    # At once: afterwards nobody could tell rows that were put away from rows that somebody removed.
    note = sql.SQL(
        "INSERT INTO audit.archived_partitions AS known (name, last_order) SELECT {}, coalesce(max(commit_order), 0) FROM {} "
        "ON CONFLICT (name) DO UPDATE SET last_order = greatest(known.last_order, excluded.last_order), "
        "archived_at = excluded.archived_at"
    )
    with connection.transaction():
        connection.execute(BRIEFLY)
        connection.execute(DETACH, {"parent": parent, "name": name})
        connection.execute(note.format(sql.Literal(name), sql.Identifier("audit", name)))


def _put_away(connection: psycopg.Connection[Any], version: int, name: str, span: tuple[date, date], directory: Path) -> Archived:
    table, path = sql.Identifier("audit", name), _new_path(directory, name)
    with connection.transaction():
        connection.execute(AT_LEISURE)
        # Nobody writes to it any more: what is counted, dumped and dropped are the same rows.
        connection.execute(sql.SQL("LOCK TABLE {} IN SHARE MODE").format(table))
        counted = connection.execute(sql.SQL("SELECT count(*) FROM {}").format(table)).fetchone()
        assert counted is not None  # noqa: S101  # count(*) gives a row
        settings = {**connection.info.get_parameters(), "password": connection.info.password or None}
        with new_private_file(path) as temporary:
            arguments = ["--format=custom", f"--file={temporary}", f'--table=audit."{name}"']
            run(find_tool("pg_dump", version), settings, arguments)
        archived = Archived(f"audit.{name}", str(span[0]), str(span[1]), int(counted[0]), path.name, *_measured(path))
        with new_private_file(_manifest(path)) as temporary:
            temporary.write_text(json.dumps(asdict(archived), indent=2) + "\n")
        connection.execute(sql.SQL("DROP TABLE {}").format(table))
    return archived


def _new_path(directory: Path, name: str) -> Path:
    """Return where no dump is: a range that comes again, as rows of its time do, has `<name>.2.dump` and so on."""
    paths = (directory / f"{name}{ending}" for ending in itertools.chain([".dump"], map(".{}.dump".format, itertools.count(2))))
    return next(path for path in paths if not path.exists() and not _manifest(path).exists())


def _manifest(path: Path) -> Path:
    return path.with_suffix(".dump.json")


def _measured(path: Path) -> tuple[int, str]:
    with path.open("rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()


def _span(name: str, parent: str) -> tuple[date, date] | None:
    """Return the first day of the partition and the first one behind it, as its name says; None for DEFAULT."""
    match = _ENDING.fullmatch(name.removeprefix(parent.removeprefix("audit.")))
    if match is None:
        return None
    year = int(match[1])
    if match[2] is None:
        return date(year, 1, 1), date(year + 1, 1, 1)
    month = int(match[2])
    return date(year, month, 1), date(year + month // 12, month % 12 + 1, 1)
