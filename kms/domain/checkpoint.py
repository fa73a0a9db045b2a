"""Checkpoints of the trail as text: C2SP tlog-checkpoint in a C2SP signed-note, signed with Ed25519.

neo-kms/audit
1024
<root hash, base64>
epoch 1 previous 1000 at 2026-01-01T00:00:00.000000+00:00

— neo-kms/audit <key id and signature, base64>
"""

import base64
import re
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from typing import Final

from kms.domain.errors import malformed
from kms.domain.merkle import HASH_BYTES

_ED25519: Final = b"\x01"  # the signature type of the C2SP signed-note specification
_SPKI: Final = bytes.fromhex("302a300506032b6570032100")  # RFC 8410 section 4: what stands before the 32 bytes of the key
_KEY_BYTES: Final = 32
_SIGNATURE_BYTES: Final = 64
_DASH: Final = "\u2014 "
_SIZE: Final = re.compile(r"[1-9][0-9]{0,18}")
_EXTENSION: Final = re.compile(r"epoch ([1-9][0-9]{0,8}) previous (0|[1-9][0-9]{0,18}) at (\S{1,40})")
_NAME: Final = re.compile(r"[^\s+]{1,200}")
_KEY: Final = re.compile(r"([^\s+]{1,200})\+([0-9a-f]{8})\+([A-Za-z0-9+/=]{44})")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a note says: at `made_at` the trail called `origin` had `tree_size` rows, with this root of their tree.

    `previous_size` is that of the checkpoint before, 0 for the first.
    """

    origin: str
    tree_size: int
    root_hash: bytes
    epoch: int
    previous_size: int
    made_at: datetime

    def text(self) -> str:
        """Return the text that is signed."""
        root = base64.b64encode(self.root_hash).decode()
        extension = f"epoch {self.epoch} previous {self.previous_size} at {self.made_at.isoformat(timespec='microseconds')}"
        return f"{self.origin}\n{self.tree_size}\n{root}\n{extension}\n"


@dataclass(frozen=True, slots=True)
class VerifierKey:
    """A C2SP verifier key: the name of the signer, and its Ed25519 public key of 32 bytes."""

    name: str
    public_key: bytes

    def __str__(self) -> str:
        """Return its text: name, key id in hex, and base64 of the signature type and the key."""
        encoded = base64.b64encode(_ED25519 + self.public_key).decode()
        return f"{self.name}+{self.key_id.hex()}+{encoded}"

    @property
    def key_id(self) -> bytes:
        """The four bytes that name the key in a signature."""
        return sha256(self.name.encode() + b"\n" + _ED25519 + self.public_key).digest()[:4]

    def pem(self) -> str:
        """Return the key as SPKI PEM."""
        encoded = base64.b64encode(_SPKI + self.public_key).decode()
        return f"-----BEGIN PUBLIC KEY-----\n{encoded}\n-----END PUBLIC KEY-----\n"


@dataclass(frozen=True, slots=True)
class SignedNote:
    """A note taken apart: what it says, the bytes that are signed, and the signature of the key that was asked for."""

    checkpoint: Checkpoint
    signed: bytes
    signature: bytes


def verifier_key(name: str, pem: str) -> VerifierKey:
    """Return the verifier key of an Ed25519 key in SPKI PEM. Raises MALFORMED for another kind of key or a bad name."""
    body = "".join(line for line in pem.splitlines() if line and not line.startswith("-----"))
    spki = _decoded(body)
    if spki is None or not spki.startswith(_SPKI) or len(spki) != len(_SPKI) + _KEY_BYTES or not _NAME.fullmatch(name):
        raise malformed("key", "expected an Ed25519 public key, and a name without spaces and +")
    return VerifierKey(name, spki.removeprefix(_SPKI))


def parse_verifier_key(text: str) -> VerifierKey:
    """Return the key in *text* (`name+id+base64`), or raise MALFORMED."""
    found = _KEY.fullmatch(text.strip())
    content = _decoded(found[3]) if found else None
    if found is None or content is None or len(content) != 1 + _KEY_BYTES or not content.startswith(_ED25519):
        raise malformed("key", "expected an Ed25519 verifier key as `kms audit key` prints it: name+id+base64")
    key = VerifierKey(found[1], content[1:])
    if key.key_id.hex() != found[2]:
        raise malformed("key", "its id does not fit its name and its content: a character is wrong")
    return key


def signed_note(checkpoint: Checkpoint, key: VerifierKey, signature: bytes) -> str:
    """Return the note of a checkpoint whose `text` was signed."""
    encoded = base64.b64encode(key.key_id + signature).decode()
    return f"{checkpoint.text()}\n{_DASH}{key.name} {encoded}\n"


def parse_note(note: str, key: VerifierKey) -> SignedNote:
    """Take *note* apart. Raises MALFORMED for text that is no checkpoint, or has no signature by *key*; verifies nothing."""
    checkpoint = parse_unsigned(note)
    text, _, signatures = note.partition("\n\n")
    for line in signatures.splitlines():
        name, _, encoded = line.removeprefix(_DASH).rpartition(" ")
        content = _decoded(encoded)
        if name == key.name and content is not None and content[:4] == key.key_id and len(content) == 4 + _SIGNATURE_BYTES:
            return SignedNote(checkpoint, (text + "\n").encode(), content[4:])
    raise malformed("note", f"expected a checkpoint that is signed by {key.name}+{key.key_id.hex()}")


def parse_unsigned(note: str) -> Checkpoint:
    """Return what *note* says, whoever signed it, or raise MALFORMED for text that is no checkpoint."""
    lines = [*note.partition("\n\n")[0].split("\n"), ""]
    expected = malformed("note", "expected a checkpoint: origin, size, root hash, and epoch … previous … at …")
    if len(lines) != 5 or not lines[0] or not _SIZE.fullmatch(lines[1]):
        raise expected
    root_hash, extension = _decoded(lines[2]), _EXTENSION.fullmatch(lines[3])
    if root_hash is None or len(root_hash) != HASH_BYTES or extension is None:
        raise expected
    try:
        made_at = datetime.fromisoformat(extension[3])
    except ValueError:
        raise expected from None
    return Checkpoint(lines[0], int(lines[1]), root_hash, int(extension[1]), int(extension[2]), made_at)


def _decoded(text: str) -> bytes | None:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:  # binascii.Error is one; so is what text that is not ASCII gets
        return None
