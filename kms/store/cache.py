"""What was read a moment ago, for those who may be told it again.

A read counts from the moment before it was sent. Whoever asks is given what was read since he asked, or, where he may be told
what was read before, what was read at most a second ago and of which no change has been heard since. That nothing is there is
never remembered.
"""

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass
from time import CLOCK_BOOTTIME, clock_gettime
from typing import Final, Generic, TypeVar
from uuid import UUID

TRUSTED_SECONDS: Final = 1.0
ENTRIES_MAX: Final = 10_000
BYTES_MAX: Final = 32 * 1024 * 1024

Clock = Callable[[], float]
K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


def boot_clock() -> float:
    """Return the seconds since the host was booted: never set, and it goes on while the host is suspended."""
    return clock_gettime(CLOCK_BOOTTIME)


@dataclass(frozen=True, slots=True)
class CacheStatus:
    """What a cache has done so far, for metrics. `dropped` counts the changes it was told of, `entries` what it holds now."""

    hits: int
    misses: int
    dropped: int
    entries: int


@dataclass(frozen=True, slots=True, repr=False)
class _Entry(Generic[V]):
    value: V
    sent_at: float
    size_bytes: int


@dataclass(slots=True, eq=False, repr=False)
class _Flight(Generic[V]):
    """A read under way, and how many wait for it."""

    sent_at: float
    task: asyncio.Task[V | None]
    waiting: int = 0


class Cache(Generic[K, V]):
    """Values by what they are asked by. A change is told by the id of what changed, which several may stand for.

    An entry is of use for a second: the oldest make room for the next, and with each that is stored those of before go.
    """

    def __init__(self, id_of: Callable[[V], UUID], size_bytes: Callable[[V], int], clock: Clock = boot_clock) -> None:
        self._id_of = id_of
        self._size_bytes = size_bytes
        self._clock = clock
        self._entries: dict[K, _Entry[V]] = {}  # in the order in which they were stored
        self._flights: dict[K, _Flight[V]] = {}
        self._changed_at: dict[UUID, float] = {}  # of the last second
        self._all_changed_at = float("-inf")
        self._bytes = 0
        self._hits = self._misses = self._dropped = 0

    async def find(self, key: K, read: Callable[[], Awaitable[V | None]], *, recent: bool) -> V | None:
        """Return what *read* returns, or where *recent* will do what it returned. Raises what *read* raises.

        Those who ask at once share one read. It goes on when one of them gives up, and ends when all have.
        """
        asked_at = self._clock()
        held = self._entries.get(key) if recent else None
        if held is not None and self._is_trusted(held.value, held.sent_at):
            self._hits += 1
            return held.value
        self._misses += 1
        while True:
            flight = self._flights.get(key)
            if flight is None or not recent:
                flight = self._begin(key, read)
            value = await self._outcome(key, flight)
            if flight.sent_at >= asked_at or (value is not None and self._is_trusted(value, flight.sent_at)):
                return value

    def drop(self, changed: UUID | None) -> None:
        """Trust nothing of *changed* (None: nothing at all) that is stored, or that was read before now and arrives later."""
        now = self._clock()
        self._dropped += 1
        if changed is None:
            self._all_changed_at = now
            self._entries.clear()
            self._changed_at.clear()
            self._bytes = 0
            return
        self._changed_at.pop(changed, None)
        self._changed_at[changed] = now
        while self._changed_at[oldest := next(iter(self._changed_at))] < now - TRUSTED_SECONDS:
            del self._changed_at[oldest]

    def status(self) -> CacheStatus:
        """Return what the cache has done so far."""
        return CacheStatus(self._hits, self._misses, self._dropped, len(self._entries))

    def _is_trusted(self, value: V, sent_at: float) -> bool:
        changed_at = max(self._changed_at.get(self._id_of(value), self._all_changed_at), self._all_changed_at)
        return changed_at < sent_at and self._clock() - sent_at <= TRUSTED_SECONDS

    def _begin(self, key: K, read: Callable[[], Awaitable[V | None]]) -> _Flight[V]:
        sent_at = self._clock()

        async def fly() -> V | None:
            try:
                value = await read()
            finally:
                self._land(key, flight)
            self._store(key, value, sent_at)
            return value

        flight = _Flight(sent_at, asyncio.create_task(fly()))
        self._flights[key] = flight
        return flight

    async def _outcome(self, key: K, flight: _Flight[V]) -> V | None:
        flight.waiting += 1
        try:
            return await asyncio.shield(flight.task)
        finally:
            flight.waiting -= 1
            if not flight.waiting and not flight.task.done():
                self._land(key, flight)
                flight.task.cancel()

    def _land(self, key: K, flight: _Flight[V]) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]

    def _store(self, key: K, value: V | None, sent_at: float) -> None:
        held = self._entries.get(key)
        if held is not None:
            if held.sent_at > sent_at:
                return
            self._forget(key)
        if value is None or not self._is_trusted(value, sent_at):
            return
        size_bytes = self._size_bytes(value)
        self._entries[key] = _Entry(value, sent_at, size_bytes)
        self._bytes += size_bytes
        self._make_room()

    def _make_room(self) -> None:
        oldest_trusted = self._clock() - TRUSTED_SECONDS
        while self._entries:
            oldest = next(iter(self._entries))
            is_too_much = len(self._entries) > ENTRIES_MAX or self._bytes > BYTES_MAX
            if not is_too_much and self._entries[oldest].sent_at >= oldest_trusted:
                return
            self._forget(oldest)

    def _forget(self, key: K) -> None:
        self._bytes -= self._entries.pop(key).size_bytes
