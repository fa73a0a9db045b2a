"""What a field of a request may hold: one rule for each kind of field, used for every field of that kind.

| kind | rule |
|---|---|
| key name, key reference, id | `parse_key_name`, `parse_key_ref`, `parse_uuid` in `ids.py` |
| free text (a reason) | `parse_text` |
| metadata | `check_metadata` |
| text that a search compares | `parse_filter` |
| request id | `parse_request_id` |
| page token, cursor | `token_of`, `open_token` |
| number (version, count, size, days) | `parse_number`, `parse_optional_number` |
| moment | `parse_moment` |
| span of time | `parse_span` |
| bytes | `check_size` |
| enumeration | the tables of `rpc/enums.py` |

All of them raise MALFORMED naming the field. None repeats a text that it was given: answers and logs stay short and readable.
"""

import base64
import binascii
import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from kms.domain.errors import KmsError, malformed
from kms.domain.text import has_hidden, is_blank

NUMBER_MAX: Final = 2**63 - 1
"""The largest number that PostgreSQL's bigint holds: versions, counters and sizes are stored as such."""
METADATA_ENTRIES_MAX: Final = 32
METADATA_NAME_BYTES_MAX: Final = 63
METADATA_VALUE_BYTES_MAX: Final = 255
FILTER_CHARACTERS_MAX: Final = 100

_TOKEN_CHARACTERS_MAX: Final = 1024
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_FIRST_SECOND: Final = -62_135_596_800  # 0001-01-01T00:00:00Z
_SPAN_SECONDS_MAX: Final = 36_500 * 86_400
_LAST_SECOND: Final = 253_402_300_799  # 9999-12-31T23:59:59Z
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._:/+=-]{1,64}")
_HIDDEN: Final = "none of them a control, format or unassigned character"


def parse_text(text: str, *, field: str, characters_max: int) -> str:
    """Return *text* that a person wrote for a person, in any language: 1 to *characters_max* characters, not blank."""
    if not 0 < len(text) <= characters_max or has_hidden(text) or is_blank(text):
        raise malformed(field, f"expected 1 to {characters_max} characters, {_HIDDEN}, and not only spaces")
    return text


def check_metadata(metadata: Mapping[str, str]) -> None:
    """Raise MALFORMED unless *metadata* is small and readable."""
    fits = len(metadata) <= METADATA_ENTRIES_MAX and all(
        0 < len(name.encode()) <= METADATA_NAME_BYTES_MAX
        and len(value.encode()) <= METADATA_VALUE_BYTES_MAX
        and not has_hidden(name)
        and not has_hidden(value)
        and not is_blank(name)
        for name, value in metadata.items()
    )
    if not fits:
        raise malformed(
            "metadata",
            f"expected at most {METADATA_ENTRIES_MAX} entries, names of 1 to {METADATA_NAME_BYTES_MAX} bytes, "
            f"values of at most {METADATA_VALUE_BYTES_MAX} bytes, no name only of spaces, and no control, format or "
            "unassigned character",
        )


def parse_filter(text: str, *, field: str) -> str | None:
    """Return *text* that a search compares, None for an empty one."""
    if len(text) > FILTER_CHARACTERS_MAX or has_hidden(text):
        raise malformed(field, f"expected at most {FILTER_CHARACTERS_MAX} characters, {_HIDDEN}")
    return text or None


def parse_request_id(text: str) -> str:
    """Return *text* as an id that a caller gives to a request."""
    if not _REQUEST_ID.fullmatch(text):
        raise malformed("request_id", "expected 1 to 64 of A-Z a-z 0-9 . _ : / + = -")
    return text


def parse_number(value: int, *, field: str, least: int = 0, most: int = NUMBER_MAX) -> int:
    """Return *value* if it lies from *least* to *most*."""
    if not least <= value <= most:
        raise malformed(field, f"expected {least} to {'2^63-1' if most == NUMBER_MAX else most}")
    return value


def parse_optional_number(value: int, *, field: str, least: int = 1, most: int = NUMBER_MAX) -> int | None:
    """Return *value* if it lies from *least* to *most*, and None for 0, which means that the caller gave none."""
    if value != 0 and not least <= value <= most:
        raise malformed(field, f"expected 0, or {least} to {'2^63-1' if most == NUMBER_MAX else most}")
    return value or None


def parse_moment(seconds: int, nanos: int, *, field: str) -> datetime:
    """Return the moment *seconds* and *nanos* after the epoch in UTC, without what is finer than a microsecond.

    PostgreSQL stores more years than Python's calendar has: the narrower range counts.
    """
    if not _FIRST_SECOND <= seconds <= _LAST_SECOND or not 0 <= nanos < 1_000_000_000:
        raise malformed(field, "expected a moment between the years 1 and 9999, nanoseconds from 0 to 999,999,999")
    return _EPOCH + timedelta(seconds=seconds, microseconds=nanos // 1000)


def parse_span(seconds: int, nanos: int, *, field: str) -> timedelta:
    """Return a span of whole seconds: 1 second to 36,500 days."""
    if nanos != 0 or not 1 <= seconds <= _SPAN_SECONDS_MAX:
        raise malformed(field, "expected whole seconds, 1 second to 36500 days")
    return timedelta(seconds=seconds)


def check_size(field: str, data: bytes, *, bytes_min: int = 0, bytes_max: int) -> None:
    """Raise MALFORMED unless *data* has *bytes_min* to *bytes_max* bytes."""
    if len(data) > bytes_max:
        raise malformed(field, f"expected at most {bytes_max} bytes, not {len(data)}")
    if len(data) < bytes_min:
        raise malformed(field, f"expected at least {bytes_min} bytes, not {len(data)}")


def token_of(*parts: object) -> str:
    """Return a token that holds *parts*, which JSON can write. Callers give it back as it is."""
    return base64.urlsafe_b64encode(json.dumps(parts).encode()).decode()


def open_token(token: str, *, expected: KmsError) -> list[Any]:
    """Return the parts that `token_of` was given, or raise *expected*. Their types are for the reader to check."""
    try:
        if len(token) > _TOKEN_CHARACTERS_MAX:
            raise ValueError
        parts = json.loads(base64.b64decode(token, altchars=b"-_", validate=True))
    except (binascii.Error, ValueError, RecursionError):
        raise expected from None
    if not isinstance(parts, list):
        raise expected
    return parts
