"""Sealing: one at a time, in bounded batches, outside too, and on after a restore or an archive."""

import asyncio
import fcntl
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from kms.app import sealing as app_sealing
from kms.app.trail_ports import StoredCheckpoint
from kms.app.verifying import VerifyTrail
from kms.dev.postgres import EmbeddedPostgres
from kms.domain.errors import KmsError, Reason
from kms.domain.history import HistoryError
from kms.domain.trail_check import Difference, EpochStart, Rollback, judged
from kms.domain.trail_lines import Leaf, RowPlace, place_before
from kms.hsm.token_hsm import TokenHsm
from kms.jobs.job import Job
from kms.jobs.runner import JobRunner
from kms.store.backup import backup
from kms.store.checkpoint_file import CheckpointFile, finished_lines
from kms.store.epoch import check_epoch
from kms.store.partitions import archive
from kms.store.pool import Pool, connection_settings, open_pool
from kms.store.restore import restore
from kms.store.sealed_trail import SealStatus, StoredSealedTrail
from kms.store.sealer import HistoryWatch, Sealer
from kms.wiring.condition import SealWatch
from tests.conformance.test_outages import soon
from tests.fixtures.postgres import Database
from tests.store.records import RECORDS, mac
from tests.store.sealing import EVENT, checked, lines_of, restarted, sealing_of, write

OLD: Final = b"INSERT INTO audit.security_events (event_type, severity, created_at) VALUES ('old', 'low', '2024-01-05')"

_LAST_HORIZON: Final = "SELECT max(horizon) FROM audit.checkpoints"


@pytest.fixture
def admin(database: Database) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(database.admin_dsn, autocommit=True) as connection:
        yield connection


@pytest.fixture
def memory(tmp_path: Path) -> CheckpointFile:
    """The checkpoints that this machine remembers."""
    return CheckpointFile(tmp_path / "checkpoints")


@pytest.fixture
def other(postgres: EmbeddedPostgres) -> Iterator[str]:
    """The connection string of a database that is not there."""
    name = f"resealed_{uuid4().hex[:8]}"
    yield postgres.superuser_dsn(name)
    with psycopg.connect(postgres.superuser_dsn(), autocommit=True) as connection:
        connection.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)".encode())


async def test_of_two_machines_that_seal_at_once_one_is_refused_and_the_trail_does_not_fork(
    store: Pool, hsm: TokenHsm, admin: psycopg.Connection[Any], tmp_path: Path
) -> None:
    await check_epoch(store, RECORDS)
    machines = [await sealing_of(store, hsm, CheckpointFile(tmp_path / f"checkpoints-{number}")) for number in range(3)]
    for _ in range(5):
        write(admin)
        outcomes = await asyncio.gather(*(machine.seal() for machine in machines), return_exceptions=True)
        refused = [error for error in outcomes if isinstance(error, BaseException)]
        # A machine that stalls under load may also wait in vain for the database; that forks nothing either.
        may_be = {Reason.STALE, Reason.STORE_UNAVAILABLE}
        assert {error.reason if isinstance(error, KmsError) else error for error in refused} <= may_be
    # Also those whose note came too late for the database go on.
    sizes = [await machine.seal() for machine in machines]
    assert sizes == sorted(sizes)
    report = await VerifyTrail(StoredSealedTrail(store), machines[0].key.reader).verify()
    assert (report.finding, report.unsealed) == (None, 0)


@dataclass(frozen=True, slots=True)
class _Early(StoredSealedTrail):
    """The trail as a machine sees it that asked for the horizon some time ago."""

    early: int = 0

    async def horizon(self) -> int:
        return self.early


@dataclass(frozen=True, slots=True)
class _Overtaken(StoredSealedTrail):
    """The trail as a machine sees it that has a checkpoint on disk, and whose write comes after that of another machine."""

    faster: Callable[[], Awaitable[object]] = field(kw_only=True)

    async def append(self, previous_size: int, checkpoint: StoredCheckpoint) -> None:
        await self.faster()
        await StoredSealedTrail.append(self, previous_size, checkpoint)


@pytest.mark.parametrize("goes_on", ["the slow machine", "the fast machine"])
@pytest.mark.parametrize("is_restarted", [False, True])
async def test_a_machine_that_was_overtaken_by_one_that_had_seen_fewer_rows_goes_on(
    store: Pool, hsm: TokenHsm, admin: psycopg.Connection[Any], tmp_path: Path, goes_on: str, is_restarted: bool
) -> None:
    await check_epoch(store, RECORDS)
    slow, fast = [await sealing_of(store, hsm, CheckpointFile(tmp_path / f"checkpoints-{number}")) for number in range(2)]
    await slow.seal()
    await fast.seal()
    write(admin)
    early = await StoredSealedTrail(store).horizon()
    write(admin)
    overtaking = replace(fast, trail=_Early(store, early=early))
    with pytest.raises(KmsError) as caught:
        await replace(slow, trail=_Overtaken(store, faster=overtaking.seal)).seal()
    assert caught.value.reason is Reason.STALE
    machines = [restarted(slow), restarted(fast)] if is_restarted else [slow, fast]
    if goes_on == "the fast machine":
        machines.reverse()
    # Both sign all rows that are there, and those that come.
    sizes = [await machine.seal() for machine in machines]
    write(admin)
    sizes += [await machine.seal() for machine in machines]
    assert sizes == [sizes[0], sizes[0], sizes[0] + 6, sizes[0] + 6]
    report = await VerifyTrail(StoredSealedTrail(store), slow.key.reader).verify()
    assert (report.finding, report.unsealed) == (None, 0)


@pytest.mark.parametrize("is_edited", [False, True])
async def test_a_machine_whose_rows_another_one_has_signed_at_a_later_moment_goes_on(
    store: Pool, hsm: TokenHsm, admin: psycopg.Connection[Any], tmp_path: Path, is_edited: bool
) -> None:
    await check_epoch(store, RECORDS)
    one, other = [await sealing_of(store, hsm, CheckpointFile(tmp_path / f"checkpoints-{number}")) for number in range(2)]
    await one.seal()
    await other.seal()
    write(admin)

    async def sign_later() -> None:
        # A transaction that leaves no row in the trail moves the horizon.
        admin.execute("CREATE TABLE public.moves_the_horizon ()")
        admin.execute("DROP TABLE public.moves_the_horizon")
        await other.seal()

    with pytest.raises(KmsError) as caught:
        await replace(one, trail=_Overtaken(store, faster=sign_later)).seal()
    assert caught.value.reason is Reason.STALE
    if is_edited:
        # The other machine refuses it, the verifier names it, and no row is hidden from this machine.
        admin.execute(f"UPDATE audit.checkpoints SET horizon = horizon + 4 WHERE horizon = ({_LAST_HORIZON})".encode())
        with pytest.raises(HistoryError):
            await other.seal()
    write(admin, times=4)
    await one.seal()
    report = await VerifyTrail(StoredSealedTrail(store), one.key.reader).verify()
    found = None if report.finding is None else report.finding.difference
    assert (found, report.unsealed) == (Difference.ROW_INSERTED if is_edited else None, 0)


@dataclass(frozen=True, slots=True)
class _TwoFaced(StoredSealedTrail):
    """The trail as somebody shows it to a machine: first the rows that it has signed, and its checkpoints not always."""

    rows: list[Leaf] = field(default_factory=list, kw_only=True)
    hidden_after: int = field(kw_only=True)

    async def leaves(self, after: RowPlace, below: int | None, limit: int) -> Sequence[Leaf]:
        shown, self.rows[:] = list(self.rows), []
        return shown or await StoredSealedTrail.leaves(self, after, below, limit)

    async def notes(self, after_size: int, limit: int) -> Sequence[tuple[int, int, str]]:
        return [] if after_size >= self.hidden_after else await StoredSealedTrail.notes(self, after_size, limit)


async def test_a_machine_that_is_shown_its_own_rows_first_takes_over_no_checkpoint_of_others(
    store: Pool, hsm: TokenHsm, admin: psycopg.Connection[Any], tmp_path: Path
) -> None:
    await check_epoch(store, RECORDS)
    slow, fast = [await sealing_of(store, hsm, CheckpointFile(tmp_path / f"checkpoints-{number}")) for number in range(2)]
    await slow.seal()
    await fast.seal()
    trail = StoredSealedTrail(store)
    last = await trail.last()
    assert last is not None
    write(admin)
    early = await trail.horizon()
    write(admin)
    signed = list(await trail.leaves(place_before(last.horizon), await trail.horizon(), 100))

    async def lose() -> None:
        raise KmsError(Reason.STORE_UNAVAILABLE, "the database does not answer")

    with pytest.raises(KmsError):
        await replace(slow, trail=_Overtaken(store, faster=lose)).seal()
    with admin.transaction():
        admin.execute("SET LOCAL session_replication_role = replica")
        admin.execute(f"UPDATE audit.security_events SET severity = 'high' WHERE commit_order >= {last.horizon}".encode())
    short = await replace(fast, trail=_Early(store, early=early)).seal()
    write(admin)
    await fast.seal()
    remembered = (tmp_path / "checkpoints-0").read_bytes()
    shown = _TwoFaced(store, rows=signed, hidden_after=short)
    with pytest.raises(KmsError):
        await replace(restarted(slow), trail=shown).seal()
    # Nor does it sign anything itself.
    assert (tmp_path / "checkpoints-0").read_bytes() == remembered
    with pytest.raises(HistoryError):
        await restarted(slow).seal()


async def test_processes_of_one_machine_wait_for_each_other(
    store: Pool, hsm: TokenHsm, admin: psycopg.Connection[Any], memory: CheckpointFile
) -> None:
    await check_epoch(store, RECORDS)
    first = await sealing_of(store, hsm, memory)
    write(admin)
    sizes = await asyncio.gather(*(restarted(first).seal() for _ in range(4)))
    assert len({*sizes}) == 1
    assert len(list(finished_lines(memory.path))) == 1


async def test_a_checkpoint_that_does_not_follow_the_last_is_refused(
    store: Pool, hsm: TokenHsm, admin: psycopg.Connection[Any], memory: CheckpointFile
) -> None:
    await check_epoch(store, RECORDS)
    sealing, trail = await sealing_of(store, hsm, memory), StoredSealedTrail(store)
    await sealing.seal()
    last = await trail.last()
    assert last is not None
    larger = replace(last, tree=last.tree.extended([bytes(32)]), horizon=last.horizon + 1)
    for previous_size in (0, last.tree.size - 1, larger.tree.size):
        with pytest.raises(KmsError) as caught:
            await trail.append(previous_size, larger)
        assert caught.value.reason is Reason.STALE
    assert await trail.last() == last
    await trail.append(last.tree.size, larger)


async def test_a_row_that_commits_behind_later_ones_is_sealed_in_its_place(
    database: Database, store: Pool, hsm: TokenHsm, admin: psycopg.Connection[Any], memory: CheckpointFile
) -> None:
    await check_epoch(store, RECORDS)
    sealing = await sealing_of(store, hsm, memory)
    before = await sealing.seal()
    with psycopg.connect(database.admin_dsn) as slow:
        slow.execute(EVENT)
        write(admin)
        # Nothing is sealed that stands behind the row that can still come.
        assert await sealing.seal() == before
    assert await sealing.seal() == before + 7
    write(admin)
    assert await sealing.seal() == before + 13
    online = await VerifyTrail(StoredSealedTrail(store), sealing.key.reader).verify()
    assert (online.finding, online.unsealed) == (None, 0)
    assert checked(sealing.key.reader, await lines_of(database.dsn)) == online


async def test_a_backlog_is_sealed_in_several_checkpoints(
    database: Database,
    store: Pool,
    hsm: TokenHsm,
    admin: psycopg.Connection[Any],
    memory: CheckpointFile,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(app_sealing, "_ROWS_SEALED_MAX", 4)
    monkeypatch.setattr(app_sealing, "_ROWS_READ_MAX", 3)
    await check_epoch(store, RECORDS)
    sealing = await sealing_of(store, hsm, memory)
    write(admin, 9)
    await sealing.seal()
    report = checked(sealing.key.reader, await lines_of(database.dsn))
    assert report.finding is None
    assert report.checkpoints >= 4
    assert report.verified_size == 21  # 18, the two of the key itself, and that a memory begins


async def test_a_checkpoint_that_somebody_changed_is_not_gone_on_from(
    store: Pool, hsm: TokenHsm, admin: psycopg.Connection[Any], memory: CheckpointFile
) -> None:
    await check_epoch(store, RECORDS)
    sealing = await sealing_of(store, hsm, memory)
    await sealing.seal()
    admin.execute("UPDATE audit.checkpoints SET epoch = 7")
    write(admin)
    with pytest.raises(HistoryError, match=r"found a row of .* rows in epoch 7 with its note"):
        await sealing.seal()


async def test_the_file_outside_is_repaired_and_completed(
    store: Pool, hsm: TokenHsm, admin: psycopg.Connection[Any], memory: CheckpointFile
) -> None:
    await check_epoch(store, RECORDS)
    sealing = await sealing_of(store, hsm, memory)
    for _ in range(3):
        write(admin, 1)
        await sealing.seal()
    whole = memory.path.read_bytes()
    assert len(whole.splitlines()) == 3
    memory.path.write_bytes(whole[: whole.index(b"\n") + 40])
    await sealing.follow()
    assert memory.path.read_bytes() == whole
    memory.path.write_bytes(b"something else\n")
    with pytest.raises(HistoryError, match="to end in a checkpoint"):
        await sealing.follow()


async def test_another_worker_takes_over_when_the_one_that_seals_is_gone(
    database: Database, store: Pool, hsm: TokenHsm, admin: psycopg.Connection[Any], memory: CheckpointFile
) -> None:
    await check_epoch(store, RECORDS)
    made = await sealing_of(store, hsm, memory)
    began: list[str] = []

    def worker(name: str) -> Any:  # noqa: ANN401  # what `running` returns
        async def sealing() -> app_sealing.Sealing:
            began.append(name)
            return made

        async def following() -> app_sealing.Sealing:
            return made

        sealer = Sealer(connection_settings(database.dsn), sealing, following, 0.05, HistoryWatch())
        return JobRunner().running(Job("checkpoints", 5.0, sealer.serve_term))

    async with worker("first"):
        await asyncio.to_thread(soon, lambda: began == ["first"])
        async with worker("second"):
            await asyncio.sleep(1.2)
            assert began == ["first"]
            admin.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND granted"
                " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
            )
            write(admin)
            await asyncio.to_thread(soon, lambda: began[1:2] == ["second"])


async def test_after_a_restore_the_trail_goes_on_and_what_was_lost_is_told(
    database: Database, store: Pool, hsm: TokenHsm, admin: psycopg.Connection[Any], other: str,
    postgres: EmbeddedPostgres, tmp_path: Path, memory: CheckpointFile,
) -> None:  # fmt: skip
    await check_epoch(store, RECORDS)
    sealing = await sealing_of(store, hsm, memory)
    write(admin)
    kept = await sealing.seal()
    file, _ = backup(database.admin_dsn, tmp_path / "backup")
    write(admin)
    lost = await sealing.seal()
    await asyncio.to_thread(restore, other, file, mac=mac)
    service = make_conninfo(other, user="kms_service", password=postgres.service_password())
    async with open_pool(service, 2) as pool:
        again = replace(await sealing_of(pool, hsm, memory), key=sealing.key)
        with psycopg.connect(other, autocommit=True) as restored:
            write(restored)
        await again.follow()
        assert await again.seal() > kept
        assert (await VerifyTrail(StoredSealedTrail(pool), sealing.key.reader).verify()).finding is None
    report = checked(sealing.key.reader, await lines_of(service), tuple(finished_lines(memory.path)))
    assert (report.finding, report.unsealed) == (None, 0)
    assert report.rollbacks == (Rollback(1, lost, 2, kept),)
    assert report.epochs == (EpochStart(2, kept),)
    unnamed = judged(report, 0, ()).finding
    assert unnamed is not None
    assert (unnamed.difference, unnamed.after_size, unnamed.by_size) == (Difference.ROLLED_BACK, kept, lost)
    assert judged(report, 0, {2}) == report


async def test_a_trail_that_was_rewritten_from_its_beginning_is_not_sealed(
    database: Database, store: Pool, hsm: TokenHsm, admin: psycopg.Connection[Any], memory: CheckpointFile
) -> None:
    await check_epoch(store, RECORDS)
    sealing = await sealing_of(store, hsm, memory)
    write(admin)
    await sealing.seal()
    admin.execute("UPDATE audit.security_events SET outcome = 'blocked'")
    admin.execute("TRUNCATE audit.checkpoints")
    another = restarted(sealing)  # as of a process that begins, with the file
    for refused in (another.follow, another.seal, sealing.seal):
        with pytest.raises(HistoryError, match="another history of the trail is not signed"):
            await refused()
    # Only by a new epoch does it go on, and that is told.
    admin.execute("INSERT INTO cryptography.epochs SELECT 2, 'RESTORED', now(), NULL, l.* FROM cryptography.location() AS l")
    await another.follow()
    size = await sealing.seal()
    online = await VerifyTrail(StoredSealedTrail(store), sealing.key.reader).verify()
    offline = checked(sealing.key.reader, await lines_of(database.dsn), tuple(finished_lines(memory.path)))
    for report in (online, offline):
        assert (report.verified_size, report.finding, report.epochs) == (size, None, (EpochStart(2, 0),))
        unnamed = judged(report, 0, {1}).finding
        assert unnamed is not None
        assert unnamed.difference is Difference.ROLLED_BACK


async def test_who_holds_the_file_is_waited_for(
    store: Pool, hsm: TokenHsm, admin: psycopg.Connection[Any], memory: CheckpointFile
) -> None:
    await check_epoch(store, RECORDS)
    sealing = await sealing_of(store, hsm, memory)
    write(admin, 1)
    await sealing.seal()
    with memory.path.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        waiting = asyncio.create_task(sealing.follow())
        assert await asyncio.wait({waiting}, timeout=0.2) == (set(), {waiting})
    await waiting
    assert len(list(finished_lines(memory.path))) == 1


async def test_an_epoch_raises_the_order_above_everything_that_is_there(
    database: Database, store: Pool, hsm: TokenHsm, admin: psycopg.Connection[Any], memory: CheckpointFile, other: str,
    postgres: EmbeddedPostgres, tmp_path: Path,
) -> None:  # fmt: skip
    await check_epoch(store, RECORDS)
    sealing = await sealing_of(store, hsm, memory)
    # Rows of a cluster that had seen far more transactions: the order of a dump is higher than any transaction here.
    write(admin)
    admin.execute("UPDATE audit.security_events SET commit_order = commit_order + 1000000000")
    admin.execute("UPDATE audit.domain_events SET commit_order = commit_order + 1000000000")
    file, _ = backup(database.admin_dsn, tmp_path / "backup")
    await asyncio.to_thread(restore, other, file, mac=mac)
    service = make_conninfo(other, user="kms_service", password=postgres.service_password())
    with psycopg.connect(other, autocommit=True) as restored:
        write(restored, 1)
        row = restored.execute(
            "SELECT count(*) FILTER (WHERE commit_order > 1000000000), count(*), audit.order_base() FROM audit.security_events"
        ).fetchone()
        assert row is not None
        assert row[0] == row[1]
        assert row[2] > 900_000_000
    async with open_pool(service, 2) as pool:
        again = replace(await sealing_of(pool, hsm, CheckpointFile(tmp_path / "there")), key=sealing.key)
        await again.seal()
        report = await VerifyTrail(StoredSealedTrail(pool), sealing.key.reader).verify()
        assert (report.finding, report.unsealed) == (None, 0)


async def test_where_a_partition_was_archived_verifying_begins_behind_it(
    database: Database, store: Pool, hsm: TokenHsm, admin: psycopg.Connection[Any], memory: CheckpointFile, tmp_path: Path
) -> None:
    await check_epoch(store, RECORDS)
    sealing = await sealing_of(store, hsm, memory)
    admin.execute(OLD)
    first = await sealing.seal()
    write(admin)
    last = await sealing.seal()
    await asyncio.to_thread(archive, database.admin_dsn, date(2024, 2, 1), tmp_path)
    report = checked(sealing.key.reader, await lines_of(database.dsn))
    assert (report.finding, report.begun_at, report.verified_size) == (None, first, last)
    assert judged(report, first, ()) == report
    for begins_at in (0, first - 1, first + 1):
        finding = judged(report, begins_at, ()).finding
        assert finding is not None
        assert finding.difference is Difference.ROWS_LEFT_OUT
    online = await VerifyTrail(StoredSealedTrail(store), sealing.key.reader).verify()
    assert online == report


async def test_where_a_partition_was_archived_twice_verifying_begins_behind_both(
    database: Database, store: Pool, hsm: TokenHsm, admin: psycopg.Connection[Any], memory: CheckpointFile, tmp_path: Path
) -> None:
    await check_epoch(store, RECORDS)
    sealing = await sealing_of(store, hsm, memory)
    sizes = []
    for _ in range(2):
        admin.execute(OLD)
        sizes.append(await sealing.seal())
        admin.execute(b"SELECT audit.drain_default()")
        await asyncio.to_thread(archive, database.admin_dsn, date(2024, 2, 1), tmp_path)
        write(admin)
        sizes.append(await sealing.seal())
        report = checked(sealing.key.reader, await lines_of(database.dsn))
        assert (report.finding, report.begun_at, report.verified_size) == (None, sizes[-2], sizes[-1])
        assert await VerifyTrail(StoredSealedTrail(store), sealing.key.reader).verify() == report


async def test_where_rows_were_archived_before_they_were_sealed_the_others_still_verify(
    database: Database, store: Pool, hsm: TokenHsm, admin: psycopg.Connection[Any], memory: CheckpointFile, tmp_path: Path
) -> None:
    await check_epoch(store, RECORDS)
    sealing = await sealing_of(store, hsm, memory)
    write(admin)
    admin.execute(OLD)
    first = await sealing.seal()
    admin.execute(OLD)
    await asyncio.to_thread(archive, database.admin_dsn, date(2024, 2, 1), tmp_path)
    report = checked(sealing.key.reader, await lines_of(database.dsn))
    assert (report.finding, report.begun_at, report.unsealed) == (None, first, 0)
    write(admin)
    last = await sealing.seal()
    assert last is not None
    again = await VerifyTrail(StoredSealedTrail(store), sealing.key.reader).verify()
    assert (again.finding, again.verified_size) == (None, last)


async def test_a_trail_without_its_first_rows_is_not_taken_for_an_archived_one(
    database: Database, store: Pool, hsm: TokenHsm, admin: psycopg.Connection[Any], memory: CheckpointFile
) -> None:
    await check_epoch(store, RECORDS)
    sealing = await sealing_of(store, hsm, memory)
    admin.execute(OLD)
    await sealing.seal()
    admin.execute("DROP TABLE audit.security_events_2024_01")
    finding = checked(sealing.key.reader, await lines_of(database.dsn)).finding
    assert finding is not None
    assert finding.difference is Difference.ROW_REMOVED


async def test_the_status_tells_what_waits(
    store: Pool, hsm: TokenHsm, admin: psycopg.Connection[Any], memory: CheckpointFile
) -> None:
    await check_epoch(store, RECORDS)
    trail = StoredSealedTrail(store)
    assert (await trail.status()).seconds_since is None
    sealing = await sealing_of(store, hsm, memory)
    size = await sealing.seal()
    write(admin, 2)
    status = await trail.status()
    assert (status.tree_size, status.waiting) == (size, 4)
    assert status.seconds_since is not None
    assert 0 <= status.seconds_since < 60


def test_rows_that_wait_too_long_are_a_warning_until_they_are_sealed() -> None:
    watch = SealWatch(5.0)
    for now, size, waiting, is_late in (
        (100, 10, 0, False),
        (200, 10, 3, False),
        (234, 10, 9, False),
        (236, 10, 9, True),
        (237, 19, 4, False),
        (272, 23, 1, False),
        (273, 23, 0, False),
        (999, 23, 1, False),
    ):
        watch.see(SealStatus(size, 1.0, waiting), now)
        assert watch.is_late == is_late, now
