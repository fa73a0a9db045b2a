"""Batches: every item is answered in its place, with a result or with a status of its own, and charged in its order."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from itertools import pairwise
from typing import Final, TypeVar

from kms.app.limits import check_batch
from kms.domain.errors import KmsError, Reason
from kms.keys.crypto.charged import Item
from kms.keys.ledger.settling import PendingResult, Slot

Message = TypeVar("Message")
Request = TypeVar("Request")
T = TypeVar("T")

# Enough to keep every lane busy, few enough that one batch does not take all database connections.
_AT_ONCE: Final = 8
_IN_DOUBT: Final = "items may have been charged; repeat the call with the same request_id in each item"


class _BatchSlot:
    """The slot of one item. It settles when the item before it has gone to the ledger, or never will."""

    def __init__(self, room: asyncio.Semaphore, before: asyncio.Event, here: asyncio.Event) -> None:
        self._room = room
        self._before = before
        self._here = here

    async def compute(self, compute: Callable[[], Awaitable[PendingResult[T]]]) -> PendingResult[T]:
        async with self._room:
            return await compute()

    async def settle(self) -> None:
        try:
            await self._before.wait()
        finally:
            # Whoever waits for us is woken after we have gone on, into the ledger's queue. A call that is given up is cancelled
            # but once: whoever did not open its gate then would keep the next, and so the call, for ever.
            self._here.set()


def check_items(items: Sequence[Message], size_bytes: Callable[[Message], int]) -> None:
    """Raise MALFORMED unless a batch has 1 to 256 items of together at most 1 MiB."""
    check_batch(len(items), sum(size_bytes(item) for item in items))


async def run_batch(
    items: Sequence[Item[Request] | KmsError],
    use: Callable[[Item[Request], Slot], Awaitable[T]],
    note: Callable[[KmsError], None],
    /,
    *,
    is_charged: bool,
) -> list[T | KmsError]:
    """Return the result or the refusal of each item, a few at a time. See `RunBatch`. A bug in one item fails the whole call."""
    room = asyncio.Semaphore(_AT_ONCE)
    gates = [asyncio.Event() for _ in range(len(items) + 1)]
    gates[0].set()
    is_in_doubt = False

    async def one(item: Item[Request] | KmsError, slot: _BatchSlot) -> T | KmsError:
        nonlocal is_in_doubt
        try:
            if isinstance(item, KmsError):
                raise item
            result = await use(item, slot)
            is_in_doubt = is_in_doubt or is_charged
        except KmsError as refusal:
            is_in_doubt = is_in_doubt or (is_charged and refusal.reason is Reason.OUTCOME_UNKNOWN)
            note(refusal)
            return refusal
        finally:
            await slot.settle()
        return result

    tasks: list[asyncio.Task[T | KmsError]] = []
    try:
        async with asyncio.TaskGroup() as group:
            slots = [_BatchSlot(room, before, here) for before, here in pairwise(gates)]
            tasks += [group.create_task(one(item, slot)) for item, slot in zip(items, slots, strict=True)]
    except asyncio.CancelledError:
        if is_in_doubt:
            raise KmsError(Reason.OUTCOME_UNKNOWN, _IN_DOUBT) from None
        raise
    return [task.result() for task in tasks]
