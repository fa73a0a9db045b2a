"""Streams of answers: as long as one lasts, its caller is looked at again and again."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from typing import Any, Final

import grpc
from google.protobuf.message import Message

Context = grpc.aio.ServicerContext[Any, Any]

RECHECK_SECONDS: Final = 0.5


async def sent(
    answers: AsyncGenerator[Message], context: Context, *, check: Callable[[], Awaitable[None]], draining: asyncio.Event
) -> None:
    """Send *answers* until they end or *draining* is set, or raise what *check*, asked twice a second, raises."""

    async def send() -> None:
        async with aclosing(answers):
            async for answer in answers:
                await context.write(answer)  # waits for a client that reads slowly

    async def recheck() -> None:
        while True:
            await asyncio.sleep(RECHECK_SECONDS)
            await check()

    async def drain() -> None:
        await draining.wait()

    await begin(context)
    await first(send(), recheck(), drain())


async def begin(context: Context) -> None:
    """Send the headers of a stream, which must come before a write that may be cancelled.

    grpc.aio notes that they are out only when its first write returns. If that is cancelled, it sends them again with the status,
    which fails, and the client is never told that the stream has ended.
    """
    await context.send_initial_metadata(())


async def first(*works: Coroutine[Any, Any, None]) -> None:
    """Return when the first of *works* has ended, or raise what it raises; the others are cancelled."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
