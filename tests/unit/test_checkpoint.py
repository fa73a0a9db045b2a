"""Notes: the golden one, what C2SP says of keys and signatures, and whatever does not fit refused."""

import base64
from dataclasses import replace
from datetime import UTC, datetime
from hashlib import sha256

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from kms.domain.checkpoint import Checkpoint, VerifierKey, parse_note, parse_verifier_key, signed_note, verifier_key
from kms.domain.errors import KmsError, Reason

PRIVATE = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
KEY = VerifierKey("neo-kms/audit", PRIVATE.public_key().public_bytes_raw())
CHECKPOINT = Checkpoint("neo-kms/audit", 1024, bytes(range(32)), 1, 1000, datetime(2026, 1, 1, tzinfo=UTC))
TEXT = (
    "neo-kms/audit\n"
    "1024\n"
    "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=\n"
    "epoch 1 previous 1000 at 2026-01-01T00:00:00.000000+00:00\n"
)


def note() -> str:
    return signed_note(CHECKPOINT, KEY, PRIVATE.sign(CHECKPOINT.text().encode()))


def test_the_note_of_the_formats_page() -> None:
    assert CHECKPOINT.text() == TEXT
    text, _, signature = note().partition("\n\n")
    assert text + "\n" == TEXT
    assert signature == f"\u2014 neo-kms/audit {base64.b64encode(KEY.key_id + PRIVATE.sign(TEXT.encode())).decode()}\n"


def test_the_key_of_the_formats_page() -> None:
    assert KEY.key_id == sha256(b"neo-kms/audit\n\x01" + KEY.public_key).digest()[:4]
    assert str(KEY) == "neo-kms/audit+845f7105+AQOhB7/zzhC+HXDdGOdLwJln5NYwm6UNXx3chmQSVTG4"
    assert parse_verifier_key(str(KEY)) == KEY
    assert verifier_key(KEY.name, KEY.pem()) == KEY


def test_a_note_is_read_as_it_was_written() -> None:
    found = parse_note(note(), KEY)
    assert found.checkpoint == CHECKPOINT
    PRIVATE.public_key().verify(found.signature, found.signed)


def test_signatures_of_others_stand_beside_ours() -> None:
    text, _, ours = note().partition("\n\n")
    other = f"\u2014 witness.example {base64.b64encode(bytes(68)).decode()}\n"
    assert parse_note(f"{text}\n\n{other}{ours}", KEY).checkpoint == CHECKPOINT


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("1024", "01024"),
        ("1024", "-1"),
        ("AAEC", "AAE"),
        ("previous", "before"),
        ("2026-01-01", "2026-13-01"),
        ("\n\n", "\n"),
        ("\u2014 neo-kms/audit", "\u2014 neo-kms/other"),
        ("epoch 1", "epoch 1\nmore"),
        ("AAEC", "\u00e4\u00f6\u00fc\u00df"),
        ("neo-kms/audit hF9x", "neo-kms/audit \u00e4F9w"),
    ],
)
def test_what_is_no_signed_checkpoint_is_refused(before: str, after: str) -> None:
    with pytest.raises(KmsError) as caught:
        parse_note(note().replace(before, after, 1), KEY)
    assert caught.value.reason is Reason.MALFORMED


@pytest.mark.parametrize(
    "text", ["", "a+b+c", str(KEY)[:-4] + "AAAA", str(KEY).replace("neo", "new"), str(KEY).replace("+", " ")]
)
def test_what_is_no_verifier_key_is_refused(text: str) -> None:
    with pytest.raises(KmsError) as caught:
        parse_verifier_key(text)
    assert caught.value.reason is Reason.MALFORMED


def test_a_key_of_another_name_has_another_id() -> None:
    assert replace(KEY, name="other/audit").key_id != KEY.key_id
