"""Uses of keys that are not there: so many of each user, or a flood of them would keep the database from what is.

A key that this process has seen its owner have is always looked for: whoever floods and signs goes on signing.
"""

from collections import OrderedDict
from collections.abc import Callable
from time import monotonic
from typing import Any, Final

from kms.domain.errors import KmsError, Reason
from kms.domain.ids import KeyRef, UserId
from kms.domain.keys import KeyRecord

MISSES_MAX: Final = 200
MISSES_PER_SECOND: Final = 20.0
USERS_MAX: Final = 10_000
SEEN_MAX: Final = 50_000


class Misses:
    """A bucket of misses for each user: `MISSES_MAX` at once, `MISSES_PER_SECOND` again with time.

    It is paid from before the search and given back when the key is there, so that giving up early saves nothing.
    """

    def __init__(self, clock: Callable[[], float] = monotonic, *, users_max: int = USERS_MAX, seen_max: int = SEEN_MAX) -> None:
        self._clock = clock
        self._users_max = users_max
        self._seen_max = seen_max
        self._left: OrderedDict[UserId, tuple[float, float]] = OrderedDict()  # misses, and when it was so many
        self._seen: OrderedDict[tuple[UserId, KeyRef], None] = OrderedDict()

    def pay(self, user: UserId, ref: KeyRef) -> None:
        """Pay for a search, or raise RATE_LIMITED if *user* has missed too often to look for what he was not seen to have."""
        if (user, ref) in self._seen:
            self._seen.move_to_end((user, ref))
            return
        left = self._misses_left(user)
        if left < 1:
            raise KmsError(Reason.RATE_LIMITED, "you have named too many keys that are not there: check the names, and wait")
        self._leave(user, left - 1)

    def give_back(self, user: UserId, ref: KeyRef) -> None:
        """Give back what was paid for a search that found the key, or that came to nothing without the user's doing."""
        if (user, ref) not in self._seen:
            self._leave(user, self._misses_left(user) + 1)

    def see(self, key: KeyRecord) -> None:
        """Take note that there is a key, under its id and its name."""
        for ref in (key.identity.key_id, key.name):
            self._seen[key.identity.owner_id, ref] = None
            self._seen.move_to_end((key.identity.owner_id, ref))
        _keep(self._seen, self._seen_max)

    def _misses_left(self, user: UserId) -> float:
        left, at = self._left.get(user, (MISSES_MAX, self._clock()))
        return min(MISSES_MAX, left + (self._clock() - at) * MISSES_PER_SECOND)

    def _leave(self, user: UserId, left: float) -> None:
        self._left[user] = (left, self._clock())
        self._left.move_to_end(user)
        _keep(self._left, self._users_max)


def _keep(entries: "OrderedDict[Any, Any]", most: int) -> None:
    while len(entries) > most:
        entries.popitem(last=False)
