"""Sealing the trail: what can no longer change is hashed into the tree, and a signed checkpoint says so."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

from kms.app.history import History, SeenCheckpoint
from kms.app.ports import Hsm
from kms.app.trail_ports import (
    CheckpointMemory,
    HistoryEvent,
    HistoryEvents,
    KeptNote,
    OpenMemory,
    SealedTrail,
    StoredCheckpoint,
)
from kms.domain.algorithms import KeyType, signature_algorithm
from kms.domain.checkpoint import Checkpoint, signed_note
from kms.domain.errors import KmsError
from kms.domain.history import HistoryError
from kms.domain.keys import HeldKey
from kms.domain.merkle import Frontier
from kms.domain.trail_check import NoteReader
from kms.domain.trail_lines import place_before

ALGORITHM: Final = signature_algorithm(KeyType.ED25519, None, None)
_ROWS_READ_MAX: Final = 500
_ROWS_SEALED_MAX: Final = 50_000


@dataclass(frozen=True, slots=True)
class SealingKey:
    """The key that signs checkpoints, and how its notes are read."""

    held: HeldKey
    reader: NoteReader


@dataclass(frozen=True, slots=True)
class Sealing:
    """Makes checkpoints. One at a time is enough; of two that work at once, one is refused with STALE.

    It signs nothing that does not go on from the last checkpoint in `memory`: see `History`. A refusal is an event of the trail
    once, however often it is tried again.
    """

    trail: SealedTrail
    hsm: Hsm
    key: SealingKey
    memory: CheckpointMemory
    events: HistoryEvents
    clock: Callable[[], datetime]
    seen: SeenCheckpoint = field(default_factory=SeenCheckpoint)

    async def seal(self) -> int:
        """Seal the rows that can be sealed, and return how many rows the last checkpoint has then.

        A backlog is sealed in several checkpoints. Raises STORE_UNAVAILABLE, HSM_UNAVAILABLE; STALE if another was faster;
        `HistoryError`.
        """
        async with self._remembering() as memory:
            start = await self._history().agreed(memory)
            horizon = max(await self.trail.horizon(), start.horizon)
            last, tree, place, reached = start.last, start.tree, place_before(start.horizon), start.horizon
            while leaves := await self.trail.leaves(place, horizon, _ROWS_READ_MAX):
                hashes: list[bytes] = []
                for leaf in leaves:
                    # A checkpoint ends with the rows of a transaction, never within them.
                    if leaf.place.order > reached and tree.size + len(hashes) - last.tree.size >= _ROWS_SEALED_MAX:
                        tree, hashes = tree.extended(hashes), []
                        last = await self._append(memory, last, tree, leaf.place.order)
                    hashes.append(leaf.hash)
                    reached = leaf.place.order
                tree, place = tree.extended(hashes), leaves[-1].place
            if tree.size > last.tree.size:
                last = await self._append(memory, last, tree, horizon)
            return last.tree.size

    async def follow(self) -> None:
        """Remember the checkpoints that other machines have made. Raises STORE_UNAVAILABLE, `HistoryError`."""
        async with self._remembering() as memory:
            await self._history().catch_up(memory)

    def _history(self) -> History:
        return History(self.trail, self.key.reader, self.events, self.seen)

    @asynccontextmanager
    async def _remembering(self) -> AsyncIterator[OpenMemory]:
        """Hold the memory, and report a refusal that was not reported before."""
        async with self.memory.opened() as memory:
            try:
                yield memory
            except HistoryError as refusal:
                # If the event cannot be written, the next refusal writes it.
                with suppress(KmsError):
                    # Processes of a machine differ in what they have seen: one may refuse what another agrees to.
                    if refusal.expected not in {self.seen.reported, await memory.reported()}:
                        details = {"expected": refusal.expected, "found": refusal.found}
                        await self.events.record(HistoryEvent.REFUSED, details)
                        await memory.report(refusal.expected)
                    self.seen.reported = refusal.expected
                raise
            self.seen.reported = ""
            await memory.report("")

    async def _append(self, memory: OpenMemory, last: StoredCheckpoint, tree: Frontier, horizon: int) -> StoredCheckpoint:
        epoch, key = await self.trail.epoch(), self.key.reader.key
        kept = memory.last()
        known = None if kept is None else self.key.reader.open(kept.text)
        if known is not None and epoch < known.epoch:
            # An epoch that is older than what was signed: its row was removed, or an older database put back.
            raise HistoryError(f"epoch {known.epoch} or a later one", f"epoch {epoch}")
        checkpoint = Checkpoint(key.name, tree.size, tree.root(), epoch, last.tree.size, self.clock())
        signature = await self.hsm.sign(self.key.held, ALGORITHM, checkpoint.text().encode())
        made = StoredCheckpoint(tree, horizon, epoch, signed_note(checkpoint, key, signature))
        # First on our disk: from then on nobody who is killed here, or whose database is rewritten, signs these rows otherwise.
        await memory.append([KeptNote(made.note, horizon)])
        await self.trail.append(last.tree.size, made)
        self.seen.see(checkpoint)
        return made
