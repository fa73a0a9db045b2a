"""Which objects and marks of RESIDENT keys may be removed from the token."""

import itertools
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest

from kms.domain.ids import KeyId
from kms.domain.residents import (
    ADVICE,
    NEEDS_OPERATOR,
    REMOVABLE_BY_OPERATOR,
    Finding,
    Holdings,
    Mark,
    Row,
    findings,
)

KEY = KeyId(UUID(int=1))
NOW = datetime(2030, 1, 1, tzinfo=UTC)
YOUNG = Mark(NOW - timedelta(minutes=59))
OLD = Mark(NOW - timedelta(minutes=61))
AHEAD = Mark(NOW + timedelta(minutes=61))
MARKS = (None, YOUNG, OLD, AHEAD, Mark(None))
ROWS = (None, Row.PROVEN, Row.UNPROVEN)
REMOVED = {Finding.ORPHAN, Finding.MARK_ALONE}


def finding(*, has_object: bool, mark: Mark | None, row: Row | None) -> Finding | None:
    held = Holdings({KEY: ""} if has_object else {}, {} if mark is None else {KEY: mark})
    return findings(held, {} if row is None else {KEY: row}, now=NOW).get(KEY)


@pytest.mark.parametrize(
    ("mark", "row", "expected"),
    [
        (None, None, Finding.ROW_MISSING),
        (None, Row.PROVEN, Finding.STORED),
        (None, Row.UNPROVEN, Finding.ROW_UNPROVEN),
        (YOUNG, None, Finding.PENDING),
        (YOUNG, Row.PROVEN, Finding.STORED_WITH_MARK),
        (YOUNG, Row.UNPROVEN, Finding.ROW_UNPROVEN),
        (OLD, None, Finding.ORPHAN),
        (OLD, Row.PROVEN, Finding.STORED_WITH_MARK),
        (OLD, Row.UNPROVEN, Finding.ROW_UNPROVEN),
        (AHEAD, None, Finding.MARK_UNREADABLE),
        (Mark(None), None, Finding.MARK_UNREADABLE),
        (Mark(None), Row.PROVEN, Finding.STORED_WITH_MARK),
        (Mark(NOW + timedelta(minutes=59)), None, Finding.PENDING),
        (Mark(NOW - timedelta(hours=1)), None, Finding.PENDING),
    ],
)
def test_what_a_key_in_the_token_is(mark: Mark | None, row: Row | None, expected: Finding) -> None:
    assert finding(has_object=True, mark=mark, row=row) is expected


@pytest.mark.parametrize("row", ROWS)
def test_a_mark_without_a_key_goes_when_it_is_old(row: Row | None) -> None:
    assert finding(has_object=False, mark=OLD, row=row) is Finding.MARK_ALONE
    assert finding(has_object=False, mark=YOUNG, row=row) is Finding.PENDING
    assert finding(has_object=False, mark=AHEAD, row=row) is Finding.MARK_UNREADABLE
    assert finding(has_object=False, mark=None, row=row) is None


def test_only_an_old_mark_and_no_row_at_all_removes_a_key() -> None:
    for mark, row in itertools.product(MARKS, ROWS):
        removes = finding(has_object=True, mark=mark, row=row) in REMOVED
        assert removes == (mark is OLD and row is None), (mark, row)


def test_only_a_proven_row_counts_as_stored() -> None:
    for mark, row in itertools.product(MARKS, ROWS):
        is_stored = finding(has_object=True, mark=mark, row=row) in {Finding.STORED, Finding.STORED_WITH_MARK}
        assert is_stored == (row is Row.PROVEN), (mark, row)


def test_an_operator_removes_no_key_that_has_a_row() -> None:
    for mark, row in itertools.product(MARKS, (Row.PROVEN, Row.UNPROVEN)):
        assert finding(has_object=True, mark=mark, row=row) not in REMOVABLE_BY_OPERATOR


def test_each_finding_that_is_not_plain_says_what_it_means() -> None:
    assert set(Finding) - set(ADVICE) == {Finding.STORED, Finding.PENDING}
    assert REMOVABLE_BY_OPERATOR < NEEDS_OPERATOR <= set(ADVICE)
    assert REMOVED.isdisjoint(NEEDS_OPERATOR)
