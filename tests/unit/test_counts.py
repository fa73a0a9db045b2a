"""A count that the database has lower than this process has used the key."""

from dataclasses import replace
from datetime import UTC, datetime
from uuid import uuid4

import pytest

from kms.domain.algorithms import KeyType, Purpose, key_spec
from kms.domain.errors import KmsError, Reason
from kms.domain.ids import KeyId, KeyName, UserId
from kms.domain.keys import Custody, KeyIdentity, KeyRecord
from kms.domain.lifecycle import State
from kms.store.counts import Counts, Meanwhile


def key(count: int) -> KeyRecord:
    identity = KeyIdentity(KeyId(uuid4()), UserId(uuid4()), key_spec(KeyType.SECP256K1, Purpose.SIGNING, None))
    moment = datetime(2026, 1, 1, tzinfo=UTC)
    return KeyRecord(identity, KeyName("k"), State.ACTIVE, Custody.WRAPPED, "", 1, count, moment, {})


def used(counts: Counts, record: KeyRecord, times: int) -> None:
    for _ in range(times):
        assert counts.is_counted(record.identity.key_id)
        counts.charged(record.identity.key_id)


def test_a_count_that_keeps_up_with_the_uses_is_taken() -> None:
    counts, record = Counts(), key(5)
    counts.check(record, Meanwhile())
    used(counts, record, 3)
    counts.check(replace(record, usage_counter=8), Meanwhile())
    counts.check(replace(record, usage_counter=100), Meanwhile())  # others use it too


@pytest.mark.parametrize("count", [0, 5, 7])
def test_a_count_below_the_uses_is_refused(count: int) -> None:
    counts, record = Counts(), key(5)
    counts.check(record, Meanwhile())
    used(counts, record, 3)
    with pytest.raises(KmsError) as caught:
        counts.check(replace(record, usage_counter=count), Meanwhile())
    assert caught.value.reason is Reason.RECORD_INVALID


def test_a_read_that_began_before_a_use_need_not_show_it() -> None:
    counts, record = Counts(), key(5)
    counts.check(record, Meanwhile())
    with counts.reading() as meanwhile:
        used(counts, record, 1)
    counts.check(record, meanwhile)
    with pytest.raises(KmsError):
        counts.check(record, Meanwhile())


def test_a_read_shows_every_use_before_it_while_uses_go_on() -> None:
    """Each read overlaps a use, as with many clients at once: the uses before it count all the same."""
    counts, record = Counts(), key(5)
    counts.check(record, Meanwhile())
    used(counts, record, 3)
    with counts.reading() as meanwhile, counts.reading() as other:
        used(counts, record, 2)
    for each in (meanwhile, other):
        counts.check(replace(record, usage_counter=8), each)
        with pytest.raises(KmsError):
            counts.check(replace(record, usage_counter=7), each)


def test_uses_of_another_key_meanwhile_excuse_nothing() -> None:
    counts, record, another = Counts(), key(5), key(0)
    for each in (record, another):
        counts.check(each, Meanwhile())
    used(counts, record, 1)
    with counts.reading() as meanwhile:
        used(counts, another, 3)
    with pytest.raises(KmsError):
        counts.check(record, meanwhile)


def test_a_use_before_the_first_read_is_not_counted() -> None:
    counts, record = Counts(), key(5)
    assert not counts.is_counted(record.identity.key_id)
    counts.charged(record.identity.key_id)
    counts.check(record, Meanwhile())
    counts.check(record, Meanwhile())
