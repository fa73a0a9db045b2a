"""The trail verified against its checkpoints, and written out for somebody who verifies it elsewhere."""

from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Final

from kms.app.trail_ports import SealedTrail
from kms.domain.errors import KmsError, malformed
from kms.domain.trail_check import NoteReader, OutsideNotes, TrailCheck, TrailReport, epoch_starts
from kms.domain.trail_lines import (
    ORDER_MIN,
    Beginning,
    End,
    Leaf,
    Note,
    RowPlace,
    Unplaced,
    beginning_line,
    end_line,
    note_line,
    parse_line,
    place_before,
    unplaced_line,
)

_ROWS_READ_MAX: Final = 500
_NOTES_READ_MAX: Final = 500


@dataclass(frozen=True, slots=True)
class VerifyTrail:
    """Verifies the trail in the database."""

    trail: SealedTrail
    reader: NoteReader

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


async def exported(trail: SealedTrail, after_size: int = 0) -> AsyncIterator[str]:
    """Yield the lines of the trail: rows in their order, each checkpoint behind its rows, and last what is not sealed.

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
    async for _, line in _lines(trail, place, None):
        yield line
    yield end_line(End(await trail.next_order()))


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
    reader: NoteReader, lines: Callable[[], Iterable[bytes]], outside: Callable[[], Iterable[bytes]] = tuple
) -> TrailReport:
    """Verify an exported trail, and against the checkpoints that were kept *outside*: both as lines without their ends.

    Each is read twice from the beginning, and nothing of it kept: the first time for where epochs went on.
    """
    starts = epoch_starts(reader, _readable_notes(lines())) | epoch_starts(reader, _readable_notes(outside()))
    kept = OutsideNotes(reader, map(_outside_note, outside()), starts)
    rest = iter(lines())
    first = next(rest, None)
    beginning = None if first is None else _parsed(first)
    check = TrailCheck(reader, beginning if isinstance(beginning, Beginning) else None, kept)
    if first is not None and not isinstance(beginning, Beginning):
        rest = chain((first,), rest)
    for line in rest:
        _take(check, line)
    return check.report(kept.rollbacks)


def _take(check: TrailCheck, line: bytes) -> None:
    found = _parsed(line)
    if isinstance(found, Leaf):
        check.row(found)
    elif isinstance(found, Note):
        check.note(found.text)
    elif isinstance(found, Unplaced):
        check.unplaced(found)
    elif isinstance(found, End):
        check.end(found)
    else:
        check.unreadable("expected a row or a note" if found is None else "a beginning stands in the middle")


def _parsed(line: bytes) -> Leaf | Unplaced | Note | Beginning | End | None:
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
