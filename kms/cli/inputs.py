"""What a command works on: text of the command line, a file, or standard input."""

import base64
import binascii
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

import typer

from kms.app.limits import CIPHERTEXT_BYTES_MAX, MESSAGE_BYTES_MAX
from kms.cli.output import Encoding
from kms.domain.errors import KmsError, Reason

STDIN: Final = Path("-")
# A text form of the longest ciphertext, with line ends.
_FILE_BYTES_MAX: Final = 4 * CIPHERTEXT_BYTES_MAX


@dataclass(frozen=True, slots=True)
class Input:
    """A message, or with `is_digest` the digest of one."""

    data: bytes
    is_digest: bool = False


def read_input(file: Path | None, message: str | None, digest: str | None = None) -> Input:
    """Return the one input that is given; none given reads standard input. Raises a usage error, KmsError or OSError."""
    if sum(given is not None for given in (file, message, digest)) > 1:
        raise typer.BadParameter("give only one of --in, --message and --digest")
    if digest is not None:
        return Input(from_hex(digest, "--digest"), is_digest=True)
    if message is not None:
        return Input(message.encode(errors="surrogateescape"))
    return Input(read_file(file or STDIN, bytes_max=MESSAGE_BYTES_MAX))


def read_file(file: Path, *, bytes_max: int = _FILE_BYTES_MAX) -> bytes:
    """Return the content of *file*, `-` being standard input, or raise MALFORMED if it is longer than *bytes_max*."""
    if file != STDIN:
        with file.open("rb") as stream:
            return _read(stream, str(file), bytes_max)
    if sys.stdin.isatty():
        print("kms: reading standard input; end it with Ctrl-D", file=sys.stderr)
    return _read(sys.stdin.buffer, "standard input", bytes_max)


def read_encoded(file: Path, encoding: Encoding) -> bytes:
    """Return the bytes that *file* holds in *encoding*."""
    data = read_file(file)
    if encoding is Encoding.RAW:
        return data
    text = data.decode("ascii", errors="replace")
    return from_hex(text, str(file)) if encoding is Encoding.HEX else from_base64(text, str(file))


def from_hex(text: str, where: str) -> bytes:
    """Return the bytes that *text* spells in hexadecimal; white space and a leading 0x do not matter."""
    try:
        return bytes.fromhex(text.strip().removeprefix("0x"))
    except ValueError:
        raise typer.BadParameter(f"{where}: expected an even number of hexadecimal digits") from None


def from_base64(text: str, where: str) -> bytes:
    """Return the bytes that *text* spells in base64 (RFC 4648 section 4); white space does not matter."""
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise typer.BadParameter(f"{where}: expected base64") from None


def read_aad(text: str | None, hexadecimal: str | None, *, option: str = "--aad") -> bytes:
    """Return the associated data that is given as text (*option*) or in hexadecimal (*option*`-hex`); none is empty."""
    if text is not None and hexadecimal is not None:
        raise typer.BadParameter(f"give only one of {option} and {option}-hex")
    return from_hex(hexadecimal, f"{option}-hex") if hexadecimal is not None else (text or "").encode(errors="surrogateescape")


def _read(stream: BinaryIO, name: str, bytes_max: int) -> bytes:
    data = stream.read(bytes_max + 1)
    if len(data) > bytes_max:
        instead = "sign its digest, or encrypt it yourself with a data key"
        raise KmsError(Reason.MALFORMED, f"{name}: more than {bytes_max} bytes; {instead}", field="input")
    return data
