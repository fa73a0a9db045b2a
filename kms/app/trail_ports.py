"""What reading, sealing and verifying the trail need of the outside."""

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol
from uuid import UUID

from kms.app.ports import Call
from kms.domain.key_check import History, KeyChange, KeyUse
from kms.domain.merkle import Frontier
from kms.domain.trail import Cursor, EventFilter, Found, Place, Stretch
from kms.domain.trail_lines import Leaf, RowPlace, Unplaced


class Trail(Protocol):
    """The trail as an auditor reads it. That he does is durably a line of it before he has the answer.

    Where it is recorded it is also decided: PERMISSION_DENIED or CREDENTIALS_INVALID for a caller who at that moment may not.
    """

    async def search(self, call: Call, which: EventFilter, *, before: Place | None, limit: int) -> Found:
        """Return at most *limit* events that fit, behind *before*, the newest first."""
        ...

    async def begin(self, call: Call, after: Cursor | None) -> Cursor:
        """Record that *call* follows the trail, and return where it begins: behind *after*, or where the trail ends now."""
        ...

    def follow(self, call: Call, after: Cursor) -> AsyncIterator[Stretch]:
        """Yield all events behind *after*, each once, as they become final, without end; now and then an empty stretch.

        STORE_UNAVAILABLE ends it; whoever then begins again behind the last cursor misses nothing.
        """
        ...

    async def record(self, call: Call, action: str, details: Mapping[str, object]) -> None:
        """Record a reading of another kind."""
        ...


@dataclass(frozen=True, slots=True)
class StoredCheckpoint:
    """A checkpoint with what is needed to go on from it. It counts the rows whose order is below `horizon`."""

    tree: Frontier
    horizon: int
    epoch: int
    note: str


@dataclass(frozen=True, slots=True)
class KeptNote:
    """A signed note with the order below which it counts the rows; None: nobody wrote it down."""

    text: str
    horizon: int | None


class SealedTrail(Protocol):
    """The rows of the trail in their order, and its checkpoints. All methods may raise STORE_UNAVAILABLE."""

    async def horizon(self) -> int:
        """Return the order below which no row appears any more."""
        ...

    async def next_order(self) -> int:
        """Return an order that is above that of every row that was seen before."""
        ...

    async def epoch(self) -> int:
        """Return the number of the epoch. A later one excuses a checkpoint that is missing, so it has to be authentic."""
        ...

    async def leaves(self, after: RowPlace, below: int | None, limit: int) -> Sequence[Leaf]:
        """Return about *limit* rows that stand behind *after*, of an order below *below* (None: to the end), hashed.

        Rows of one place come together, be they more; none only where there is none.
        """
        ...

    async def lines(self, after: RowPlace, below: int | None, limit: int) -> Sequence[tuple[RowPlace, str]]:
        """The same rows, each as its canonical line."""
        ...

    async def unplaced(self) -> Sequence[Unplaced]:
        """Return a row without an order of each table that has one. `leaves` and `lines` know of none."""
        ...

    async def last(self) -> StoredCheckpoint | None:
        """Return the newest checkpoint. Raises `HistoryError` for one that was changed, and is no tree any more."""
        ...

    async def at_most(self, size: int) -> StoredCheckpoint | None:
        """Return the newest checkpoint with at most *size* rows, or the oldest whose later rows are all in the database.

        Of the two the newer; None where the rows are there from the first. Raises as `last` does.
        """
        ...

    async def notes(self, after_size: int, limit: int) -> Sequence[tuple[int, int, str]]:
        """Return size, horizon and note of at most *limit* checkpoints with more than *after_size* rows, in their order."""
        ...

    async def at(self, size: int) -> StoredCheckpoint | None:
        """Return the checkpoint of *size* rows. Raises as `last` does."""
        ...

    async def notes_since(self, epoch: int, size: int, limit: int) -> Sequence[KeptNote]:
        """Return the notes after that of *size* rows in *epoch*, at most *limit*, in the order in which they were made."""
        ...

    async def append(self, previous_size: int, checkpoint: StoredCheckpoint) -> None:
        """Append a checkpoint behind that of *previous_size* rows, or raise STALE where that is not the last."""
        ...


class OpenMemory(Protocol):
    """The memory, held by one process of its machine. All methods may raise STORE_UNAVAILABLE."""

    def last(self) -> KeptNote | None:
        """Return the last note, or None. Raises `HistoryError` for a memory that ends in something else."""
        ...

    async def append(self, notes: Sequence[KeptNote]) -> None:
        """Append notes, and return when they are on disk. What is not behind the last one is left out."""
        ...

    async def reported(self) -> str:
        """Return the refusal that was reported last; empty when none was, or it is over."""
        ...

    async def report(self, refusal: str) -> None:
        """Remember that *refusal* was reported; empty: it is over."""
        ...


class CheckpointMemory(Protocol):
    """The checkpoints that a machine remembers outside the database. Its processes share them."""

    def opened(self) -> AbstractAsyncContextManager[OpenMemory]:
        """Hold the memory within the block: no other process reads or writes it meanwhile."""
        ...


class HistoryEvent(StrEnum):
    """What becomes an event of the trail."""

    REFUSED = "audit.history_refused"
    BEGUN = "audit.memory_begun"
    RESTORED = "audit.checkpoint_restored"


class HistoryEvents(Protocol):
    """Where events about the signing of the trail are recorded."""

    async def record(self, event: HistoryEvent, details: Mapping[str, object]) -> None:
        """Record *event* with what the database adds: its moment and how grave it is. Raises STORE_UNAVAILABLE."""
        ...


@dataclass(frozen=True, slots=True)
class LaterKey:
    """A key's row as JSON, and of the trail's rows about it from some order on the changes (JSON) and the highest use."""

    key_id: UUID
    row: str
    changes: str
    used: int | None


@dataclass(frozen=True, slots=True)
class KnownKey:
    """A key that the table or the trail has, read at one moment: its row (None: the table has none) and what the trail says.

    `history` is None where the trail has too many entries about the key to be read at once.
    """

    key_id: UUID
    row: Mapping[str, Any] | None
    history: History | None


class KeyTable(Protocol):
    """The rows of keys without their envelopes, in the order of their ids. Both methods may raise STORE_UNAVAILABLE."""

    async def page(self, after: UUID | None, from_order: int, limit: int) -> Sequence[LaterKey]:
        """Return at most *limit* keys with ids above *after* (None: from the first), each with its entries from an order on.

        Row and entries are of one moment.
        """
        ...

    async def known(self, after: UUID | None, limit: int) -> Sequence[KnownKey]:
        """Return at most *limit* keys that the table or the trail has, with ids above *after* (None: from the first)."""
        ...


class KeyHistories(Protocol):
    """What a trail says about keys, collected row by row; it takes the same memory for any number of rows."""

    def take(self, entry: KeyChange | KeyUse, row_number: int) -> None:
        """Take an entry that stands in the row *row_number* of the trail. The same entry may come again."""
        ...

    def see(self, key_id: UUID) -> bool:
        """Note that the table has this key. Return False where it was noted before."""
        ...

    def find(self, key_id: UUID, signed_size: int) -> History:
        """Return what the trail says about a key; *signed_size* rows are under a checkpoint."""
        ...

    def unseen(self) -> Iterator[UUID]:
        """Yield the keys of which the trail tells and that the table was not seen to have."""
        ...
