"""Batches: every item is answered in its place, with a result or with a status of its own, and charged in its order."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from itertools import pairwise
from typing import Final, TypeVar

from kms.app.limits import check_batch
from kms.app.uses import Draft, Turn
from kms.domain.errors import KmsError, Reason
from kms.rpc.status import status_of

Request = TypeVar("Request")
Response = TypeVar("Response")
Item = TypeVar("Item")
T = TypeVar("T")

# Enough to keep every lane busy, few enough that one batch does not take all database connections.
_AT_ONCE: Final = 8
_IN_DOUBT: Final = "items may have been charged; repeat the call with the same request_id in each item"


class _Place:
    """The turn of one item: it settles when the item before it has gone to the ledger, or never will."""

    def __init__(self, room: asyncio.Semaphore, before: asyncio.Event, here: asyncio.Event) -> None:
        self._room = room
        self._before = before
        self._here = here

    async def draft(self, make: Callable[[], Awaitable[Draft[T]]]) -> Draft[T]:
        async with self._room:
            return await make()

    async def settle(self) -> None:
        try:
            await self._before.wait()
        finally:
            # Whoever waits for us is woken after we have gone on, into the ledger's queue. A call that is given up is cancelled
            # but once: whoever did not open its gate then would keep the next, and so the call, for ever.
            self._here.set()


def check_items(items: Sequence[Request], size_bytes: Callable[[Request], int]) -> None:
    """Raise MALFORMED unless a batch has 1 to 256 items of together at most 1 MiB."""
    check_batch(len(items), sum(size_bytes(item) for item in items))


async def answer_each(
    items: Sequence[Request],
    answer: Callable[[Request, Turn], Awaitable[Response]],
    make: Callable[..., Item],
    note: Callable[[Reason], None],
    *,
    is_charged: bool,
) -> list[Item]:
    """Answer each of *items*, a few at a time; *note* is told of each that is refused. A bug in one fails the whole call.

    Where what is answered *is_charged*, a call whose time is up ends with OUTCOME_UNKNOWN unless certainly nothing was charged.
    """
    room = asyncio.Semaphore(_AT_ONCE)
    gates = [asyncio.Event() for _ in range(len(items) + 1)]
    gates[0].set()
    is_in_doubt = False

    async def one(item: Request, place: _Place) -> Item:
        nonlocal is_in_doubt
        try:
            result = await answer(item, place)
            is_in_doubt = is_in_doubt or is_charged
            return make(result=result)
        except KmsError as error:
            is_in_doubt = is_in_doubt or (is_charged and error.reason is Reason.OUTCOME_UNKNOWN)
            note(error.reason)
            return make(error=status_of(error))
        finally:
            await place.settle()

    tasks: list[asyncio.Task[Item]] = []
    try:
        async with asyncio.TaskGroup() as group:
            places = [_Place(room, before, here) for before, here in pairwise(gates)]
            tasks += [group.create_task(one(item, place)) for item, place in zip(items, places, strict=True)]
    except asyncio.CancelledError:
        if is_in_doubt:
            raise KmsError(Reason.OUTCOME_UNKNOWN, _IN_DOUBT) from None
        raise
    return [task.result() for task in tasks]
