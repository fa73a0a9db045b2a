"""Certificates and requests as files: PEM (RFC 7468), or DER."""

import base64
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from textwrap import wrap
from typing import Final

from kms.cli.output import STDOUT, Encoding, write_bytes

CERTIFICATE: Final = "CERTIFICATE"
REQUEST: Final = "CERTIFICATE REQUEST"
_COLUMNS: Final = 64


class Form(StrEnum):
    """How certificates and requests are written."""

    PEM = "pem"
    DER = "der"


def pem(label: str, *ders: bytes) -> str:
    """Return *ders* in PEM, one after another."""
    return "".join(
        f"-----BEGIN {label}-----\n" + "\n".join(wrap(base64.b64encode(der).decode(), _COLUMNS)) + f"\n-----END {label}-----\n"
        for der in ders
    )


def write(label: str, ders: Sequence[bytes], form: Form, out: Path | None) -> None:
    """Write *ders* to *out* or standard output. DER holds one: the first."""
    if form is Form.DER:
        write_bytes(ders[0], out, None)
    elif out in (None, STDOUT) and sys.stdout.isatty():
        print(pem(label, *ders), end="")
    else:
        write_bytes(pem(label, *ders).encode(), out, Encoding.RAW)
