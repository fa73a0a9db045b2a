"""How many calls of one user, and of all users, are in flight: one user cannot take the places of all.

    headers ──▶ of_user ──▶ the message arrives ──▶ of_all ──▶ the call is handled

A call counts for its user from its headers on, and for all users only once its message is there. A call whose message never
comes takes a place from its own user and from nobody else.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from kms.app.ports import User
from kms.domain.errors import KmsError, Reason
from kms.domain.ids import UserId


@dataclass(frozen=True, slots=True)
class CallLimits:
    """How long a call and its message may take, and how many calls may be in flight at a time."""

    call_seconds_max: float
    message_seconds_max: float
    calls_max: int
    calls_per_user_max: int


class InFlightLimit:
    """Counts what is in flight (calls, streams) by user and in total. Only the event loop uses it."""

    def __init__(self, what: str, per_user_max: int, total_max: int) -> None:
        self._what = what
        self._per_user_max = per_user_max
        self._total_max = total_max
        self._total = 0
        self._counts: Counter[UserId] = Counter()
        self._users: dict[UserId, User] = {}

    def know(self, user: User) -> None:
        """Remember a user who holds a place, as long as they hold one."""
        if user.user_id in self._counts:
            self._users[user.user_id] = user

    def over_limit_user(self, user_id: UserId) -> User | None:
        """Return the user if they hold as many places as they may; None if they may have another, or if we do not know them."""
        return self._users.get(user_id) if self._counts[user_id] >= self._per_user_max else None

    @contextmanager
    def of_user(self, user_id: UserId) -> Iterator[None]:
        """Hold a place of *user_id* within the block, or raise RATE_LIMITED."""
        if self._counts[user_id] >= self._per_user_max:
            message = f"you have {self._per_user_max} {self._what} in flight, which is as many as you may have"
            raise KmsError(Reason.RATE_LIMITED, message)
        self._counts[user_id] += 1
        try:
            yield
        finally:
            self._counts[user_id] -= 1
            if not self._counts[user_id]:
                del self._counts[user_id]
                self._users.pop(user_id, None)

    @contextmanager
    def of_all(self) -> Iterator[None]:
        """Hold one of the places that all users share within the block, or raise RATE_LIMITED."""
        if self._total >= self._total_max:
            message = f"{self._total_max} {self._what} are in flight already, which is as many as there may be"
            raise KmsError(Reason.RATE_LIMITED, message)
        self._total += 1
        try:
            yield
        finally:
            self._total -= 1
