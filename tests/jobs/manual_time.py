"""A clock for tests of the runner: it moves when the test says so."""

import asyncio

_TURNS = 20


class ManualTime:
    """`now` and `sleep` of a `JobRunner`."""

    def __init__(self) -> None:
        self._now = 0.0
        self._sleepers: list[tuple[float, asyncio.Future[None]]] = []

    def now(self) -> float:
        """Return the moment."""
        return self._now

    async def sleep(self, seconds: float) -> None:
        """Wait until the clock has moved on by *seconds*."""
        woken = asyncio.get_running_loop().create_future()
        self._sleepers.append((self._now + seconds, woken))
        await woken

    async def advance(self, seconds: float) -> None:
        """Move the clock, wake who is due, and let every task run until it waits."""
        self._now += seconds
        due = [woken for at, woken in self._sleepers if at <= self._now]
        self._sleepers = [(at, woken) for at, woken in self._sleepers if at > self._now]
        for woken in due:
            if not woken.done():
                woken.set_result(None)
        for _ in range(_TURNS):
            await asyncio.sleep(0)
