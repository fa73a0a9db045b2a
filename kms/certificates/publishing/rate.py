"""A bound rate: so many at once, and so many a second afterwards."""

from collections.abc import Callable


class Bucket:
    """Tokens that are taken, and come back at a steady rate (token bucket). Only the event loop uses it.

    None is left where *has_room* says no: each signature is recorded, and strangers must not fill the disk.
    """

    def __init__(
        self, per_second: float, at_once: int, monotonic: Callable[[], float], has_room: Callable[[], bool] = lambda: True
    ) -> None:
        self._has_room = has_room
        self._per_second = per_second
        self._at_once = at_once
        self._monotonic = monotonic
        self._left = float(at_once)
        self._counted_at = monotonic()

    def take(self) -> bool:
        """Whether there is one left now; it is taken."""
        now = self._monotonic()
        self._left = min(self._at_once, self._left + (now - self._counted_at) * self._per_second)
        self._counted_at = now
        if self._left < 1 or not self._has_room():
            return False
        self._left -= 1
        return True
