"""Using a key: act first, charge then, and let nothing out before the charge is durable.

The reads before the act only save work. The charge looks again at the key's state and version and at the caller's standing,
in the statement that locks the key; where it refuses, the result is dropped.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, Generic, Protocol, TypeVar

from kms.app.keyring import read_anew
from kms.app.ports import Entry, Ledger
from kms.domain.errors import KmsError, Reason

_ATTEMPTS: Final = 4
# Of these the draft cannot know: it may have been made of what was so a moment ago. The next one is made of what is.
LOOK_AGAIN: Final = frozenset(
    {
        Reason.STALE,
        Reason.CREDENTIALS_INVALID,
        Reason.KEY_NOT_FOUND,
        Reason.KEY_PRE_ACTIVE,
        Reason.KEY_INACTIVE,
        Reason.KEY_EXPIRED,
        Reason.KEY_COMPROMISED,
        Reason.KEY_REVOKED,
        Reason.KEY_PENDING_DESTRUCTION,
        Reason.KEY_DESTROYED,
        Reason.USAGE_LIMIT_REACHED,
    }
)
# So the token speaks of an envelope, which may be the one that was there a moment ago; a permission is missed of the roles that
# the caller had then, or is that of a state in which the key was then.
_OF_WHAT_WAS: Final = frozenset({Reason.ENVELOPE_INVALID, Reason.HSM_KEK_MISSING, Reason.PERMISSION_DENIED})

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True, slots=True)
class Draft(Generic[T]):
    """A result that is nobody's yet, and the line of the ledger that makes it somebody's; None: nothing is recorded."""

    result: T
    entry: Entry | None

    def __repr__(self) -> str:
        return "<Draft>"

    def map(self, change: Callable[[T], U]) -> "Draft[U]":
        """Return the draft with another form of its result."""
        return Draft(change(self.result), self.entry)


class Turn(Protocol):
    """A place among the uses of one request: drafts are made a few at a time, and settled in the order of the request."""

    async def draft(self, make: Callable[[], Awaitable[Draft[T]]]) -> Draft[T]:
        """Return what *make* returns, once there is room for the work."""
        ...

    async def settle(self) -> None:
        """Return when all before it are on their way to the ledger."""
        ...


class Alone:
    """The turn of a request that is a single use."""

    async def draft(self, make: Callable[[], Awaitable[Draft[T]]]) -> Draft[T]:
        """Return what *make* returns."""
        return await make()

    async def settle(self) -> None:
        """There is nobody before it."""


async def used(ledger: Ledger, draft: Callable[[], Awaitable[Draft[T]]], turn: Turn) -> T:
    """Return the result of a draft that the ledger has settled, drafting anew where key or caller are not what they were.

    Raises what a draft of what is there now raises, or what the ledger says; STALE where the key changes every time.
    """
    for attempts_left in reversed(range(_ATTEMPTS)):
        made = await _drafted(draft, turn)
        if made.entry is None:
            return made.result
        await turn.settle()
        try:
            await ledger.settle(made.entry)
        except KmsError as error:
            if error.reason not in LOOK_AGAIN or not attempts_left:
                raise
        else:
            return made.result
    raise AssertionError("the last attempt returns or raises")


async def _drafted(draft: Callable[[], Awaitable[Draft[T]]], turn: Turn) -> Draft[T]:
    """Return a draft. Nobody is refused for an envelope that is not there any more, or a permission that he has by now."""
    try:
        return await turn.draft(draft)
    except KmsError as error:
        if error.reason not in _OF_WHAT_WAS:
            raise
    with read_anew():
        return await turn.draft(draft)
