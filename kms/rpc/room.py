"""How many calls of one user are in flight: one user does not take the room of all."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from kms.domain.errors import KmsError, Reason
from kms.domain.ids import UserId


class Room:
    """Counts calls by user. It belongs to the event loop."""

    def __init__(self, calls_per_user_max: int) -> None:
        self._max = calls_per_user_max
        self._calls: Counter[UserId] = Counter()

    @contextmanager
    def taken(self, user: UserId) -> Iterator[None]:
        """Hold a place for a call of *user*, or raise RATE_LIMITED."""
        if self._calls[user] >= self._max:
            raise KmsError(Reason.RATE_LIMITED, f"you have {self._max} calls in flight, which is as many as you may have")
        self._calls[user] += 1
        try:
            yield
        finally:
            self._calls[user] -= 1
            if not self._calls[user]:
                del self._calls[user]
