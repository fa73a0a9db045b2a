"""Batches: every item is answered in its place, with a result or with a status of its own."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, TypeVar

from kms.app.limits import check_batch
from kms.domain.errors import KmsError
from kms.rpc.status import status_of

Request = TypeVar("Request")
Response = TypeVar("Response")
Item = TypeVar("Item")

# Enough to keep every lane busy, few enough that one batch does not take all database connections.
_AT_ONCE: Final = 8


def check_items(items: Sequence[Request], size_bytes: Callable[[Request], int]) -> None:
    """Raise MALFORMED unless a batch has 1 to 256 items of together at most 1 MiB."""
    check_batch(len(items), sum(size_bytes(item) for item in items))


async def answer_each(
    items: Sequence[Request], answer: Callable[[Request], Awaitable[Response]], make: Callable[..., Item]
) -> list[Item]:
    """Answer each of *items*, a few at a time. A bug in one fails the whole call."""
    turn = asyncio.Semaphore(_AT_ONCE)

    async def one(item: Request) -> Item:
        async with turn:
            try:
                return make(result=await answer(item))
            except KmsError as error:
                return make(error=status_of(error))

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(item)) for item in items]
    return [task.result() for task in tasks]
