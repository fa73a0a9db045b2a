"""How often is looked for keys that are not there, by the clock and within its bounds; the rest is in test_flood.py."""

import asyncio
from collections import Counter
from datetime import UTC, datetime
from typing import cast
from uuid import uuid4

import pytest

from kms.app.ports import Keys
from kms.domain.algorithms import KeySpec, KeyType, Purpose
from kms.domain.errors import KmsError
from kms.domain.ids import KeyId, KeyName, KeyRef, UserId
from kms.domain.keys import Custody, KeyIdentity, KeyRecord, UsableKey
from kms.domain.lifecycle import State
from kms.store.cached import CachedKeys
from kms.store.misses import MISSES_MAX, MISSES_PER_SECOND, Misses


class Time:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def user() -> UserId:
    return UserId(uuid4())


def key_of(owner: UserId, name: str = "mine") -> KeyRecord:
    identity = KeyIdentity(KeyId(uuid4()), owner, KeySpec(KeyType.AES, Purpose.ENCRYPTION, 256), "")
    return KeyRecord(identity, KeyName(name), State.ACTIVE, Custody.WRAPPED, "", 1, 0, datetime.now(UTC), {})


def paid(misses: Misses, user: UserId, times: int = 1000) -> int:
    """Return how many of so many searches for keys that are not there were let through."""
    for made in range(times):
        try:
            misses.pay(user, KeyId(uuid4()))
        except KmsError as error:
            assert error.reason == "RATE_LIMITED"
            return made
    return times


def test_a_user_has_so_many_and_then_so_many_a_second() -> None:
    time, one = Time(), user()
    misses = Misses(time)
    assert paid(misses, one) == MISSES_MAX
    assert paid(misses, user()) == MISSES_MAX
    time.now += 2
    assert paid(misses, one) == 2 * MISSES_PER_SECOND
    time.now += 3600
    assert paid(misses, one) == MISSES_MAX


def test_what_was_given_back_can_be_paid_again_and_no_more_than_all() -> None:
    misses, one = Misses(Time()), user()
    misses.give_back(one, KeyId(uuid4()))
    assert paid(misses, one) == MISSES_MAX
    misses.give_back(one, KeyId(uuid4()))
    assert paid(misses, one) == 1


def test_a_key_that_was_seen_is_looked_for_under_its_id_and_its_name_and_costs_nothing() -> None:
    misses, one = Misses(Time()), user()
    mine = key_of(one)
    misses.see(mine)
    paid(misses, one)
    for _ in range(10):
        misses.pay(one, mine.name)
        misses.pay(one, mine.identity.key_id)
        misses.give_back(one, mine.name)
    with pytest.raises(KmsError, match="not there"):
        misses.pay(one, KeyName("another"))
    other = user()
    paid(misses, other)
    with pytest.raises(KmsError, match="not there"):
        misses.pay(other, mine.name)


def test_those_longest_unused_are_forgotten() -> None:
    misses, one = Misses(Time(), users_max=2, seen_max=4), user()
    keys = [key_of(one, f"k-{number}") for number in range(3)]
    misses.see(keys[0])
    misses.see(keys[1])
    misses.pay(one, keys[0].name)
    misses.see(keys[2])
    paid(misses, one)
    misses.pay(one, keys[0].name)
    with pytest.raises(KmsError, match="not there"):
        misses.pay(one, keys[1].identity.key_id)
    for _ in range(2):
        paid(misses, user())
    assert paid(misses, one) == MISSES_MAX


def test_who_gives_up_has_paid_all_the_same() -> None:
    class Slow:
        def __init__(self) -> None:
            self.begun = asyncio.Event()

        async def find_usable(self, caller: UserId, ref: KeyRef) -> UsableKey | None:
            self.begun.set()
            await asyncio.Event().wait()
            return None

    async def outcome(keys: CachedKeys, slow: Slow, one: UserId) -> str:
        """Begin a search and give it up as soon as it has begun."""
        slow.begun.clear()
        search = asyncio.create_task(keys.find_usable(one, KeyId(uuid4()), recent=True))
        waiting = asyncio.create_task(slow.begun.wait())
        await asyncio.wait({search, waiting}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        search.cancel()
        (told,) = await asyncio.gather(search, return_exceptions=True)
        return type(told).__name__

    async def outcomes() -> Counter[str]:
        slow, one = Slow(), user()
        keys = CachedKeys(cast(Keys, slow), misses=Misses(Time()))
        return Counter([await outcome(keys, slow, one) for _ in range(MISSES_MAX + 50)])

    assert asyncio.run(outcomes()) == {"CancelledError": MISSES_MAX, "KmsError": 50}
