"""One rule for each kind of field; tests/hostile/test_fields.py has them at every field of every request."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial

import pytest

from kms.domain.errors import KmsError, Reason, malformed
from kms.domain.fields import (
    check_metadata,
    check_size,
    open_token,
    parse_filter,
    parse_moment,
    parse_number,
    parse_optional_number,
    parse_text,
    token_of,
)
from tests.hostile.values import MOMENTS, READABLE

EXPECTED = malformed("cursor", "expected a cursor")


def refused(act: Callable[[], object], field: str) -> None:
    with pytest.raises(KmsError) as caught:
        act()
    assert (caught.value.reason, caught.value.metadata) == (Reason.MALFORMED, {"field": field})


def test_a_number_is_within_its_limits() -> None:
    for value in (1, 2**31, 2**63 - 1):
        assert parse_number(value, field="n") == parse_optional_number(value, field="n") == value
    for value in (-1, 2**63, 2**64 - 1):
        refused(partial(parse_number, value, field="n"), "n")
        refused(partial(parse_optional_number, value, field="n"), "n")
    assert parse_optional_number(0, field="n") is None
    refused(lambda: parse_number(0, field="n", least=1), "n")
    refused(lambda: parse_number(91, field="n", most=90), "n")


def test_the_message_says_what_was_expected() -> None:
    with pytest.raises(KmsError, match=r"^n: expected 1 to 2\^63-1$"):
        parse_number(0, field="n", least=1)
    with pytest.raises(KmsError, match=r"^n: expected 0, or 1 to 200$"):
        parse_optional_number(201, field="n", most=200)


def test_a_moment_is_in_the_years_that_both_calendars_have() -> None:
    assert parse_moment(*MOMENTS[1], field="at") == datetime.min.replace(tzinfo=UTC)
    assert parse_moment(*MOMENTS[2], field="at") == datetime.max.replace(tzinfo=UTC)
    assert parse_moment(-1, 999_999_999, field="at") == datetime(1970, 1, 1, tzinfo=UTC) - timedelta(microseconds=1)
    for seconds, nanos in MOMENTS[3:9]:
        refused(partial(parse_moment, seconds, nanos, field="at"), "at")


@pytest.mark.parametrize("text", READABLE)
def test_a_text_in_any_language_is_accepted(text: str) -> None:
    assert parse_text(text, field="reason", characters_max=200) == text
    assert parse_filter(text, field="action") == text
    check_metadata({"x": text})


def test_a_text_is_as_long_as_it_may_be_and_no_longer() -> None:
    assert parse_text("é" * 200, field="reason", characters_max=200)
    refused(lambda: parse_text("é" * 201, field="reason", characters_max=200), "reason")
    assert parse_filter("é" * 100, field="action")
    refused(lambda: parse_filter("é" * 101, field="action"), "action")
    assert parse_filter("", field="action") is None


def test_a_refusal_does_not_repeat_a_text() -> None:
    for act in (
        lambda: parse_text("secret\x1b", field="reason", characters_max=200),
        lambda: parse_filter("secret\x1b", field="action"),
        lambda: check_metadata({"secret\x1b": ""}),
        lambda: open_token("secret\x1b", expected=EXPECTED),
    ):
        with pytest.raises(KmsError) as caught:
            act()
        assert "secret" not in caught.value.message


def test_bytes_are_as_many_as_they_may_be() -> None:
    check_size("aad", bytes(3), bytes_min=1, bytes_max=3)
    refused(lambda: check_size("aad", bytes(4), bytes_max=3), "aad")
    refused(lambda: check_size("aad", b"", bytes_min=1, bytes_max=3), "aad")


def test_a_token_gives_back_what_it_was_made_of() -> None:
    assert open_token(token_of("é", 7, None), expected=EXPECTED) == ["é", 7, None]


@pytest.mark.parametrize("token", ["", "x", "é", "e30=", "MQ==", "bnVsbA==", "W10", "W1tb", token_of("x" * 1000)])
def test_what_is_no_token_of_ours_is_refused(token: str) -> None:
    refused(lambda: open_token(token, expected=EXPECTED), "cursor")
