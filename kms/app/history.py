"""One history of the trail: what is in the database is compared with the checkpoints that this machine remembers.

    memory:    n ── s          the last note of the file
    database:  n ── s ── t     gone on from: another machine has signed t, and we take it over
    database:  n               somebody was killed between file and database: s is put back, if the rows still hash to it
    database:  n ──── t        the same, and another machine went on: fine, if n to s and s to t are the same rows
    database:  n ─ t           the same, and another machine was faster with fewer rows: fine, if the rows still hash to t and s
    database:  m               another history, or a shorter one: refused, unless an epoch has begun since s

A note is on disk before it is in the database, so that nobody can have seen a checkpoint that this machine does not remember.
"""

from dataclasses import dataclass
from typing import Final

from kms.app.trail_ports import (
    HistoryEvent,
    HistoryEvents,
    KeptNote,
    OpenMemory,
    SealedTrail,
    StoredCheckpoint,
)
from kms.domain.checkpoint import Checkpoint
from kms.domain.errors import KmsError, Reason
from kms.domain.history import HistoryError, described, is_same_history
from kms.domain.merkle import Frontier
from kms.domain.trail_check import NoteReader
from kms.domain.trail_lines import place_before

_NOTES_READ_MAX: Final = 200
_ROWS_READ_MAX: Final = 500
NO_CHECKPOINT: Final = StoredCheckpoint(Frontier(), 0, 0, "")


@dataclass(slots=True)
class SeenCheckpoint:
    """The last checkpoint that this process saw in the database, for as long as it runs: it changes with each.

    `has_begun`: this process has reported that the memory was empty. `reported`: the refusal that it met, while it lasts.
    """

    checkpoint: Checkpoint | None = None
    has_begun: bool = False
    reported: str = ""

    def see(self, checkpoint: Checkpoint) -> None:
        """Take a checkpoint that is in the database."""
        if self.checkpoint is None or _place(self.checkpoint) < _place(checkpoint):
            self.checkpoint = checkpoint


@dataclass(frozen=True, slots=True)
class Start:
    """The place where signing goes on: after the checkpoint `last` of the database. `tree` has the rows, all below `horizon`.

    `tree` has more rows than `last` where this machine has signed those already, and the database did not get to know of it.
    """

    last: StoredCheckpoint
    tree: Frontier
    horizon: int


@dataclass(frozen=True, slots=True)
class Following:
    """What is known of the first checkpoint that the database has after the last one of the memory.

    `previous_size` is the size that it names as that before it; None if that is not known. `note` is the checkpoint whose rows go
    on from those of the memory, empty if there was none a moment ago; None if it need not be a certain one.
    """

    previous_size: int | None = None
    note: str | None = None


@dataclass(frozen=True, slots=True)
class History:
    """Compares trail and memory. What differs raises `HistoryError`, and everything may raise STORE_UNAVAILABLE."""

    trail: SealedTrail
    reader: NoteReader
    events: HistoryEvents
    seen: SeenCheckpoint

    async def agreed(self, memory: OpenMemory) -> Start:
        """Return where signing goes on, once the memory has that checkpoint. Raises STALE if another machine signs."""
        await self.catch_up(memory, begins=True)
        last, kept = await self.trail.last(), memory.last()
        known = None if kept is None else self._remembered(kept)
        if last is None:
            # `catch_up` has found the reason: nothing was ever signed, or an epoch has begun since.
            return Start(NO_CHECKPOINT, NO_CHECKPOINT.tree, NO_CHECKPOINT.horizon)
        stored = self._stored(last)
        if kept is None or known is None:
            raise _stale()
        if is_same_history(stored, known):
            _check_horizon(known, kept, last)
            # If another machine signed the same rows, its horizon is the database's word alone. Ours is not.
            return Start(last, last.tree, last.horizon if kept.horizon is None else kept.horizon)
        if known.epoch < await self.trail.epoch():
            return Start(last, last.tree, last.horizon)
        if kept.horizon is None or _place(stored) > _place(known):
            raise _stale()
        tree = await self._grown(last.tree, last.horizon, kept.horizon)
        if (tree.size, tree.root()) != (known.tree_size, known.root_hash):
            raise HistoryError(described(known), f"{described(stored)}, and later rows that have another root")
        return Start(last, tree, kept.horizon)

    async def catch_up(self, memory: OpenMemory, *, begins: bool = False) -> None:
        """Copy into the memory what it lacks, once its last note and what this process has seen are found in the database.

        *begins*: report also an empty memory beside a database that has no checkpoint.
        """
        kept, seen = memory.last(), self.seen.checkpoint
        known = None if kept is None else self._remembered(kept)
        if seen is not None and (known is None or _place(seen) > _place(known)):
            await self._find(seen, None)
        if kept is None or known is None:
            await self._begin(begins=begins)
            place: tuple[int, int] = (0, 0)
            following = Following(previous_size=0)
        else:
            self.seen.has_begun = False
            place, following = _place(known), await self._find(known, kept)
        while notes := await self.trail.notes_since(*place, _NOTES_READ_MAX):
            for note in notes:
                read = self._read(
                    note.text, "a checkpoint that this deployment's audit key has signed", "another in the database"
                )
                if following.previous_size not in {None, read.previous_size} or _place(read) <= place:
                    raise HistoryError(
                        f"the checkpoint after that of {following.previous_size or place[1]} rows",
                        f"{described(read)}, after {read.previous_size} rows",
                    )
                if following.note not in {None, note.text}:
                    # It was made since we looked. Or the database says one thing now, and said another before.
                    raise _stale()
                place, following = _place(read), Following(read.tree_size)
                self.seen.see(read)
            await memory.append(notes)

    async def _begin(self, *, begins: bool) -> None:
        """Report that this machine remembers nothing, and believes the database at this moment."""
        last = await self.trail.last()
        if (last is not None or begins) and not self.seen.has_begun:
            size, epoch = (0, 0) if last is None else (last.tree.size, last.epoch)
            await self.events.record(HistoryEvent.BEGUN, {"tree_size": size, "epoch": epoch})
            self.seen.has_begun = True

    async def _find(self, known: Checkpoint, kept: KeptNote | None) -> Following:
        """Find *known* in the database, or what explains that it is not there. Return what follows it."""
        there = await self.trail.at(known.tree_size)
        stored = None if there is None else self._stored(there)
        if there is not None and stored is not None and is_same_history(stored, known):
            if kept is not None:
                _check_horizon(known, kept, there)
            self.seen.see(known)
            return Following(known.tree_size)
        # What this process has seen in the database was not lost on the way to it.
        is_seen = self.seen.checkpoint is not None and _place(self.seen.checkpoint) >= _place(known)
        if there is None and kept is not None and not is_seen:
            following = await self._following_put_back(known, kept)
            if following is not None:
                return following
        if known.epoch < await self.trail.epoch():
            return Following()
        last = await self.trail.last()
        found = described(stored) if stored is not None else described(None if last is None else self._stored(last))
        raise HistoryError(described(known), f"{found} in the database")

    async def _following_put_back(self, known: Checkpoint, kept: KeptNote) -> Following | None:
        """Return what follows *known* if it only missed its way into the database, and all that is there agrees with it.

        If it is the next one, it is put there now. None: something contradicts it.
        """
        before = await self.trail.at(known.previous_size) if known.previous_size else NO_CHECKPOINT
        if before is None or kept.horizon is None or kept.horizon <= before.horizon:
            return None
        if before is not NO_CHECKPOINT:
            self._stored(before)
        tree = await self._grown(before.tree, before.horizon, kept.horizon)
        if (tree.size, tree.root()) != (known.tree_size, known.root_hash):
            return None
        place = before
        while following := await self.trail.notes(place.tree.size, 1):
            _, horizon, note = following[0]
            later = self._read(note, described(known), "a checkpoint in the database that the audit key has not signed")
            is_beyond = later.tree_size > known.tree_size
            grown = await (
                self._grown(tree, kept.horizon, horizon) if is_beyond else self._grown(place.tree, place.horizon, horizon)
            )
            if (grown.size, grown.root(), later.previous_size) != (later.tree_size, later.root_hash, place.tree.size):
                return None
            if is_beyond:
                return Following(note=note)
            place = StoredCheckpoint(grown, horizon, later.epoch, note)
        if place is before:
            await self.trail.append(before.tree.size, StoredCheckpoint(tree, kept.horizon, known.epoch, kept.text))
            await self.events.record(HistoryEvent.RESTORED, {"tree_size": known.tree_size, "epoch": known.epoch})
        return Following(note="")

    async def _grown(self, tree: Frontier, horizon: int, below: int) -> Frontier:
        place = place_before(horizon)
        while leaves := await self.trail.leaves(place, below, _ROWS_READ_MAX):
            tree, place = tree.extended(leaf.hash for leaf in leaves), leaves[-1].place
        return tree

    def _stored(self, stored: StoredCheckpoint) -> Checkpoint:
        """Return what the note of a checkpoint in the database says, which its row says too."""
        expected = f"the checkpoint of {stored.tree.size} rows as the audit key has signed it"
        read = self._read(stored.note, expected, "a note that it has not signed")
        if (read.tree_size, read.root_hash, read.epoch) != (stored.tree.size, stored.tree.root(), stored.epoch):
            raise HistoryError(described(read), f"a row of {stored.tree.size} rows in epoch {stored.epoch} with its note")
        return read

    def _remembered(self, kept: KeptNote) -> Checkpoint:
        return self._read(
            kept.text,
            f"a file of checkpoints that {self.reader.key.name}+{self.reader.key.key_id.hex()} has signed",
            "a last note in it that this key has not signed",
        )

    def _read(self, note: str, expected: str, otherwise: str) -> Checkpoint:
        try:
            return self.reader.open(note)
        except KmsError as error:
            raise HistoryError(expected, f"{otherwise} ({error.message})") from None


def _place(checkpoint: Checkpoint) -> tuple[int, int]:
    """Return where a checkpoint stands among others."""
    return checkpoint.epoch, checkpoint.tree_size


def _check_horizon(known: Checkpoint, kept: KeptNote, there: StoredCheckpoint) -> None:
    """Raise `HistoryError` for a note of this machine that the database has with another horizon."""
    if kept.text == there.note and kept.horizon not in {None, there.horizon}:
        raise HistoryError(f"{described(known)} below the order {kept.horizon}", f"the order {there.horizon}")


def _stale() -> KmsError:
    return KmsError(Reason.STALE, "another machine has signed the trail meanwhile")
