"""Which characters a person can read, and how all others are written: one rule for what comes in and for what is shown.

A terminal obeys control characters, also those of ISO 6429 from U+0080 to U+009F. A bidirectional control makes a line read as
another one, and a line separator makes one line two. Such characters are *hidden*: a field does not accept them, and whatever
prints data writes them as JSON does (`\\u202e`).
"""

import json
import re
import unicodedata
from typing import Any, Final

# Control, format, surrogate, private use, unassigned, line and paragraph separator (Unicode's general categories).
_HIDDEN: Final = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
_DOUBTFUL: Final = re.compile(r"[^ -~]")
# Hangul fillers are letters and the blank Braille pattern is a symbol, and none of them can be seen.
_EMPTY: Final = "\u115f\u1160\u2800\u3164\uffa0"
_JOINERS: Final = "\u200c\u200d"
_JOINING_FIRST: Final = "\u0600"
_JOINING_LAST: Final = "\u18af"


def has_hidden(text: str) -> bool:
    """Return whether *text* has a hidden character."""
    return any(_is_hidden(text, found.start()) for found in _DOUBTFUL.finditer(text))


def is_blank(text: str) -> bool:
    """Return whether *text* shows nothing: it has no letter, number, symbol or punctuation mark."""
    return not any(unicodedata.category(character)[0] in "LNSP" and character not in _EMPTY for character in text)


def escaped(text: str, *, keep: str = "") -> str:
    """Return *text* with its hidden characters, except those in *keep*, written as in JSON: `\\u001b`, `\\n`."""

    def written(found: re.Match[str]) -> str:
        character = found[0]
        return json.dumps(character)[1:-1] if character not in keep and _is_hidden(text, found.start()) else character

    return _DOUBTFUL.sub(written, text)


def json_text(value: Any, *, indent: int | None = None, sort_keys: bool = False) -> str:  # noqa: ANN401 - whatever JSON can write
    """Return *value* as JSON that a person can read. It has the meaning of `json.dumps`, with hidden characters escaped."""
    return escaped(json.dumps(value, indent=indent, sort_keys=sort_keys, ensure_ascii=False), keep="\n" if indent else "")


def _is_hidden(text: str, place: int) -> bool:
    character = text[place]
    if character in _JOINERS:
        return not (0 < place < len(text) - 1 and _can_join(text[place - 1]) and _can_join(text[place + 1]))
    return unicodedata.category(character) in _HIDDEN


def _can_join(character: str) -> bool:
    """Return whether *character* is a letter or a mark of a script that is written with joiners.

    Persian, Urdu, Hindi, Bengali, Malayalam, Sinhala and others spell words with U+200C and U+200D, which are format characters.
    These scripts lie from Arabic to Mongolian. Elsewhere a joiner is only a way to make two texts that look the same.
    """
    return _JOINING_FIRST <= character <= _JOINING_LAST and unicodedata.category(character)[0] in "LM"
