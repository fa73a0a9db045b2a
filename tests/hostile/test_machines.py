"""Several machines sign one trail, each with a memory of its own, while a database superuser rewrites what is between them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import psycopg
import pytest

from kms.app.sealing import Sealing
from kms.app.trail_ports import StoredCheckpoint
from kms.app.verifying import VerifyTrail
from kms.domain.history import HistoryError
from kms.hsm.token_hsm import TokenHsm
from kms.store.checkpoint_file import CheckpointFile, finished_lines
from kms.store.epoch import check_epoch
from kms.store.pool import Pool
from kms.store.sealed_trail import StoredSealedTrail
from tests.fixtures.postgres import Database
from tests.store.records import RECORDS
from tests.store.sealing import checked, lines_of, restarted, sealing_of, write

# Rows that no checkpoint of the database covers yet.
BEHIND: Final = "commit_order >= (SELECT max(horizon) FROM audit.checkpoints)"
EVENTS: Final = "SELECT event_type, severity FROM audit.security_events WHERE event_type LIKE 'audit.%' ORDER BY commit_order"
SIZES: Final = """
    SELECT event_details ->> 'tree_size' FROM audit.security_events
    WHERE event_type = 'audit.memory_begun' ORDER BY commit_order
"""
REMOVE_LAST: Final = """
    DELETE FROM audit.checkpoints WHERE tree_size = (SELECT max(tree_size) FROM audit.checkpoints) RETURNING note
"""
BEGUN: Final = ("audit.memory_begun", "high")
REFUSED: Final = ("audit.history_refused", "critical")
RESTORED: Final = ("audit.checkpoint_restored", "high")


class Killed(BaseException):
    """The process ends here."""


@dataclass(frozen=True, slots=True)
class NeverAppends(StoredSealedTrail):
    """What a process has that is killed between its file and the database."""

    async def append(self, previous_size: int, checkpoint: StoredCheckpoint) -> None:
        raise Killed


@dataclass(frozen=True, slots=True)
class Machines:
    """Two machines that have signed and followed the same three checkpoints."""

    first: Sealing
    second: Sealing
    admin: psycopg.Connection[Any]
    database: Database
    pool: Pool

    @property
    def files(self) -> list[CheckpointFile]:
        return [each.memory for each in (self.first, self.second) if isinstance(each.memory, CheckpointFile)]

    def rows(self, query: str) -> list[Any]:
        return self.admin.execute(query.encode()).fetchall()

    def events(self) -> list[Any]:
        """What is told of the history, without the beginnings of the two memories."""
        events = self.rows(EVENTS)
        assert events[:2] == [BEGUN, BEGUN]
        return events[2:]

    async def lose_a_note(self) -> None:
        """Write rows, and have the first machine sign them and be killed before the database has the checkpoint."""
        write(self.admin)
        dying = replace(restarted(self.first), trail=NeverAppends(self.pool))
        with pytest.raises(Killed):
            await dying.seal()

    async def check(self) -> None:
        """Check that the trail verifies, also with the memory of each machine."""
        for machine in (self.first, self.second):
            await restarted(machine).follow()
        assert (await VerifyTrail(self.first.trail, self.first.key.reader).verify()).finding is None
        lines = await lines_of(self.database.dsn)
        for file in self.files:
            assert checked(self.first.key.reader, lines, tuple(finished_lines(file.path))).finding is None


@pytest.fixture
def admin(database: Database) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(database.admin_dsn, autocommit=True) as connection:
        yield connection


@pytest.fixture
async def machines(database: Database, store: Pool, hsm: TokenHsm, admin: psycopg.Connection[Any], tmp_path: Path) -> Machines:
    await check_epoch(store, RECORDS)
    first = await sealing_of(store, hsm, CheckpointFile(tmp_path / "first"))
    second = await sealing_of(store, hsm, CheckpointFile(tmp_path / "second"))
    for _ in range(3):
        write(admin)
        await first.seal()
        await second.follow()
    made = Machines(first, second, admin, database, store)
    files = [file.path.read_bytes() for file in made.files]
    assert files[0] == files[1]
    return made


async def refuses(machines: Machines, machine: Sealing) -> None:
    """The machine refuses whenever it is asked, by whichever of its processes, and tells so once."""
    there = machines.rows("SELECT note FROM audit.checkpoints")
    told = machines.events().count(REFUSED)
    assert isinstance(machine.memory, CheckpointFile)
    remembered = machine.memory.path.read_bytes()
    for process in (machine, restarted(machine), restarted(machine)):
        for work in (process.seal, process.follow):
            with pytest.raises(HistoryError):
                await work()
    assert machines.rows("SELECT note FROM audit.checkpoints") == there
    assert machine.memory.path.read_bytes() == remembered
    assert machines.events().count(REFUSED) == told + 1


async def test_a_machine_that_has_only_followed_refuses_a_trail_that_was_cut_off(machines: Machines) -> None:
    machines.rows("""
        WITH cut AS (SELECT min(horizon) AS horizon FROM audit.checkpoints),
            rows AS (DELETE FROM audit.domain_events WHERE commit_order >= (SELECT horizon FROM cut) RETURNING id)
        DELETE FROM audit.checkpoints WHERE horizon > (SELECT horizon FROM cut) RETURNING (SELECT count(*) FROM rows)
    """)
    await refuses(machines, machines.second)


async def test_a_machine_that_follows_refuses_a_chain_with_a_gap(machines: Machines) -> None:
    for _ in range(3):
        write(machines.admin)
        await machines.first.seal()
    machines.rows("""
        DELETE FROM audit.checkpoints
        WHERE tree_size = (SELECT tree_size FROM audit.checkpoints ORDER BY tree_size DESC LIMIT 1 OFFSET 1) RETURNING 1
    """)
    with pytest.raises(HistoryError, match="the checkpoint after that of"):
        await machines.second.follow()


async def test_a_note_that_missed_the_database_is_put_there_as_it_is(machines: Machines) -> None:
    await machines.lose_a_note()
    remembered = machines.files[0].path.read_bytes()
    await restarted(machines.first).seal()
    assert machines.files[0].path.read_bytes().startswith(remembered)
    assert machines.events() == [RESTORED]
    await machines.check()


async def test_the_last_checkpoint_alone_removed_comes_back_where_nobody_has_seen_it(machines: Machines) -> None:
    last = machines.rows(REMOVE_LAST)
    await restarted(machines.first).seal()
    assert last[0] in machines.rows("SELECT note FROM audit.checkpoints")
    assert machines.events() == [RESTORED]
    await machines.check()


async def test_the_last_checkpoint_alone_removed_is_refused_by_who_has_seen_it(machines: Machines) -> None:
    machines.rows(REMOVE_LAST)
    for work in (machines.first.seal, machines.second.follow):
        with pytest.raises(HistoryError):
            await work()
    assert machines.events() == [REFUSED, REFUSED]  # each machine tells for itself


@pytest.mark.parametrize("change", ["UPDATE", "DELETE", "INSERT"])
async def test_a_note_that_missed_the_database_is_not_put_beside_rewritten_rows(machines: Machines, change: str) -> None:
    await machines.lose_a_note()
    statements = {
        "UPDATE": f"UPDATE audit.security_events SET action = 'forged' WHERE {BEHIND} RETURNING 1",
        "DELETE": f"DELETE FROM audit.domain_events WHERE {BEHIND} RETURNING 1",
        "INSERT": f"""
            INSERT INTO audit.security_events (event_type, severity, commit_order)
            SELECT 'forged', 'low', commit_order FROM audit.security_events WHERE {BEHIND} RETURNING 1""",
    }
    assert machines.rows(statements[change])
    await refuses(machines, machines.first)


async def test_a_machine_whose_note_came_too_late_goes_on_from_that_of_another(machines: Machines) -> None:
    await machines.lose_a_note()
    write(machines.admin)
    await machines.second.seal()
    write(machines.admin)
    await restarted(machines.first).seal()
    write(machines.admin)
    await machines.second.seal()
    assert machines.events() == []
    await machines.check()


async def test_a_machine_whose_note_came_too_late_refuses_another_history_that_a_second_has_signed(machines: Machines) -> None:
    await machines.lose_a_note()
    machines.rows(f"UPDATE audit.security_events SET action = 'forged' WHERE {BEHIND} RETURNING 1")
    write(machines.admin)
    await machines.second.seal()  # it cannot know
    await refuses(machines, machines.first)


async def test_rows_that_were_rewritten_for_the_second_machine_alone_are_refused_by_the_first(machines: Machines) -> None:
    await machines.lose_a_note()
    write(machines.admin)
    machines.admin.execute(f"CREATE TABLE public.saved AS SELECT * FROM audit.security_events WHERE {BEHIND}".encode())
    restored = "UPDATE audit.security_events AS e SET action = {value} FROM public.saved AS s WHERE s.id = e.id RETURNING 1"
    assert machines.rows(restored.format(value="'forged'"))
    await machines.second.seal()
    assert machines.rows(restored.format(value="s.action"))
    await refuses(machines, machines.first)


async def test_a_machine_that_remembers_nothing_tells_that_it_begins_where_no_checkpoint_is_left(
    machines: Machines, tmp_path: Path
) -> None:
    machines.admin.execute("TRUNCATE audit.checkpoints")
    third = restarted(replace(machines.first, memory=CheckpointFile(tmp_path / "third")))
    await third.seal()
    await third.seal()
    assert (machines.events(), machines.rows(SIZES)[-1]) == ([BEGUN], ("0",))
    # Who remembers does not follow it.
    await refuses(machines, machines.second)
