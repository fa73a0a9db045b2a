"""What the service proves itself with, and whom it lets in: its certificate and key, the client authorities, their CRLs.

    server.tls_cert_file, tls_key_file  ──►  pair         ─┐
    server.client_ca_file               ──►  authorities  ─┼─►  TLS handshake, identity of each call
    server.client_crl_file              ──►  lists        ─┘

Each file is read once for both, and again when it changes. A changed pair or bundle that a start would refuse is not taken. The
one that was read before stays in force, and a warning names the file. A CRL that cannot be relied on refuses the clients of its
authority instead, since it may name any of them. Replace a file by renaming, so that it is never seen half written.
"""

import os
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final, Generic, TypeVar

import structlog
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPublicKeyTypes

from kms.domain.errors import KmsError, malformed

T = TypeVar("T")

WARNS_BEFORE: Final = (timedelta(days=30), timedelta(days=7))
_CERTIFICATE: Final = "server.tls_cert_file"
_KEY: Final = "server.tls_key_file"
_CLIENT_CA: Final = "server.client_ca_file"
_CLIENT_CRL: Final = "server.client_crl_file"
# A CRL is short-lived. Its publisher is late when a tenth of its time is left.
_CRL_SHARE_LEFT: Final = 10
_UNREADABLE: Final = (ValueError, TypeError, UnsupportedAlgorithm, x509.ExtensionNotFound, x509.DuplicateExtension)
_LOG = structlog.get_logger("kms.pki")


@dataclass(frozen=True, slots=True)
class TrustFiles:
    """PEM files: our certificate with its chain, our key, the client authorities, and their CRLs. None: nobody is revoked."""

    certificate: Path
    key: Path
    client_ca: Path
    client_crl: Path | None = None


@dataclass(frozen=True, slots=True)
class ServerPair:
    """Our certificate with its chain, and our key (both PEM). `not_after`: when the first of the chain ends."""

    certificate: bytes
    key: bytes = field(repr=False)
    not_after: datetime


@dataclass(frozen=True, slots=True)
class ClientAuthorities:
    """The authorities whose client certificates are taken, as PEM, and each by the SHA-256 of its certificate."""

    pem: bytes
    certificates: Mapping[bytes, x509.Certificate]

    def issuer_of(self, certificate: x509.Certificate) -> bytes | None:
        """Return which authority has itself issued *certificate*, None for none of them.

        A CRL speaks of its issuer's serial numbers only, so nobody may stand between.
        """
        for fingerprint, authority in self.certificates.items():
            try:
                certificate.verify_directly_issued_by(authority)
            except (InvalidSignature, *_UNREADABLE):  # of another authority
                continue
            return fingerprint
        return None


@dataclass(frozen=True, slots=True)
class RevocationList:
    """What an authority has revoked, and until when that can be relied on."""

    serial_numbers: frozenset[int]
    last_update: datetime
    next_update: datetime


Lists = Mapping[bytes, RevocationList]


@dataclass(slots=True, eq=False)
class _Followed(Generic[T]):
    """What was read from files, read again when they change. `fault` says why the files as they are now were not taken."""

    files: tuple[Path, ...]
    read: Callable[[], T]
    value: T
    stamp: object
    fault: str = ""

    def follow(self) -> bool:
        """Read the files again if they changed. Return whether they did."""
        stamp = _stamps(self.files)
        if stamp == self.stamp:
            return False
        self.stamp = stamp
        try:
            self.value, self.fault = self.read(), ""
        except (KmsError, OSError) as error:
            self.fault = error.message if isinstance(error, KmsError) else f"{self.files[0]}: {error.strerror}"
            _LOG.warning("trust material refused", file=str(self.files[0]), cause=self.fault)
        else:
            _LOG.info("trust material read", file=str(self.files[0]))
        return True


class Trust:
    """The trust material of a service. Handshakes and calls ask at once, from several threads."""

    def __init__(self, files: TrustFiles, *, clock: Callable[[], datetime]) -> None:
        """Read all files. Raises OSError, and MALFORMED with the name of the setting for what cannot be used."""
        self.files = files
        self._clock = clock
        self._lock = threading.Lock()
        self._told: dict[str, timedelta] = {}
        self._pair = _followed((files.certificate, files.key), lambda: _read_pair(files, clock()))
        self._authorities = _followed((files.client_ca,), lambda: _read_authorities(files.client_ca))
        self._lists: _Followed[Lists] | None = None
        if files.client_crl is not None:
            crl_file = files.client_crl
            self._lists = _followed((crl_file,), lambda: _read_lists(crl_file, self._authorities.value))
            for fingerprint in self._authorities.value.certificates:
                self._check_current(fingerprint)

    @property
    def pair(self) -> ServerPair:
        """Our certificate and key."""
        return self._pair.value

    @property
    def authorities(self) -> ClientAuthorities:
        """The client authorities."""
        return self._authorities.value

    def follow(self) -> None:
        """Read what has changed. What cannot be read is a warning."""
        with self._lock:
            self._pair.follow()
            if self._authorities.follow() and self._lists is not None:
                self._lists.stamp = object()  # its lists are looked at again
            if self._lists is not None:
                self._lists.follow()

    def check_not_revoked(self, authority: bytes, serial_number: int) -> None:
        """Raise MALFORMED if *authority* has revoked the client certificate of that number, or its list cannot be relied on.

        The CRL is looked at on every call, so a new list takes effect with the next one.
        """
        lists = self._lists
        if lists is None:
            return
        if _stamps(lists.files) != lists.stamp:
            with self._lock:
                lists.follow()
        if serial_number in self._check_current(authority).serial_numbers:
            raise malformed("client certificate", "expected one that is not revoked")

    @property
    def faults(self) -> list[str]:
        """Why nobody can be served, in sentences."""
        return list(self._faults(self._clock()))

    @property
    def warnings(self) -> list[str]:
        """What should be seen to, in sentences."""
        return list(self._warnings(self._clock()))

    def ends(self) -> Iterator[tuple[str, str, datetime]]:
        """Yield each setting, which of its parts, and when that ends: for a CRL its next update."""
        yield _CERTIFICATE, "", self.pair.not_after
        for certificate in self.authorities.certificates.values():
            yield _CLIENT_CA, certificate.subject.rfc4514_string(), certificate.not_valid_after_utc
        for fingerprint, crl in (self._lists.value if self._lists is not None else {}).items():
            if (authority := self.authorities.certificates.get(fingerprint)) is not None:
                yield _CLIENT_CRL, authority.subject.rfc4514_string(), crl.next_update

    def _check_current(self, authority: bytes) -> RevocationList:
        """Return the list of *authority*, or raise MALFORMED if it cannot be relied on."""
        assert self._lists is not None  # noqa: S101  # asked where there is a file
        if self._lists.fault:
            raise malformed(_CLIENT_CRL, self._lists.fault)
        crl = self._lists.value.get(authority)
        if crl is None or self._clock() > crl.next_update:
            expected = f"expected in {self.files.client_crl} a list of each authority, its next update not past"
            raise malformed(_CLIENT_CRL, expected)
        return crl

    def _faults(self, now: datetime) -> Iterator[str]:
        if now > self.pair.not_after:
            yield f"{_CERTIFICATE}: our certificate ended on {_day(self.pair.not_after)}"
        if all(now > each.not_valid_after_utc for each in self.authorities.certificates.values()):
            yield f"{_CLIENT_CA}: the client authorities have ended"
        if self._lists is not None:
            if self._lists.fault:
                yield f"{_CLIENT_CRL}: {self._lists.fault}"
            elif all(now > crl.next_update for crl in self._lists.value.values()):
                yield f"{_CLIENT_CRL}: the next update of the list is past"

    def _warnings(self, now: datetime) -> Iterator[str]:
        for setting, followed in ((_CERTIFICATE, self._pair), (_CLIENT_CA, self._authorities)):
            if followed.fault:
                yield f"{setting}: what is there now is not used: {followed.fault}"
        for setting, part, ends_at in self.ends():
            of = f" of {part}" if part else ""
            if setting == _CLIENT_CRL:
                crls = self._lists.value.values() if self._lists is not None else ()
                span = min((crl.next_update - crl.last_update for crl in crls if crl.next_update == ends_at), default=timedelta())
                if ends_at - now < span / _CRL_SHARE_LEFT:
                    yield f"{setting}: the list{of} has its next update on {_moment(ends_at)}, and there is no newer one"
            elif ends_at - now < WARNS_BEFORE[0]:
                yield f"{setting}: the certificate{of} ends on {_day(ends_at)}"

    def log_ends(self) -> None:
        """Log each certificate that ends soon: once at 30 days, and once more at 7."""
        now = self._clock()
        for setting, part, ends_at in self.ends():
            if setting == _CLIENT_CRL:
                continue
            due = [span for span in WARNS_BEFORE if ends_at - now < span]
            name = f"{setting} {part} {ends_at}"
            if due and self._told.get(name) != due[-1]:
                self._told[name] = due[-1]
                log = _LOG.error if due[-1] == WARNS_BEFORE[-1] else _LOG.warning
                log("certificate ends soon", setting=setting, subject=part, ends_at=ends_at.isoformat())


def _followed(files: tuple[Path, ...], read: Callable[[], T]) -> _Followed[T]:
    stamp = _stamps(files)  # before it is read: what is replaced meanwhile is read again
    return _Followed(files, read, read(), stamp)


def _read_pair(files: TrustFiles, now: datetime) -> ServerPair:
    """Read our certificate and key. grpc would only say that it cannot listen, or go on with those that it has."""
    certificate, key = files.certificate.read_bytes(), files.key.read_bytes()
    try:
        chain = x509.load_pem_x509_certificates(certificate)
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(files.certificate, files.key)
    except (ssl.SSLError, *_UNREADABLE):
        raise malformed(_KEY, f"expected in {files.key} the PEM key of the certificate in {files.certificate}") from None
    ends_at = min(each.not_valid_after_utc for each in chain)
    if now > ends_at:
        raise malformed(_CERTIFICATE, f"expected a certificate whose chain is valid now; it ended on {_day(ends_at)}")
    return ServerPair(certificate, key, ends_at)


def _read_authorities(file: Path) -> ClientAuthorities:
    pem, expected = file.read_bytes(), f"expected the PEM certificates of identity authorities in {file}, each once"
    try:
        found = x509.load_pem_x509_certificates(pem)
        certificates = {each.fingerprint(hashes.SHA256()): each for each in found}
        are_authorities = all(each.extensions.get_extension_for_class(x509.BasicConstraints).value.ca for each in found)
    except _UNREADABLE:
        raise malformed(_CLIENT_CA, expected) from None
    if len(certificates) != len(found) or not are_authorities:
        raise malformed(_CLIENT_CA, expected)
    return ClientAuthorities(pem, certificates)


def _read_lists(file: Path, authorities: ClientAuthorities) -> Lists:
    """Read one list of each authority. Of several by one authority the newest counts."""
    begin = b"-----BEGIN"
    lists: dict[bytes, RevocationList] = {}
    for part in file.read_bytes().split(begin)[1:]:
        try:
            crl = x509.load_pem_x509_crl(begin + part)
            found = next(key for key, each in authorities.certificates.items() if _is_of(crl, each))
        except _UNREADABLE:
            raise malformed(_CLIENT_CRL, f"expected PEM revocation lists in {file}") from None
        except StopIteration:
            raise malformed(_CLIENT_CRL, f"expected in {file} only lists that a client authority has signed") from None
        if crl.next_update_utc is None:
            raise malformed(_CLIENT_CRL, f"expected in {file} lists with a next update")
        read = RevocationList(frozenset(each.serial_number for each in crl), crl.last_update_utc, crl.next_update_utc)
        if found not in lists or lists[found].last_update < read.last_update:
            lists[found] = read
    if not lists:
        raise malformed(_CLIENT_CRL, f"expected a PEM revocation list in {file}")
    return lists


def _is_of(crl: x509.CertificateRevocationList, authority: x509.Certificate) -> bool:
    key: CertificateIssuerPublicKeyTypes = authority.public_key()  # type: ignore[assignment]  # of another type it signs nothing
    return crl.issuer == authority.subject and crl.is_signature_valid(key)


def _stamps(files: tuple[Path, ...]) -> object:
    try:
        return tuple((found.st_mtime_ns, found.st_size, found.st_ino) for found in map(os.stat, files))
    except OSError:
        return None  # gone, or in the middle of being replaced


def _day(moment: datetime) -> str:
    return moment.date().isoformat()


def _moment(moment: datetime) -> str:
    return moment.isoformat(timespec="seconds")
