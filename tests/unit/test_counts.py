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
from kms.keys.ledger.counts import Counts, Meanwhile


def key(count: int) -> KeyRecord:
    identity = KeyIdentity(KeyId(uuid4()), UserId(uuid4()), key_spec(KeyType.SECP256K1, Purpose.SIGNING, None))
    moment = datetime(2026, 1, 1, tzinfo=UTC)
    return KeyRecord(identity, KeyName("k"), State.ACTIVE, Custody.WRAPPED, "", 1, count, moment, {})


def used(counts: Counts, record: KeyRecord, times: int) -> None:
    for _ in range(times):
        bounds = counts.of(record.identity.key_id)
        assert bounds is not None
        counts.settled(bounds, None, None)


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
    assert Counts().of(key(5).identity.key_id) is None


def refused(counts: Counts, record: KeyRecord, answer_id: bytes) -> Reason | None:
    """Return why a stored answer is not handed out again."""
    try:
        counts.repeated(record, answer_id, Meanwhile())
    except KmsError as refusal:
        return refusal.reason
    return None


def offered(counts: Counts, record: KeyRecord) -> bytes:
    """Return the id of an answer that was sent to the ledger."""
    bounds = counts.of(record.identity.key_id)
    assert bounds is not None
    answer_id = counts.new_answer_id()
    counts.offered(bounds, answer_id)
    return answer_id


def test_an_answer_that_was_settled_is_handed_out_again_and_again() -> None:
    counts, record = Counts(), key(5)
    counts.check(record, Meanwhile())
    answer_id, bounds = offered(counts, record), counts.of(record.identity.key_id)
    assert bounds is not None
    counts.settled(bounds, None, answer_id)
    after = replace(record, usage_counter=6)
    assert [refused(counts, after, answer_id) for _ in range(3)] == [None] * 3
    assert refused(counts, record, answer_id) is Reason.RECORD_INVALID


def test_an_answer_that_was_not_settled_counts_once_when_it_is_found() -> None:
    counts, record = Counts(), key(5)
    counts.check(record, Meanwhile())
    answer_id = offered(counts, record)
    assert refused(counts, record, answer_id) is Reason.RECORD_INVALID
    after = replace(record, usage_counter=6)
    assert [refused(counts, after, answer_id) for _ in range(3)] == [None] * 3


def test_an_answer_that_is_found_while_it_is_settled_counts_once() -> None:
    counts, record = Counts(), key(5)
    counts.check(record, Meanwhile())
    answer_id, bounds = offered(counts, record), counts.of(record.identity.key_id)
    assert bounds is not None
    after = replace(record, usage_counter=6)
    assert refused(counts, after, answer_id) is None
    counts.settled(bounds, None, answer_id)
    counts.check(after, Meanwhile())


def test_each_answer_of_another_process_is_a_use_that_the_count_must_cover() -> None:
    counts, other, record = Counts(), Counts(), key(2)
    first, second, third = (other.new_answer_id() for _ in range(3))
    assert [refused(counts, record, each) for each in (first, second, first, second)] == [None] * 4
    assert refused(counts, record, third) is Reason.RECORD_INVALID


def test_what_was_handed_out_before_the_first_count_is_covered_too() -> None:
    counts, other, record = Counts(), Counts(), key(1)
    assert refused(counts, record, other.new_answer_id()) is None
    used(counts, record, 1)
    with pytest.raises(KmsError):
        counts.check(record, Meanwhile())
    counts.check(replace(record, usage_counter=2), Meanwhile())


def test_an_answer_that_is_too_old_to_be_known_is_not_handed_out() -> None:
    counts, record = Counts(answers_max=2), key(5)
    counts.check(record, Meanwhile())
    oldest, *others = (offered(counts, record) for _ in range(3))
    after = replace(record, usage_counter=8)
    assert refused(counts, after, oldest) is Reason.OUTCOME_UNKNOWN
    assert [refused(counts, after, each) for each in others] == [None, None]


def test_a_key_that_was_forgotten_is_counted_from_its_next_read() -> None:
    counts, record = Counts(keys_max=1), key(5)
    counts.check(record, Meanwhile())
    answer_id = offered(counts, record)
    counts.check(key(0), Meanwhile())
    # The count that is read now has the use already.
    after = replace(record, usage_counter=6)
    counts.check(after, Meanwhile())
    assert refused(counts, after, answer_id) is None


def test_a_use_beyond_the_limit_that_the_key_had_when_it_began_is_refused() -> None:
    counts, record = Counts(), replace(key(5), max_usage_count=7)
    counts.check(record, Meanwhile())
    bounds = counts.of(record.identity.key_id)
    assert bounds is not None
    assert bounds.limit == 7
    for _ in range(2):
        counts.settled(bounds, bounds.limit, None)
    with pytest.raises(KmsError) as caught:
        counts.settled(bounds, bounds.limit, None)
    assert caught.value.reason is Reason.RECORD_INVALID


def test_a_use_that_began_before_the_limit_was_lowered_is_measured_by_the_limit_of_then() -> None:
    counts, record = Counts(), replace(key(5), max_usage_count=9)
    counts.check(record, Meanwhile())
    bounds = counts.of(record.identity.key_id)
    assert bounds is not None
    before = bounds.limit
    counts.check(replace(record, max_usage_count=6), Meanwhile())
    assert bounds.limit == 6
    for _ in range(2):
        counts.settled(bounds, before, None)


def test_an_answer_of_another_process_that_was_forgotten_counts_once_again() -> None:
    counts, other, first, second = Counts(answers_max=2), Counts(), key(2), key(9)
    answers = [other.new_answer_id() for _ in range(2)]
    assert refused(counts, first, answers[0]) is None
    for _ in range(4):
        assert refused(counts, second, other.new_answer_id()) is None
    assert [refused(counts, first, answer) for answer in (*answers, *answers)] == [None] * 4


def test_the_forgotten_answers_of_one_key_are_no_trouble_for_another() -> None:
    counts, mine, another = Counts(answers_max=2), key(5), key(5)
    for each in (mine, another):
        counts.check(each, Meanwhile())
    answer_id, bounds = offered(counts, mine), counts.of(mine.identity.key_id)
    assert bounds is not None
    counts.settled(bounds, None, answer_id)
    for _ in range(5):
        offered(counts, another)
    assert refused(counts, replace(mine, usage_counter=6), answer_id) is None


def test_no_count_that_is_put_up_makes_repeats_go_beyond_the_limit() -> None:
    counts, other, record = Counts(), Counts(), replace(key(0), max_usage_count=3)
    counts.check(record, Meanwhile())
    mine = [offered(counts, record) for _ in range(5)]
    theirs = [other.new_answer_id() for _ in range(5)]
    put_up = replace(record, usage_counter=1000)
    given = [refused(counts, put_up, answer) for answer in (*mine, *theirs)]
    assert given == [None] * 3 + [Reason.RECORD_INVALID] * 7


def test_an_old_row_without_the_limit_lifts_it_for_no_use() -> None:
    counts, record = Counts(), replace(key(0), max_usage_count=3)
    counts.check(record, Meanwhile())
    counts.check(replace(record, max_usage_count=None), Meanwhile())
    bounds = counts.of(record.identity.key_id)
    assert bounds is not None
    assert bounds.limit == 3


def test_uses_of_a_key_with_a_limit_are_given_in_parts_of_a_hundredth() -> None:
    counts, record, free = Counts(), replace(key(5), max_usage_count=1000), key(5)
    for each in (record, free):
        counts.check(each, Meanwhile())
    used(counts, free, 1000)
    used(counts, record, 9)
    assert counts.take_due() == []
    used(counts, record, 3)
    assert counts.take_due() == [(record.identity.key_id, 12)]
    assert counts.take_due() == []
    used(counts, record, 10)
    assert counts.take_due() == [(record.identity.key_id, 10)]


def test_uses_are_given_of_a_key_that_was_forgotten_meanwhile_too() -> None:
    counts, record = Counts(keys_max=1), replace(key(0), max_usage_count=100)
    counts.check(record, Meanwhile())
    used(counts, record, 2)
    counts.check(key(0), Meanwhile())  # no room is left for the first
    counts.check(replace(record, usage_counter=2), Meanwhile())
    used(counts, record, 3)
    assert sorted(counts.take_due()) == [(record.identity.key_id, 2), (record.identity.key_id, 3)]
