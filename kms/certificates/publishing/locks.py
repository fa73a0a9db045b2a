"""Locks by name: one for each shard of a CRL that is being made."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import UUID
from weakref import WeakValueDictionary


class ShardLocks:
    """The locks of one process. A lock lives as long as somebody holds it or waits for it."""

    def __init__(self) -> None:
        self._locks: WeakValueDictionary[tuple[UUID, int], asyncio.Lock] = WeakValueDictionary()

    @asynccontextmanager
    async def __call__(self, shard: tuple[UUID, int]) -> AsyncIterator[None]:
        """Hold the lock of a shard within the block."""
        lock = self._locks.get(shard)
        if lock is None:
            lock = self._locks[shard] = asyncio.Lock()
        async with lock:
            yield
