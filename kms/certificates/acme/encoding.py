"""Base64url without padding, as JOSE has it (RFC 7515 section 2), and JSON in which no name is there twice."""

import base64
import binascii
import json
import re
from typing import Any, Final

from kms.certificates.acme.problems import malformed

_BASE64URL: Final = re.compile(r"[A-Za-z0-9_-]*")


def base64url(data: bytes) -> str:
    """Return *data* in base64url."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def from_base64url(value: object, *, field: str) -> bytes:
    """Return the bytes that *value* encodes in the one way in which they can be, or raise a problem."""
    if isinstance(value, str) and _BASE64URL.fullmatch(value):
        try:
            data = base64.urlsafe_b64decode(value + "=" * (-len(value) % 4))
        except binascii.Error:
            data = None
        if data is not None and base64url(data) == value:
            return data
    raise malformed(f"{field}: expected base64url without padding")


def parse_object(data: bytes, *, field: str) -> dict[str, Any]:
    """Return the JSON object in *data*, or raise a problem. A name that is there twice is none."""
    try:
        found = json.loads(data, object_pairs_hook=_distinct)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise malformed(f"{field}: expected a JSON object, each name once")
    return found


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name twice")
    return found
