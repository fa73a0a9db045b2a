"""Whether a trail is what its checkpoints say: rows and notes go in one after the other, a report comes out.

Nothing is kept of a row but the tree's frontier, so that a trail of any length is checked in the same memory.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Final

from kms.domain.checkpoint import Checkpoint, VerifierKey, parse_note
from kms.domain.errors import KmsError, malformed
from kms.domain.key_check import KeyReport
from kms.domain.merkle import Frontier
from kms.domain.trail_lines import ORDER_MIN, Beginning, End, Leaf, RowPlace, Unplaced

_LEAVES_HELD_MAX: Final = 1000
# SPKI PEM, what was signed, the signature.
SignatureCheck = Callable[[str, bytes, bytes], bool]


class Difference(StrEnum):
    """How a trail differs from its checkpoints, as far as that can be told."""

    ROW_CHANGED = "ROW_CHANGED"
    ROW_REMOVED = "ROW_REMOVED"
    ROW_INSERTED = "ROW_INSERTED"
    ROWS_REORDERED = "ROWS_REORDERED"
    TRAIL_TRUNCATED = "TRAIL_TRUNCATED"
    CHECKPOINT_CHANGED = "CHECKPOINT_CHANGED"
    CHECKPOINT_REMOVED = "CHECKPOINT_REMOVED"
    ROLLED_BACK = "ROLLED_BACK"
    ROWS_LEFT_OUT = "ROWS_LEFT_OUT"
    NOT_SEALED = "NOT_SEALED"


@dataclass(frozen=True, slots=True)
class Finding:
    """The first difference: behind the row number `after_size`, which is as it was, and at or before `by_size`.

    `by_size` is None where no checkpoint says how far it reaches.
    """

    difference: Difference
    after_size: int
    by_size: int | None
    message: str


@dataclass(frozen=True, slots=True)
class Rollback:
    """What a restore lost: checkpoints of `epoch` reached `reached` rows, and `next_epoch` goes on from `goes_on_from`."""

    epoch: int
    reached: int
    next_epoch: int
    goes_on_from: int


@dataclass(frozen=True, slots=True)
class EpochStart:
    """An epoch that began within the trail, or with it: `epoch` goes on from `goes_on_from` rows. The first is none."""

    epoch: int
    goes_on_from: int


@dataclass(frozen=True, slots=True)
class TrailReport:
    """What came of a check. `verified_size` rows are what the checkpoints say, but for the first `begun_at`.

    Those were not looked at. `unsealed` rows stand behind the last checkpoint. `keys` is None where no keys were compared.
    """

    begun_at: int
    verified_size: int
    checkpoints: int
    unsealed: int
    epochs: tuple[EpochStart, ...]
    rollbacks: tuple[Rollback, ...]
    finding: Finding | None
    keys: KeyReport | None = None


def judged(report: TrailReport, begins_at: int, restored: Collection[int]) -> TrailReport:
    """Return *report* with a finding where it has none and something in it was not named by whoever asked.

    That is a trail that does not begin at *begins_at* rows, an epoch that is not one of those that an administrator began
    (*restored*), and rows without any checkpoint.
    """
    if report.finding is not None:
        return report
    return replace(report, finding=_left_out(report, begins_at) or _rolled_back(report, restored) or _not_sealed(report))


def _left_out(report: TrailReport, begins_at: int) -> Finding | None:
    if report.begun_at == begins_at:
        return None
    told = f"the trail begins at {report.begun_at} rows, and it was not said that it begins there"
    return Finding(Difference.ROWS_LEFT_OUT, 0, max(begins_at, report.begun_at), told)


def _rolled_back(report: TrailReport, restored: Collection[int]) -> Finding | None:
    for each in report.rollbacks:
        if each.next_epoch not in restored:
            told = f"epoch {each.next_epoch} took back what epoch {each.epoch} had, and it was not said that there was a restore"
            return Finding(Difference.ROLLED_BACK, each.goes_on_from, each.reached, told)
    for start in report.epochs:
        if start.epoch not in restored:
            told = f"epoch {start.epoch} goes on from {start.goes_on_from} rows, and it was not said that there was a restore"
            return Finding(Difference.ROLLED_BACK, start.goes_on_from, None, told)
    return None


def _not_sealed(report: TrailReport) -> Finding | None:
    if report.checkpoints or not report.unsealed:
        return None
    return Finding(Difference.NOT_SEALED, report.begun_at, None, f"no checkpoint covers the {report.unsealed} rows that are here")


@dataclass(frozen=True, slots=True)
class NoteReader:
    """Opens notes that are signed by `key`."""

    key: VerifierKey
    is_valid: SignatureCheck

    def open(self, note: str) -> Checkpoint:
        """Return what *note* says, or raise MALFORMED where it is none or its signature is not of the key."""
        found = parse_note(note, self.key)
        if not self.is_valid(self.key.pem(), found.signed, found.signature):
            raise malformed("note", "its signature is not valid")
        if found.checkpoint.origin != self.key.name:
            raise malformed("note", f"expected the origin {self.key.name}")
        return found.checkpoint


@dataclass(slots=True)
class OutsideNotes:
    """Notes that were kept outside the database, in their order, without those that a restore took back.

    `starts` says from which size each epoch went on. It notes what it leaves out, so it changes.
    """

    reader: NoteReader
    notes: Iterable[str]
    starts: Mapping[int, int]
    reached: dict[int, int] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Checkpoint]:
        """Yield what the notes say. Raises MALFORMED for one that is not signed, and for one in the wrong place."""
        before = 0
        for note in self.notes:
            found = self.reader.open(note)
            if found.tree_size > self._limit(found.epoch):
                self.reached[found.epoch] = max(found.tree_size, self.reached.get(found.epoch, 0))
            elif found.tree_size <= before:
                raise malformed("note", f"a checkpoint of {found.tree_size} rows follows one of {before}")
            else:
                before = found.tree_size
                yield found

    def rollbacks(self) -> tuple[Rollback, ...]:
        """Return what was left out, now that all notes were looked at."""
        found: list[Rollback] = []
        for epoch, reached in sorted(self.reached.items()):
            later = sorted((number, size) for number, size in self.starts.items() if number > epoch and size < reached)
            found += [Rollback(epoch, reached, number, size) for number, size in later]
        return tuple(found)

    def _limit(self, epoch: int) -> float:
        return min((size for later, size in self.starts.items() if later > epoch), default=float("inf"))


def epoch_starts(reader: NoteReader, notes: Iterable[str]) -> dict[int, int]:
    """Return from which size each epoch of *notes* went on; what cannot be read is left to the check itself."""
    starts: dict[int, int] = {}
    for note in notes:
        try:
            # The signature of the first of an epoch is looked at, not that of each.
            if (found := parse_note(note, reader.key).checkpoint).epoch not in starts:
                starts[found.epoch] = reader.open(note).previous_size
        except KmsError:
            continue
    return starts


class TrailCheck:
    """The check of one trail. After the first difference it takes no notice of what follows."""

    def __init__(self, reader: NoteReader, beginning: Beginning | None = None, outside: Iterable[Checkpoint] = ()) -> None:
        self._reader = reader
        self._tree = beginning.frontier if beginning is not None else Frontier()
        self._begun_at = self._sealed_at = self._held_at = self._tree.size
        self._held: list[bytes] = []
        self._last: RowPlace | None = None
        self._highest = ORDER_MIN
        self._is_reordered = False
        self._checkpoints = 0
        self._epoch = 1
        self._epochs: list[EpochStart] = []
        self._outside_at = 0
        self._outside = iter(outside)
        self._awaited: Checkpoint | None = None
        self.finding: Finding | None = None
        if beginning is not None:
            self._begin(beginning)
        self._await_outside()

    @property
    def size(self) -> int:
        """How many rows the trail has so far, with those that were left out."""
        return self._tree.size + len(self._held)

    @property
    def sealed_size(self) -> int:
        """How many rows the last checkpoint so far covers."""
        return self._sealed_at

    @property
    def begun_at(self) -> int:
        """How many rows were left out at the beginning."""
        return self._begun_at

    def row(self, leaf: Leaf) -> None:
        """Take the next row."""
        if self.finding is not None:
            return
        self._is_reordered |= self._last is not None and leaf.place <= self._last
        self._last = leaf.place
        self._highest = max(self._highest, leaf.place.order)
        self._held.append(leaf.hash)
        if self._awaited is not None and self.size == self._awaited.tree_size:
            self._check_outside(self._awaited)
        elif len(self._held) >= _LEAVES_HELD_MAX:
            self._grow()

    def unplaced(self, row: Unplaced) -> None:
        """Take a row without an order."""
        if self.finding is None:
            told = f"the row {row.row_id} of {row.table} has no order, and every row that the service wrote has one"
            self._find(Difference.ROW_INSERTED, None, told)

    def note(self, note: str) -> None:
        """Take the note that stands behind the rows so far."""
        if self.finding is not None:
            return
        try:
            found = self._reader.open(note)
        except KmsError as error:
            self._find(Difference.CHECKPOINT_CHANGED, None, error.message)
            return
        self._compare(found)
        if self.finding is None and found.previous_size != self._sealed_at:
            told = f"the checkpoint before had {found.previous_size} rows, and the one that is there has {self._sealed_at}"
            self._find(Difference.CHECKPOINT_REMOVED, found.tree_size, told)
        if self.finding is None:
            self._checkpoints += 1
            if found.epoch != self._epoch:
                self._epoch = found.epoch
                self._epochs.append(EpochStart(found.epoch, found.previous_size))
            self._sealed_at = self._held_at = found.tree_size

    def end(self, end: End) -> None:
        """Take the end, behind the last row."""
        if self.finding is None and self._highest >= end.next_order:
            told = f"a row has the order {self._highest}, and no transaction had reached {end.next_order}"
            self._find(Difference.ROW_INSERTED, None, told)

    def unreadable(self, message: str) -> None:
        """Take a line that is none."""
        if self.finding is None:
            self._find(Difference.ROW_CHANGED, None, message)

    def report(self, rollbacks: Callable[[], tuple[Rollback, ...]] = tuple) -> TrailReport:
        """Return what was found, now that the trail has ended. *rollbacks* is asked when all notes of outside were taken."""
        if self.finding is None and self._awaited is not None:
            told = f"a checkpoint of {self._awaited.tree_size} rows was kept outside, and the trail has {self.size}"
            self._find(Difference.TRAIL_TRUNCATED, self._awaited.tree_size, told)
        if self.finding is None and self._outside_at > self._sealed_at:
            told = f"a checkpoint of {self._outside_at} rows was kept outside, and is not in the trail"
            self._find(Difference.CHECKPOINT_REMOVED, self._outside_at, told)
        unsealed = 0 if self.finding is not None else self.size - self._sealed_at
        epochs = tuple(self._epochs)
        return TrailReport(self._begun_at, self._held_at, self._checkpoints, unsealed, epochs, rollbacks(), self.finding)

    def _begin(self, beginning: Beginning) -> None:
        try:
            found = self._reader.open(beginning.note)
        except KmsError as error:
            self._find(Difference.CHECKPOINT_CHANGED, None, error.message)
            return
        self._epoch = found.epoch
        self._compare(found)

    def _compare(self, found: Checkpoint) -> None:
        self._grow()
        difference = self._tree.size - found.tree_size
        if difference < 0:
            self._find(Difference.ROW_REMOVED, found.tree_size, f"{-difference} of {found.tree_size} rows are missing")
        elif difference > 0:
            self._find(Difference.ROW_INSERTED, found.tree_size, f"there are {difference} rows more than {found.tree_size}")
        elif self._tree.root() != found.root_hash:
            kind = Difference.ROWS_REORDERED if self._is_reordered else Difference.ROW_CHANGED
            self._find(kind, found.tree_size, "the rows are as many as they were, but not the same")

    def _check_outside(self, found: Checkpoint) -> None:
        self._compare(found)
        if self.finding is None:
            self._outside_at = self._held_at = found.tree_size
            self._await_outside()

    def _await_outside(self) -> None:
        """Look for the next note of outside that is not behind us."""
        try:
            self._awaited = next((each for each in self._outside if each.tree_size > self.size), None)
        except KmsError as error:
            self._find(Difference.CHECKPOINT_CHANGED, None, f"outside: {error.message}")

    def _grow(self) -> None:
        self._tree = self._tree.extended(self._held)
        self._held.clear()

    def _find(self, difference: Difference, by_size: int | None, message: str) -> None:
        self.finding = Finding(difference, self._held_at, by_size, message)
