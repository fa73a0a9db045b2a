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
from kms.store.counts import Counts


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
    counts.check(record, counts.mark())
    used(counts, record, 3)
    counts.check(replace(record, usage_counter=8), counts.mark())
    counts.check(replace(record, usage_counter=100), counts.mark())  # others use it too


@pytest.mark.parametrize("count", [0, 5, 7])
def test_a_count_below_the_uses_is_refused(count: int) -> None:
    counts, record = Counts(), key(5)
    counts.check(record, counts.mark())
    used(counts, record, 3)
    with pytest.raises(KmsError) as caught:
        counts.check(replace(record, usage_counter=count), counts.mark())
    assert caught.value.reason is Reason.RECORD_INVALID


def test_a_read_that_began_before_a_use_need_not_show_it() -> None:
    counts, record = Counts(), key(5)
    counts.check(record, counts.mark())
    mark = counts.mark()
    used(counts, record, 1)
    counts.check(record, mark)
    with pytest.raises(KmsError):
        counts.check(record, counts.mark())


def test_a_use_before_the_first_read_is_not_counted() -> None:
    counts, record = Counts(), key(5)
    assert not counts.is_counted(record.identity.key_id)
    counts.charged(record.identity.key_id)
    counts.check(record, counts.mark())
    counts.check(record, counts.mark())
