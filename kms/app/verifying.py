"""The trail verified against its checkpoints, and written out for somebody who verifies it elsewhere."""

from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Final
from uuid import UUID

from kms.app.trail_ports import KeyHistories, KeyTable, SealedTrail
from kms.domain.errors import KmsError, malformed
from kms.domain.key_check import KeyComparison, KeyReport
from kms.domain.trail_check import NoteReader, OutsideNotes, TrailCheck, TrailReport, epoch_starts
from kms.domain.trail_lines import (
    ORDER_MIN,
    Beginning,
    End,
    KeyRow,
    KeysEnd,
    Leaf,
    Line,
    Note,
    RowPlace,
    Unplaced,
    beginning_line,
    end_line,
    key_line,
    keys_end_line,
    note_line,
    parse_line,
    place_before,
    unplaced_line,
)

_ROWS_READ_MAX: Final = 500
_NOTES_READ_MAX: Final = 500
_KEYS_READ_MAX: Final = 1000
# Of each key the trail is read, too.
_KNOWN_KEYS_READ_MAX: Final = 100


@dataclass(frozen=True, slots=True)
class VerifyTrail:
    """Verifies the trail in the database, and the keys against it; without *keys* the trail alone."""

    trail: SealedTrail
    reader: NoteReader
    keys: KeyTable | None = None

    async def compare_keys(self, after: UUID | None = None, *, keys_max: int) -> KeyReport | None:
        """Compare the keys with ids above *after* with the trail, about *keys_max* of them; None where there are no keys to read.

        Each key's row is read together with the entries about it, so it fits while keys are used and changed. All entries in the
        database count, whatever range was verified. Raises STORE_UNAVAILABLE.
        """
        if self.keys is None:
            return None
        comparison, read = KeyComparison(is_whole=await self.trail.at_most(0) is None), 0
        while read < keys_max:
            page = await self.keys.known(after, _KNOWN_KEYS_READ_MAX)
            for each in page:
                if each.history is None:
                    comparison.skipped()
                elif each.row is None:
                    comparison.missing(each.key_id, each.history)
                else:
                    comparison.row(each.key_id, each.row, each.history)
                after, read = each.key_id, read + 1
            if len(page) < _KNOWN_KEYS_READ_MAX:
                return comparison.report()
        return comparison.report(after)

    async def verify(self, from_size: int = 0, to_size: int | None = None) -> TrailReport:
        """Compare the rows with the checkpoints, from the newest with at most *from_size* rows to the first with *to_size*.

        It begins later where earlier rows were archived; the report says where. None goes on to the end, and then counts the
        rows behind the last checkpoint. Raises STORE_UNAVAILABLE.
        """
        start = await self.trail.at_most(from_size)
        check = TrailCheck(self.reader, None if start is None else Beginning(start.tree, start.note))
        for row in await self.trail.unplaced():
            check.unplaced(row)
        place, size = place_before(0 if start is None else start.horizon), 0 if start is None else start.tree.size
        await self._rows(check, place_before(ORDER_MIN), 0)
        async for horizon, note in _notes(self.trail, size):
            if check.finding is not None or (to_size is not None and check.size >= to_size):
                return check.report()
            place = await self._rows(check, place, horizon)
            check.note(note)
        if to_size is None:
            await self._rows(check, place, None)
            check.end(End(await self.trail.next_order()))
        return check.report()

    async def _rows(self, check: TrailCheck, place: RowPlace, below: int | None) -> RowPlace:
        while check.finding is None and (leaves := await self.trail.leaves(place, below, _ROWS_READ_MAX)):
            for leaf in leaves:
                check.row(leaf)
            place = leaves[-1].place
        return place


async def exported(trail: SealedTrail, after_size: int = 0, keys: KeyTable | None = None) -> AsyncIterator[str]:
    """Yield the lines of the trail: rows in their order, each checkpoint behind its rows, what is not sealed, and the keys.

    It begins behind the newest checkpoint with at most *after_size* rows, or later where earlier rows were archived; a line
    at the beginning says so. Rows of an order that no transaction has, below 0, and rows without one are never left out (of the
    latter one of each table is told). Raises STORE_UNAVAILABLE.
    """
    start = await trail.at_most(after_size)
    place, size = place_before(0), 0
    if start is not None:
        place, size = place_before(start.horizon), start.tree.size
        yield beginning_line(Beginning(start.tree, start.note))
    for row in await trail.unplaced():
        yield unplaced_line(row)
    async for _, line in _lines(trail, place_before(ORDER_MIN), 0):
        yield line
    async for horizon, note in _notes(trail, size):
        async for place, line in _lines(trail, place, horizon):  # noqa: B007, B020  # on from the last
            yield line
        yield note_line(note)
    horizon = await trail.horizon()
    async for _, line in _lines(trail, place, None):
        yield line
    yield end_line(End(await trail.next_order()))
    if keys is not None:
        async for line in _keys(keys, horizon):
            yield line


async def _keys(keys: KeyTable, horizon: int) -> AsyncIterator[str]:
    """Yield the lines of the keys. All rows of the trail below *horizon* were read after it was.

    Keys are used and changed meanwhile. Every transaction below the horizon had ended, so those rows were complete. What came
    later about a key is read in one statement with its row: both are of one moment, whatever of it was among the rows already.
    One transaction for the whole export would be as exact. But the versions that it keeps of a key in use would make each further
    use slower, for as long as it takes.
    """
    after, count = None, 0
    while page := await keys.page(after, horizon, _KEYS_READ_MAX):
        for each in page:
            yield key_line(each.row, each.changes, each.used)
        after, count = page[-1].key_id, count + len(page)
    yield keys_end_line(KeysEnd(count))


async def _lines(trail: SealedTrail, place: RowPlace, below: int | None) -> AsyncIterator[tuple[RowPlace, str]]:
    """Yield the rows behind *place*, each with its own."""
    while rows := await trail.lines(place, below, _ROWS_READ_MAX):
        for row in rows:
            yield row
        place = rows[-1][0]


async def _notes(trail: SealedTrail, size: int) -> AsyncIterator[tuple[int, str]]:
    """Yield horizon and note of each checkpoint with more than *size* rows."""
    while found := await trail.notes(size, _NOTES_READ_MAX):
        for _, horizon, note in found:
            yield horizon, note
        size = found[-1][0]


def verify_lines(
    reader: NoteReader,
    lines: Callable[[], Iterable[bytes]],
    outside: Callable[[], Iterable[bytes]] = tuple,
    histories: KeyHistories | None = None,
) -> TrailReport:
    """Verify an exported trail, and against the checkpoints that were kept *outside*: both as lines without their ends.

    Each is read twice from the beginning, the first time for where epochs went on. Nothing of it is kept but *histories*, which
    is empty at first; without it the keys are not compared.
    """
    starts = epoch_starts(reader, _readable_notes(lines())) | epoch_starts(reader, _readable_notes(outside()))
    kept = OutsideNotes(reader, map(_outside_note, outside()), starts)
    rest = iter(lines())
    first = next(rest, None)
    beginning = None if first is None else _parsed(first)
    check = TrailCheck(reader, beginning if isinstance(beginning, Beginning) else None, kept)
    keys = None if histories is None else _ExportedKeys(check, histories)
    if first is not None and not isinstance(beginning, Beginning):
        rest = chain((first,), rest)
    for line in rest:
        _take(check, keys, _parsed(line))
    found = None if keys is None else keys.report()
    return replace(check.report(kept.rollbacks), keys=found)


@dataclass(slots=True)
class _ExportedKeys:
    """The keys of an export, compared with the rows before them. The first key ends what the rows say, so it changes."""

    check: TrailCheck
    histories: KeyHistories
    count: int = 0
    has_ended: bool = False
    _comparison: KeyComparison = field(init=False)

    def __post_init__(self) -> None:
        self._comparison = KeyComparison(is_whole=self.check.begun_at == 0)

    def row(self, leaf: Leaf) -> None:
        """Take a row of the trail that the check has taken."""
        if leaf.entry is not None:
            self.histories.take(leaf.entry, self.check.size)

    def key(self, found: KeyRow) -> None:
        """Take a key."""
        self.count += 1
        for entry in found.later:
            self.histories.take(entry, self.check.size + 1)
        if self.has_ended or not self.histories.see(found.key_id):
            self.check.unreadable(f"the key {found.key_id} stands twice, or behind the end of the keys")
        self._comparison.row(found.key_id, found.row, self.histories.find(found.key_id, self.check.sealed_size))

    def end(self, end: KeysEnd) -> None:
        """Take the end of the keys."""
        if self.has_ended or end.count != self.count:
            self.check.unreadable(f"{end.count} keys were exported, and {self.count} are here")
        self.has_ended = True

    def report(self) -> KeyReport | None:
        """Return what was found, or None where the export has no keys."""
        if not self.has_ended:
            if self.count:
                self.check.unreadable("the end of the keys is missing")
            return None
        for key_id in self.histories.unseen():
            self._comparison.missing(key_id, self.histories.find(key_id, self.check.sealed_size))
        return self._comparison.report()


def _take(check: TrailCheck, keys: _ExportedKeys | None, found: Line | None) -> None:
    if isinstance(found, Leaf):
        check.row(found)
        if keys is not None:
            keys.row(found)
    elif isinstance(found, Note):
        check.note(found.text)
    elif isinstance(found, Unplaced):
        check.unplaced(found)
    elif isinstance(found, End):
        check.end(found)
    elif isinstance(found, KeyRow | KeysEnd):
        if keys is not None:
            keys.key(found) if isinstance(found, KeyRow) else keys.end(found)
    else:
        check.unreadable("expected a row, a note or a key" if found is None else "a beginning stands in the middle")


def _parsed(line: bytes) -> Line | None:
    try:
        return parse_line(line)
    except KmsError:
        return None


def _readable_notes(lines: Iterable[bytes]) -> Iterator[str]:
    for line in lines:
        # A row is not parsed for this.
        if line.startswith(b'{"note":') and isinstance(found := _parsed(line), Note):
            yield found.text


def _outside_note(line: bytes) -> str:
    found = parse_line(line)
    if not isinstance(found, Note):
        raise malformed("line", "expected a note")
    return found.text
