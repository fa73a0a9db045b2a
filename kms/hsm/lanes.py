"""All lanes of a process, and which of them a piece of work goes to."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Final, TypeVar

from kms.domain.keys import HeldKey
from kms.hsm.bench import Bench
from kms.hsm.errors import unavailable
from kms.hsm.inline_bench import InlineBench
from kms.hsm.lane import Lane
from kms.hsm.link import Link
from kms.hsm.settings import HsmSettings

T = TypeVar("T")

# Loading a key takes about as long as four signatures, so a key moves to a second lane when the first is that far behind.
_LOAD_COST: Final = 4
_AWAY_FROM_HOME_COST: Final = 2


class LaneSet:
    """The working lanes, the generator's lane, and the event loop's own bench."""

    def __init__(self, link: Link, settings: HsmSettings) -> None:
        self._link = link
        self._settings = settings
        self._working = [self._new_lane(f"lane-{number}") for number in range(settings.lanes)]
        self._generator = self._new_generator()
        self.inline = InlineBench(link, handles_max=_share(settings), idle_seconds=settings.handle_idle_seconds)
        self.inline_wanted = False
        self._abandoned: list[Lane] = []
        self._changing = threading.Lock()

    @property
    def handles(self) -> int:
        """How many keys are loaded in all lanes together."""
        return sum(lane.bench.handles for lane in self._working) + self.inline.handles

    @property
    def waiting(self) -> int:
        """How many pieces of work wait for a lane or are in one."""
        return sum(lane.pending for lane in self.all())

    @property
    def handle_hits(self) -> int:
        """How often a key was already loaded where it was used."""
        return sum(lane.bench.handle_hits for lane in self.all()) + self.inline.handle_hits

    @property
    def handle_misses(self) -> int:
        """How often a key had to be loaded first."""
        return sum(lane.bench.handle_misses for lane in self.all()) + self.inline.handle_misses

    def submit(self, work: Callable[[Bench], T], held: HeldKey | None = None) -> "Future[T]":
        """Queue *work* where *held* is loaded, or where that costs least. Raises HSM_UNAVAILABLE if the queue is full."""
        lanes = self._working
        if sum(lane.pending for lane in lanes) >= self._settings.queue_max:
            raise unavailable("too many requests wait for the HSM")
        if held is None:
            return min(lanes, key=lambda lane: lane.pending).submit(work)
        home = lanes[held.identity.key_id.int % len(lanes)]
        chosen = min(lanes, key=lambda lane: _cost(lane, held, is_home=lane is home))
        for lane in lanes:
            if lane is not chosen and lane.bench.is_outdated(held):
                lane.submit(lambda bench: bench.drop(held.identity.key_id))
        return chosen.submit(work)

    def generate(self, work: Callable[[Bench], T]) -> "Future[T]":
        """Queue *work* of seconds in the generator's lane. Raises HSM_UNAVAILABLE if the queue is full."""
        if self._generator.pending >= self._settings.queue_max:
            raise unavailable("too many requests wait for the HSM")
        return self._generator.submit(work)

    def all(self) -> list[Lane]:
        """Return every lane in use."""
        return [*self._working, self._generator]

    def replace(self, stuck: Lane) -> None:
        """Abandon *stuck* and put another in its place; its thread ends when its call returns."""
        with self._changing:
            self._abandoned.append(stuck)
            if stuck is self._generator:
                self._generator = self._new_generator()
            else:
                self._working = [self._new_lane(lane.name) if lane is stuck else lane for lane in self._working]
        stuck.abandon()

    def abandoned(self) -> int:
        """Return how many abandoned lanes are still inside a call."""
        with self._changing:
            self._abandoned = [lane for lane in self._abandoned if lane.is_alive]
            return len(self._abandoned)

    def tend_inline(self) -> None:
        """Drop the keys that the event loop's bench no longer uses; called on the event loop."""
        self.inline.drop_idle()

    def after_loss(self) -> None:
        """Fail what waits, at once: the token is away."""
        for lane in self.all():
            lane.fail_waiting()

    def after_return(self) -> None:
        """Open the session of the event loop's bench, which must not wait for one itself."""
        if not self.inline_wanted or self.inline.is_open:
            return
        with self._link.use() as connection:
            self.inline.offer(connection, connection.open_session())

    def close(self, timeout_seconds: float) -> None:
        """Take no more work and wait for the threads."""
        for lane in self.all():
            lane.close()
        for lane in self.all():
            lane.join(timeout_seconds)
        self.inline.close()

    def _new_bench(self) -> Bench:
        return Bench(self._link, handles_max=_share(self._settings), idle_seconds=self._settings.handle_idle_seconds)

    def _new_lane(self, name: str) -> Lane:
        seconds = self._settings.stuck_seconds
        return Lane(name, self._new_bench(), stuck_seconds=seconds, idle_seconds=self._settings.handle_idle_seconds)

    def _new_generator(self) -> Lane:
        seconds = self._settings.generation_stuck_seconds
        return Lane("generator", self._new_bench(), stuck_seconds=seconds, idle_seconds=self._settings.handle_idle_seconds)


def _cost(lane: Lane, held: HeldKey, *, is_home: bool) -> int:
    return lane.pending + (0 if lane.bench.holds(held) else _LOAD_COST) + (0 if is_home else _AWAY_FROM_HOME_COST)


def _share(settings: HsmSettings) -> int:
    return max(1, settings.handles_max // (settings.lanes + 1))
