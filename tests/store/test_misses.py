"""How often is looked for keys that are not there."""

from uuid import uuid4

import pytest

from kms.domain.errors import KmsError
from kms.domain.ids import KeyId, UserId
from kms.store.misses import MISSES_MAX, MISSES_PER_SECOND, Misses


class Time:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def missed(misses: Misses, user: UserId, times: int) -> int:
    """Return how many of so many searches for keys that are not there were made."""
    for made in range(times):
        ref = KeyId(uuid4())
        try:
            misses.check(user, ref)
        except KmsError as error:
            assert error.reason == "RATE_LIMITED"
            return made
        misses.note(user, ref, is_there=False)
    return times


def test_a_user_has_so_many_and_then_so_many_a_second() -> None:
    time, user = Time(), UserId(uuid4())
    misses = Misses(time)
    assert missed(misses, user, 1000) == MISSES_MAX
    assert missed(misses, UserId(uuid4()), 1000) == MISSES_MAX
    time.now += 2
    assert missed(misses, user, 1000) == 2 * MISSES_PER_SECOND
    time.now += 3600
    assert missed(misses, user, 1000) == MISSES_MAX


def test_what_was_found_is_looked_for_until_it_is_not() -> None:
    misses, user, mine = Misses(Time()), UserId(uuid4()), KeyId(uuid4())
    misses.note(user, mine, is_there=True)
    missed(misses, user, 1000)
    misses.check(user, mine)
    with pytest.raises(KmsError, match="not there"):
        misses.check(user, KeyId(uuid4()))
    misses.note(user, mine, is_there=False)
    with pytest.raises(KmsError, match="not there"):
        misses.check(user, mine)
