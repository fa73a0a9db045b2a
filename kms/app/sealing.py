"""Sealing the trail: what can no longer change is hashed into the tree, and a signed checkpoint says so."""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

from kms.app.ports import Hsm
from kms.app.trail_ports import OutsideCheckpoints, SealedTrail, StoredCheckpoint
from kms.domain.algorithms import KeyType, signature_algorithm
from kms.domain.checkpoint import Checkpoint, signed_note
from kms.domain.errors import KmsError, Reason
from kms.domain.keys import HeldKey
from kms.domain.merkle import Frontier
from kms.domain.trail_check import NoteReader
from kms.domain.trail_lines import place_before

ALGORITHM: Final = signature_algorithm(KeyType.ED25519, None, None)
_ROWS_READ_MAX: Final = 500
_ROWS_SEALED_MAX: Final = 50_000
_NOTES_READ_MAX: Final = 1000
_NONE: Final = StoredCheckpoint(Frontier(), 0, 0, "")


@dataclass(frozen=True, slots=True)
class SealingKey:
    """The key that signs checkpoints, and how its notes are read."""

    held: HeldKey
    reader: NoteReader


@dataclass(slots=True)
class LastSealed:
    """The last checkpoint that this process made, for as long as it runs: it changes with each."""

    checkpoint: Checkpoint | None = None


@dataclass(frozen=True, slots=True)
class Sealing:
    """Makes checkpoints. One at a time is enough; of two that work at once, one is refused with STALE.

    It makes none where the last that it knows of, by `made` or `outside`, is of this epoch and not in the trail any more: what
    somebody rewrote is not signed.
    """

    trail: SealedTrail
    hsm: Hsm
    key: SealingKey
    outside: OutsideCheckpoints | None
    clock: Callable[[], datetime]
    made: LastSealed = field(default_factory=LastSealed)

    async def seal(self) -> int:
        """Seal the rows that can be sealed, and return how many rows the last checkpoint has then.

        A backlog is sealed in several checkpoints. Raises STORE_UNAVAILABLE, HSM_UNAVAILABLE; STALE where another was faster.
        """
        last = await self._last()
        horizon = await self.trail.horizon()
        tree, place, reached = last.tree, place_before(last.horizon), last.horizon
        while leaves := await self.trail.leaves(place, horizon, _ROWS_READ_MAX):
            hashes: list[bytes] = []
            for leaf in leaves:
                # A checkpoint ends with the rows of a transaction, never within them.
                if leaf.place.order > reached and tree.size + len(hashes) - last.tree.size >= _ROWS_SEALED_MAX:
                    tree, hashes = tree.extended(hashes), []
                    last = await self._append(last, tree, leaf.place.order)
                hashes.append(leaf.hash)
                reached = leaf.place.order
            tree, place = tree.extended(hashes), leaves[-1].place
        if tree.size > last.tree.size:
            last = await self._append(last, tree, horizon)
        return last.tree.size

    async def export_missing(self) -> None:
        """Write the checkpoints that are not outside yet. Raises STORE_UNAVAILABLE."""
        if self.outside is None:
            return
        note = await self.outside.last()
        found = None if note is None else self.key.reader.open(note)
        epoch, size = (0, 0) if found is None else (found.epoch, found.tree_size)
        if found is not None:
            await self._check_is_there(found)
        while notes := await self.trail.notes_since(epoch, size, _NOTES_READ_MAX):
            await self.outside.append(notes)
            found = self.key.reader.open(notes[-1])
            epoch, size = found.epoch, found.tree_size

    async def _check_is_there(self, known: Checkpoint) -> None:
        """Raise STORE_UNAVAILABLE unless *known* is in the trail, or an epoch has begun since."""
        found = await self.trail.notes(known.tree_size - 1, 1)
        if not any(self.key.reader.open(note) == known for _, _, note in found) and known.epoch >= await self.trail.epoch():
            raise KmsError(
                Reason.STORE_UNAVAILABLE,
                f"the checkpoint of {known.tree_size} rows in epoch {known.epoch} is not in the database any more: somebody has "
                "changed it, or it was restored without a new epoch",
            )

    async def _last(self) -> StoredCheckpoint:
        last, made = await self.trail.last(), self.made.checkpoint
        if made is not None and (last is None or last.tree.size <= made.tree_size):
            await self._check_is_there(made)
        if last is None:
            return _NONE
        said = self.key.reader.open(last.note)
        if (said.tree_size, said.root_hash, said.epoch) != (last.tree.size, last.tree.root(), last.epoch):
            raise KmsError(Reason.STORE_UNAVAILABLE, "the last checkpoint is not what its note says: somebody has changed it")
        return last

    async def _append(self, last: StoredCheckpoint, tree: Frontier, horizon: int) -> StoredCheckpoint:
        epoch, key = await self.trail.epoch(), self.key.reader.key
        checkpoint = Checkpoint(key.name, tree.size, tree.root(), epoch, last.tree.size, self.clock())
        signature = await self.hsm.sign(self.key.held, ALGORITHM, checkpoint.text().encode())
        made = StoredCheckpoint(tree, horizon, epoch, signed_note(checkpoint, key, signature))
        await self.trail.append(last.tree.size, made)
        self.made.checkpoint = checkpoint
        if self.outside is not None:
            await self.outside.append([made.note])
        return made
