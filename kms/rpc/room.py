"""How many calls of one user, and of all, are in flight: one user does not take the room of all."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from kms.app.ports import User
from kms.domain.errors import KmsError, Reason
from kms.domain.ids import UserId


class Room:
    """Counts *what* (calls, streams) by user. It belongs to the event loop."""

    def __init__(self, what: str, per_user_max: int, total_max: int | None = None) -> None:
        self._what = what
        self._per_user_max = per_user_max
        self._total_max = total_max
        self._taken: Counter[UserId] = Counter()
        self._users: dict[UserId, User] = {}

    def know(self, user: User) -> None:
        """Remember a user who holds a place, for as long as he holds one."""
        self._users[user.user_id] = user

    def crowded_out(self, user_id: UserId) -> User | None:
        """Return the user who has no place left because he holds so many; None where there is room, or he is not known yet."""
        return self._users.get(user_id) if self._taken[user_id] >= self._per_user_max else None

    @contextmanager
    def taken(self, user: UserId) -> Iterator[None]:
        """Hold a place for *user*, or raise RATE_LIMITED."""
        if self._taken[user] >= self._per_user_max:
            message = f"you have {self._per_user_max} {self._what} in flight, which is as many as you may have"
            raise KmsError(Reason.RATE_LIMITED, message)
        if self._total_max is not None and self._taken.total() >= self._total_max:
            raise KmsError(
                Reason.RATE_LIMITED, f"{self._total_max} {self._what} are there already, which is as many as there may be"
            )
        self._taken[user] += 1
        try:
            yield
        finally:
            self._taken[user] -= 1
            if not self._taken[user]:
                del self._taken[user]
                self._users.pop(user, None)
