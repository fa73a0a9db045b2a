"""Searches for keys that are not there: so many of each user, or a flood of them would keep the database from what is.

A key that was found before is always looked for: whoever floods and signs goes on signing.
"""

from collections import OrderedDict
from collections.abc import Callable
from time import monotonic
from typing import Any, Final

from kms.domain.errors import KmsError, Reason
from kms.domain.ids import KeyRef, UserId

MISSES_MAX: Final = 200
MISSES_PER_SECOND: Final = 20.0
_USERS_MAX: Final = 10_000
_FOUND_MAX: Final = 50_000


class Misses:
    """A token bucket of misses for each user: `MISSES_MAX` at once, `MISSES_PER_SECOND` again with time. Of one process."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._left: OrderedDict[UserId, tuple[float, float]] = OrderedDict()  # misses, and when it was so many
        self._found: OrderedDict[tuple[UserId, KeyRef], None] = OrderedDict()

    def check(self, user: UserId, ref: KeyRef) -> None:
        """Raise RATE_LIMITED if *user* has missed too often to look for a key that he was not seen to have."""
        if (user, ref) in self._found:
            self._found.move_to_end((user, ref))
        elif self._misses_left(user) < 1:
            raise KmsError(Reason.RATE_LIMITED, "you have named too many keys that are not there: check the names, and wait")

    def note(self, user: UserId, ref: KeyRef, *, is_there: bool) -> None:
        """Take note of what the search came to."""
        if is_there:
            self._found[user, ref] = None
            _keep(self._found, _FOUND_MAX)
            return
        self._found.pop((user, ref), None)
        self._left[user] = (self._misses_left(user) - 1, self._clock())
        self._left.move_to_end(user)
        _keep(self._left, _USERS_MAX)

    def _misses_left(self, user: UserId) -> float:
        left, at = self._left.get(user, (MISSES_MAX, self._clock()))
        return min(MISSES_MAX, left + (self._clock() - at) * MISSES_PER_SECOND)


def _keep(entries: "OrderedDict[Any, Any]", most: int) -> None:
    while len(entries) > most:
        entries.popitem(last=False)
