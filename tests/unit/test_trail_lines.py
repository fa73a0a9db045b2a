"""Lines of an exported trail: whatever is none is told as that, and never ends the verifier."""

import pytest

from kms.domain.errors import KmsError, Reason
from kms.domain.trail_lines import parse_line


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"[]",
        b"\xff",
        b'{"commit_order":"x","table":"t","id":"i"}',
        b'{"commit_order":1e999,"table":"t","id":"i"}',
        b'{"commit_order":null,"table":"t"}',
        b'{"frontier":[],"note":"n","size":1e999}',
        b'{"frontier":["00"],"note":"n","size":1}',
        b"[" * 200_000,
    ],
)
def test_what_is_no_line_of_a_trail_is_malformed(line: bytes) -> None:
    with pytest.raises(KmsError) as caught:
        parse_line(line)
    assert caught.value.reason is Reason.MALFORMED
