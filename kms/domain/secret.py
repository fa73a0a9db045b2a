"""A type for bytes that must not be shown."""

import hmac
from typing import NoReturn


class Secret:
    """Bytes that do not print, compare in constant time and refuse to be pickled."""

    __slots__ = ("_value",)

    def __init__(self, value: bytes) -> None:
        self._value = value

    def reveal(self) -> bytes:
        """Return the bytes. Every call of this is a place to look at in a review."""
        return self._value

    def __repr__(self) -> str:
        return "<Secret>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and hmac.compare_digest(self._value, other._value)

    __hash__ = None  # type: ignore[assignment]  # a hash of a secret would leak equality through dict timing

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secret is never pickled")
