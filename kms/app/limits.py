"""Limits on what a request carries."""

from typing import Final

from kms.domain.errors import malformed

MESSAGE_BYTES_MAX: Final = 65_536
# The largest self-describing ciphertext is 45 bytes longer than its plaintext; the rest is room for later formats.
CIPHERTEXT_BYTES_MAX: Final = 66_560
BATCH_ITEMS_MAX: Final = 256
BATCH_BYTES_MAX: Final = 1_048_576


def check_size(field: str, data: bytes, *, bytes_max: int = MESSAGE_BYTES_MAX) -> None:
    """Raise MALFORMED if *data* is longer than *bytes_max*."""
    if len(data) > bytes_max:
        raise malformed(field, f"expected at most {bytes_max} bytes, not {len(data)}")


def check_batch(items: int, size_bytes: int) -> None:
    """Raise MALFORMED unless a batch has 1 to 256 items of together at most 1 MiB."""
    if not 0 < items <= BATCH_ITEMS_MAX:
        raise malformed("items", f"expected 1 to {BATCH_ITEMS_MAX}, not {items}")
    if size_bytes > BATCH_BYTES_MAX:
        raise malformed("items", f"expected together at most {BATCH_BYTES_MAX} bytes, not {size_bytes}")
