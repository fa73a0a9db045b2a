"""Which characters a person can read, in what comes in and in what is shown."""

import json
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kms.domain.text import escaped, has_hidden, is_blank, json_text
from tests.hostile.values import HIDDEN, READABLE

ANY_TEXT = st.text(st.characters(exclude_categories=()))


@pytest.mark.parametrize("hidden", HIDDEN.values(), ids=HIDDEN)
def test_a_character_that_steers_or_cannot_be_seen_is_hidden_and_written_as_in_json(hidden: str) -> None:
    text = f"a{hidden}b"
    assert has_hidden(text)
    shown = escaped(text)
    assert not has_hidden(shown)
    assert json.loads(f'"{shown}"') == text


@pytest.mark.parametrize("text", READABLE)
def test_what_people_write_is_not_hidden_and_shown_as_it_is(text: str) -> None:
    assert not has_hidden(text)
    assert escaped(text) == text
    assert not is_blank(text)


def test_no_character_of_a_hidden_category_is_shown() -> None:
    hidden = [chr(code) for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code))[0] == "C"]
    assert len(hidden) > 900_000
    assert all(map(has_hidden, [*hidden, "\u2028", "\u2029"]))
    assert escaped("".join(hidden[:200])).isascii()


def test_a_joiner_is_read_only_between_letters_of_a_script_that_is_written_with_joiners() -> None:
    for joiner in "\u200c\u200d":
        assert not has_hidden(f"ن{joiner}ه")
        for text in (joiner, f"ن{joiner}", f"{joiner}ن", f"ن{joiner}{joiner}ن", f"ن{joiner}a", f"a{joiner}ن", f"1{joiner}2"):
            assert has_hidden(text), ascii(text)
            assert joiner not in escaped(text)


def test_a_text_that_shows_nothing_is_blank() -> None:
    for text in ("", " ", "\u00a0\u3000", "\u3164", "\u2800", "\u115f\u1160", "\ufe0f", "\u0301", "\n"):
        assert is_blank(text), ascii(text)
    for text in ("a", " ب ", "7", "!", "🔑"):
        assert not is_blank(text), ascii(text)


@given(ANY_TEXT)
def test_json_says_the_same_and_hides_nothing(text: str) -> None:
    for indent in (None, 2):
        written = json_text({text: [text]}, indent=indent)
        assert json.loads(written) == {text: [text]}
        assert not any(map(has_hidden, written.split("\n")))
    assert "\n" not in json_text({text: text})


@given(ANY_TEXT)
def test_an_escaped_text_hides_nothing_and_is_one_line(text: str) -> None:
    assert not has_hidden(escaped(text))
    assert len(escaped(text).splitlines()) <= 1


def test_line_ends_can_be_kept() -> None:
    assert escaped("a\n\x1b\r\nb", keep="\n") == "a\n\\u001b\\r\nb"
