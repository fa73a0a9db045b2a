"""Limits on what a request carries."""

from typing import Final

from kms.domain.errors import malformed
from kms.domain.fields import parse_number

MESSAGE_BYTES_MAX: Final = 65_536
SIGNATURE_BYTES_MAX: Final = 1_024
DATA_KEY_BYTES: Final = range(16, 65)
# The largest self-describing ciphertext is 45 bytes longer than its plaintext; the rest is room for later formats.
CIPHERTEXT_BYTES_MAX: Final = 66_560
BATCH_ITEMS_MAX: Final = 256
BATCH_BYTES_MAX: Final = 1_048_576


def check_batch(items: int, size_bytes: int) -> None:
    """Raise MALFORMED unless a batch has 1 to 256 items of together at most 1 MiB."""
    parse_number(items, field="items", least=1, most=BATCH_ITEMS_MAX)
    if size_bytes > BATCH_BYTES_MAX:
        raise malformed("items", f"expected together at most {BATCH_BYTES_MAX} bytes, not {size_bytes}")
