"""Upkeep of the trail's partitions: writers are not held up, DEFAULT is drained, old ones are put away whole."""

import hashlib
import json
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest
import structlog

from kms.domain.errors import KmsError, Reason
from kms.store import partitions
from kms.store.backup_tools import find_tool, run
from kms.store.pool import Pool
from tests.fixtures.postgres import Database
from tests.store.acting import add_user

FAR = datetime(2055, 3, 4, tzinfo=UTC)
ADD = """
    INSERT INTO audit.security_events (event_type, severity, action, outcome, created_at)
    VALUES ('t', 'low', %s, 'success', %s)
"""


@pytest.fixture
def admin(database: Database) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(database.admin_dsn, autocommit=True) as connection:
        yield connection


def add(admin: psycopg.Connection[Any], moment: datetime, count: int = 1, action: str = "a") -> None:
    for _ in range(count):
        admin.execute(ADD, (action, moment))


def dumped(path: Path) -> str:
    """Return the rows in a dump."""
    options = ["--data-only", "--file=-", str(path)]
    return subprocess.run([find_tool("pg_restore", 17).path, *options], capture_output=True, text=True, check=True).stdout


def where(admin: psycopg.Connection[Any]) -> dict[str, int]:
    """Return how many security events lie in which partition."""
    found = admin.execute(b"SELECT tableoid::regclass::text, count(*) FROM audit.security_events GROUP BY 1").fetchall()
    return {name: int(number) for name, number in found}


async def test_partitions_are_made_as_far_ahead_as_asked(store: Pool, admin: psycopg.Connection[Any]) -> None:
    made = await partitions.ensure(store, 3600)
    last = datetime.now(UTC) + timedelta(days=3599)
    assert f"audit.security_events_{last:%Y_%m}" in made
    assert f"audit.domain_events_{last:%Y}" in made
    assert await partitions.ensure(store, 3600) == []
    add(admin, last)
    assert where(admin) == {f"audit.security_events_{last:%Y_%m}": 1}


@pytest.mark.parametrize("days", [-1, 3601])
async def test_a_distance_that_cannot_be_is_refused(store: Pool, days: int) -> None:
    with pytest.raises(KmsError) as caught:
        await partitions.ensure(store, days)
    assert caught.value.reason is Reason.MALFORMED


@dataclass(slots=True)
class Beside:
    """Statements that were sent again and again beside something else: how often, and how long the slowest took, in seconds."""

    times: int = 0
    longest: float = 0.0


@contextmanager
def beside(database: Database, *statements: tuple[bytes, tuple[object, ...]]) -> Iterator[Beside]:
    """Send *statements* in turn, over a connection of their own, until the end of the block."""
    found, done = Beside(), threading.Event()

    def send() -> None:
        with psycopg.connect(database.admin_dsn, autocommit=True) as other:
            while not done.is_set():
                begun = time.monotonic()
                for statement, values in statements:
                    other.execute(statement, values)
                found.longest, found.times = max(found.longest, time.monotonic() - begun), found.times + 1

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


async def test_attaching_does_not_hold_up_writers(database: Database, store: Pool) -> None:
    with beside(database, (ADD.encode(), ("a", datetime.now(UTC)))) as writing:
        begun = time.monotonic()
        made = await partitions.ensure(store, 1100)
        took = time.monotonic() - begun
    assert len(made) >= 10
    assert writing.times > 10
    assert writing.longest < max(0.5, took / 3)


async def test_making_partitions_holds_up_neither_changes_of_users_nor_who_reads_the_whole_trail(
    database: Database, store: Pool
) -> None:
    add_user(database.admin_dsn, uuid4(), "alice")
    change = b"UPDATE authentication.users SET mfa_enabled = NOT mfa_enabled"
    with beside(database, (change, ()), (b"SELECT count(*) FROM audit.security_events", ())) as others:
        begun = time.monotonic()
        made = await partitions.ensure(store, 3600)
        took = time.monotonic() - begun
    assert len(made) >= 90
    assert others.times > 10
    assert others.longest < max(0.3, took / 3)


def test_a_second_archive_beside_the_first_is_refused_and_touches_nothing(database: Database, tmp_path: Path) -> None:
    with psycopg.connect(database.admin_dsn, autocommit=True) as first:
        first.execute(partitions.ALONE)
        with pytest.raises(KmsError, match="being archived already"):
            partitions.archive(database.admin_dsn, date(2024, 2, 1), tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert [each.table for each in partitions.archive(database.admin_dsn, date(2024, 2, 1), tmp_path)] != []


def test_a_migration_makes_partitions_two_years_ahead(database: Database, admin: psycopg.Connection[Any]) -> None:
    month = datetime.now(UTC) + timedelta(days=700)
    name = f"audit.security_events_{month:%Y_%m}"
    admin.execute(f"DROP TABLE {name}".encode())
    partitions.ensure_by(database.admin_dsn)
    assert admin.execute("SELECT to_regclass(%s) IS NOT NULL", (name,)).fetchone() == (True,)


@pytest.mark.slow
def test_a_migration_leaves_partitions_whose_locks_somebody_holds_to_the_service(
    database: Database, admin: psycopg.Connection[Any]
) -> None:
    month = datetime.now(UTC) + timedelta(days=700)
    name = f"audit.security_events_{month:%Y_%m}"
    admin.execute(f"DROP TABLE {name}".encode())
    with psycopg.connect(database.admin_dsn) as reader:
        reader.execute(b"LOCK TABLE audit.security_events_default IN ACCESS SHARE MODE")
        partitions.ensure_by(database.admin_dsn)
    assert admin.execute("SELECT to_regclass(%s) IS NULL", (name,)).fetchone() == (True,)


@pytest.mark.slow
async def test_a_long_transaction_of_a_writer_is_not_waited_for_by_the_others(database: Database, store: Pool) -> None:
    with psycopg.connect(database.admin_dsn) as reader, psycopg.connect(database.admin_dsn, autocommit=True) as writer:
        reader.execute(b"LOCK TABLE audit.security_events_default IN ACCESS SHARE MODE")
        thread = threading.Thread(target=_ensure_in_vain, args=(database.dsn,))
        thread.start()
        longest = 0.0
        while thread.is_alive():
            begun = time.monotonic()
            writer.execute(ADD, ("a", datetime.now(UTC)))
            longest = max(longest, time.monotonic() - begun)
        thread.join()
    assert longest < 1.0
    assert store


def _ensure_in_vain(dsn: str) -> None:
    with psycopg.connect(dsn) as service:
        service.execute(b"SELECT set_config('role', 'job_runner', true)")
        with pytest.raises(psycopg.errors.LockNotAvailable):
            service.execute(b"SELECT audit.ensure_partitions('4 years')")


async def test_rows_in_default_are_reported_and_drained(store: Pool, admin: psycopg.Connection[Any]) -> None:
    assert await partitions.default_rows(store) == []
    add(admin, FAR, 3)
    add(admin, datetime(1999, 1, 1, tzinfo=UTC))
    found = await partitions.default_rows(store)
    assert [(each.default_partition, each.row_count) for each in found] == [("audit.security_events_default", 4)]
    assert await partitions.drain(store) == 4
    assert await partitions.default_rows(store) == []
    assert where(admin) == {"audit.security_events_2055_03": 3, "audit.security_events_1999_01": 1}
    assert await partitions.drain(store) == 0


def _kept_in(lines: list[str]) -> Callable[[Any, str, MutableMapping[str, Any]], MutableMapping[str, Any]]:
    def keep(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        lines.append(str(dict(event)))
        raise structlog.DropEvent

    return keep


async def test_the_service_makes_partitions_and_warns_of_rows_in_default(
    store: Pool, admin: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Not by what is printed: another test of this process may have configured the log, and loggers are cached.
    seen: list[str] = []
    monkeypatch.setattr(partitions, "_LOG", structlog.wrap_logger(None, processors=[_kept_in(seen)]))
    add(admin, FAR)
    month = datetime.now(UTC) + timedelta(days=700)
    name = f"audit.security_events_{month:%Y_%m}"
    admin.execute(f"DROP TABLE {name}".encode())
    await partitions.look_after(store)
    assert admin.execute("SELECT to_regclass(%s) IS NOT NULL", (name,)).fetchone() == (True,)
    assert [line for line in seen if "rows in a default partition" in line and "audit.security_events_default" in line]


def test_an_old_partition_is_put_away_whole(database: Database, admin: psycopg.Connection[Any], tmp_path: Path) -> None:
    add(admin, datetime(2024, 1, 31, 23, 59, tzinfo=UTC), 3)
    add(admin, datetime(2024, 2, 1, tzinfo=UTC))
    done = partitions.archive(database.admin_dsn, date(2024, 2, 1), tmp_path)
    assert [(each.table, each.rows, each.begins_on, each.ends_on) for each in done] == [
        ("audit.security_events_2024_01", 3, "2024-01-01", "2024-02-01")
    ]
    assert where(admin) == {"audit.security_events_2024_02": 1}
    file, manifest = tmp_path / "security_events_2024_01.dump", tmp_path / "security_events_2024_01.dump.json"
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {
        file.name: 0o600,
        manifest.name: 0o600,
    }
    assert json.loads(manifest.read_text())["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert dumped(file).count("2024-01-31 23:59:00+00") == 3
    assert partitions.archive(database.admin_dsn, date(2024, 2, 1), tmp_path) == []


def test_a_day_in_the_future_is_refused(database: Database, tmp_path: Path) -> None:
    with pytest.raises(KmsError) as caught:
        partitions.archive(database.admin_dsn, datetime.now(UTC).date() + timedelta(days=2), tmp_path)
    assert caught.value.reason is Reason.MALFORMED


def test_neither_default_nor_this_month_is_put_away(database: Database, admin: psycopg.Connection[Any], tmp_path: Path) -> None:
    today = datetime.now(UTC).date()
    add(admin, FAR)
    for year in (2024, 2025):
        for month in range(1, 13):
            admin.execute(f"DROP TABLE audit.security_events_{year}_{month:02}".encode())
    names = {each.table for each in partitions.archive(database.admin_dsn, today, tmp_path)}
    assert f"audit.security_events_{today:%Y_%m}" not in names
    assert names
    assert where(admin) == {"audit.security_events_default": 1}


def test_an_interrupted_run_is_completed(
    database: Database, admin: psycopg.Connection[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(admin, datetime(2024, 1, 15, tzinfo=UTC), 2)
    cutoff = date(2024, 2, 1)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    # Stopped after the partition was detached, then after it was dumped, then before it was dropped.
    for victim in ("run", "_measured", "asdict"):
        with monkeypatch.context() as patch:
            patch.setattr(partitions, victim, stop)
            with pytest.raises(KeyboardInterrupt):
                partitions.archive(database.admin_dsn, cutoff, tmp_path)
        assert admin.execute(b"SELECT count(*) FROM audit.security_events_2024_01").fetchone() == (2,)
    assert [each.rows for each in partitions.archive(database.admin_dsn, cutoff, tmp_path)] == [2]


@pytest.mark.parametrize("there", ["security_events_2024_01.dump", "security_events_2024_01.dump.json"])
def test_a_file_that_is_there_is_neither_trusted_nor_written_over(
    database: Database, admin: psycopg.Connection[Any], tmp_path: Path, there: str
) -> None:
    add(admin, datetime(2024, 1, 15, tzinfo=UTC), 2)
    (tmp_path / there).write_text("{}")
    done = partitions.archive(database.admin_dsn, date(2024, 2, 1), tmp_path)
    assert [(each.rows, each.file) for each in done] == [(2, "security_events_2024_01.2.dump")]
    assert (tmp_path / there).read_text() == "{}"
    assert dumped(tmp_path / "security_events_2024_01.2.dump").count("2024-01-15") == 2


def test_rows_of_a_range_that_was_put_away_are_put_away_too(
    database: Database, admin: psycopg.Connection[Any], tmp_path: Path
) -> None:
    orders = []
    for action in ("first", "second", "third"):
        add(admin, datetime(2024, 1, 15, tzinfo=UTC), action=action)
        orders += admin.execute(b"SELECT max(commit_order) FROM audit.security_events").fetchall()
        admin.execute(b"SELECT audit.drain_default()")
        assert [each.rows for each in partitions.archive(database.admin_dsn, date(2024, 2, 1), tmp_path)] == [1]
    assert where(admin) == {}
    found = {path.name: dumped(path) for path in tmp_path.glob("*.dump")}
    assert sorted(found) == [f"security_events_2024_01{number}.dump" for number in (".2", ".3", "")]
    for number, action in (("", "first"), (".2", "second"), (".3", "third")):
        assert action in found[f"security_events_2024_01{number}.dump"]
        manifest = json.loads((tmp_path / f"security_events_2024_01{number}.dump.json").read_text())
        content = (tmp_path / f"security_events_2024_01{number}.dump").read_bytes()
        assert (manifest["rows"], manifest["sha256"]) == (1, hashlib.sha256(content).hexdigest())
    assert admin.execute(b"SELECT last_order FROM audit.archived_partitions").fetchall() == [max(orders)]


def test_the_order_up_to_which_a_range_was_put_away_never_falls(
    database: Database, admin: psycopg.Connection[Any], tmp_path: Path
) -> None:
    add(admin, datetime(2024, 1, 15, tzinfo=UTC))
    admin.execute(b"INSERT INTO audit.archived_partitions VALUES ('security_events_2024_01', 4000000000)")
    partitions.archive(database.admin_dsn, date(2024, 2, 1), tmp_path)
    assert admin.execute(b"SELECT last_order FROM audit.archived_partitions").fetchall() == [(4000000000,)]


def test_what_is_put_away_is_not_written_to_meanwhile(
    database: Database, admin: psycopg.Connection[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(admin, datetime(2024, 1, 15, tzinfo=UTC))

    def run_and_write(*arguments: Any) -> None:  # noqa: ANN401
        run(*arguments)
        admin.execute(b"SET lock_timeout = '100ms'")
        insert = b"INSERT INTO audit.security_events_2024_01 (event_type, severity, created_at) VALUES ('t', 'low', '2024-01-16')"
        with pytest.raises(psycopg.errors.LockNotAvailable):
            admin.execute(insert)

    monkeypatch.setattr(partitions, "run", run_and_write)
    assert [each.rows for each in partitions.archive(database.admin_dsn, date(2024, 2, 1), tmp_path)] == [1]
