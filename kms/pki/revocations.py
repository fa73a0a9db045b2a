"""The authority's revocation list (RFC 5280 section 5), read again whenever its file changes."""

import os
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPublicKeyTypes

from kms.domain.errors import malformed


@dataclass(frozen=True, slots=True)
class _Version:
    """One state of the file: what it revokes and until when that can be relied on. `stamp` tells it from other states."""

    stamp: tuple[int, int, int]
    serial_numbers: frozenset[int]
    next_update: datetime


class Revocations:
    """What the authority has revoked, by a CRL file that is looked at on every check.

    Whatever is wrong with the file (gone, broken, of another authority, past its `nextUpdate`) refuses everyone: a list that
    cannot be read may name anyone. Replace the file by renaming, so that it is never seen half written.
    """

    def __init__(self, authority: x509.Certificate, crl_file: Path, *, now: datetime) -> None:
        """Read the list. Raises OSError, and MALFORMED for what is no current list of *authority*."""
        self._authority = authority
        self._file = crl_file
        self._version = self._read()
        self._check_current(self._version, now)

    def check(self, serial_number: int, *, now: datetime) -> None:
        """Raise MALFORMED if *serial_number* is revoked or the list cannot be relied on; OSError if it cannot be read."""
        if _stamp(os.stat(self._file)) != self._version.stamp:
            self._version = self._read()
        self._check_current(self._version, now)
        if serial_number in self._version.serial_numbers:
            raise malformed("client certificate", "expected one that is not revoked")

    def _read(self) -> _Version:
        with self._file.open("rb") as stream:
            # Of the open file, so that stamp and content belong together.
            stamp, content = _stamp(os.fstat(stream.fileno())), stream.read()
        try:
            crl = x509.load_pem_x509_crl(content)
            genuine = crl.issuer == self._authority.subject and crl.is_signature_valid(_issuer_key(self._authority))
        except (ValueError, TypeError):
            raise malformed("server.client_crl_file", f"expected a PEM revocation list in {self._file}") from None
        if not genuine or crl.next_update_utc is None:
            raise malformed("server.client_crl_file", f"expected in {self._file} a list signed by the identity authority")
        return _Version(stamp, frozenset(revoked.serial_number for revoked in crl), crl.next_update_utc)

    def _check_current(self, version: _Version, now: datetime) -> None:
        if now > version.next_update:
            raise malformed("server.client_crl_file", f"expected a list whose next update is not past in {self._file}")


def _stamp(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_mtime_ns, status.st_size, status.st_ino


def _issuer_key(authority: x509.Certificate) -> CertificateIssuerPublicKeyTypes:
    return authority.public_key()  # type: ignore[return-value]  # an authority's key signs; is_signature_valid refuses others
