"""The bytes of a record that its MAC covers: each value after a letter for its type, so that no two values are alike."""

from datetime import UTC, datetime, timedelta
from typing import Final
from uuid import UUID

from kms.domain.envelope import lengths_prefixed

FORMAT_VERSION: Final = 1
_BEGINNING: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)

Value = UUID | datetime | str | bytes | int | tuple[str, ...] | tuple[bytes, ...] | None


def record_bytes(kind: bytes, *values: Value) -> bytes:
    """Return the bytes of a record of a *kind* that has *values*. Moments are aware."""
    return lengths_prefixed(kind, bytes((FORMAT_VERSION,)), *map(_bytes, values))


def _bytes(value: Value) -> bytes:
    match value:
        case None:
            return b"-"
        case str():
            return b"s" + value.encode()
        case bytes():
            return b"b" + value
        case int():
            return b"i%d" % value
        case UUID():
            return b"u" + value.bytes
        case datetime():
            return b"m%d" % ((value - _BEGINNING) // _MICROSECOND)
        case tuple():
            return b"t" + lengths_prefixed(*map(_bytes, value))
