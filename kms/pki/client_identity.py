"""Who a client certificate names, decided anew on every call: TLS looks at a certificate once, at the handshake.

The user is in `peer_uri` alone. grpc's `x509_subject_alternative_name` mixes DNS and URI entries, and a DNS name can have
the shape of the URI. The certificate read again must say the same: grpc ends a name at its first NUL.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, TypeVar

import structlog
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.x509.oid import ExtendedKeyUsageOID

from kms.app.access import credentials_invalid
from kms.domain.errors import KmsError, malformed
from kms.domain.ids import UserId, parse_identity_uri
from kms.pki.trust import Trust

Clock = Callable[[], datetime]
E = TypeVar("E", bound=x509.ExtensionType)

_URI: Final = "peer_uri"
_CERTIFICATE: Final = "x509_pem_cert"
_CERTIFICATES_MAX: Final = 4096
# What pyca/cryptography raises for a certificate that does not parse, besides ValueError.
_UNREADABLE: Final = (
    x509.ExtensionNotFound,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
    UnsupportedAlgorithm,
)
_LOG = structlog.get_logger("kms.pki")


def host_clock() -> datetime:
    """Return the moment by this host's clock: certificates are judged by it, as TLS judges them."""
    return datetime.now(UTC)  # noqa: TID251 - the database does not know when a certificate of ours ends


@dataclass(frozen=True, slots=True)
class _Standing:
    """What of a certificate is looked at on every call. `authority`: which has issued it, see `ClientAuthorities`."""

    authority: bytes
    serial_number: int
    not_before: datetime
    not_after: datetime
    uris: tuple[str, ...]


class ClientIdentity:
    """Finds the user of a call from what TLS knows of the peer (`Identify` of the gRPC edge)."""

    def __init__(self, trust: Trust, *, deployment: str, clock: Clock) -> None:
        self._trust = trust
        self._deployment = deployment
        self._clock = clock
        self._seen: OrderedDict[bytes, _Standing] = OrderedDict()

    def __call__(self, auth_context: Mapping[str, Iterable[bytes]]) -> UserId:
        """Return the user that the certificate names, or raise CREDENTIALS_INVALID, whatever does not fit.

        *auth_context* is `grpc.ServicerContext.auth_context()`. The log tells the operator what the caller is not told.
        """
        try:
            return self._identify(auth_context)
        except (KmsError, ValueError, OSError, *_UNREADABLE) as error:
            _LOG.warning("client refused", cause=getattr(error, "message", None) or str(error) or type(error).__name__)
            raise credentials_invalid() from None

    def claimed(self, auth_context: Mapping[str, Iterable[bytes]]) -> UserId | None:
        """Return whom the certificate names, be it good or not, for the trail of refusals; None for nobody of ours."""
        try:
            return parse_identity_uri(_only(auth_context, _URI).decode("ascii"), deployment=self._deployment)
        except (KmsError, ValueError):
            return None

    def _identify(self, auth_context: Mapping[str, Iterable[bytes]]) -> UserId:
        now = self._clock()
        standing = self._standing(_only(auth_context, _CERTIFICATE))
        if not standing.not_before <= now <= standing.not_after:
            raise malformed("client certificate", "expected one that is valid today")
        self._trust.check_not_revoked(standing.authority, standing.serial_number)
        uri = _only(auth_context, _URI).decode("ascii")
        if standing.uris != (uri,):
            raise malformed("client certificate", "expected one URI name, without a NUL in it")
        return parse_identity_uri(uri, deployment=self._deployment)

    def _standing(self, pem: bytes) -> _Standing:
        standing = self._seen.pop(pem, None)
        if standing is None or standing.authority not in self._trust.authorities.certificates:
            standing = self._read(pem)
        self._seen[pem] = standing  # the last in the order is the last used
        if len(self._seen) > _CERTIFICATES_MAX:
            self._seen.popitem(last=False)
        return standing

    def _read(self, pem: bytes) -> _Standing:
        certificate = x509.load_pem_x509_certificate(pem)
        authority = self._trust.authorities.issuer_of(certificate)
        if authority is None:
            raise malformed("client certificate", "expected one issued by an identity authority itself")
        _check_made_for_clients(certificate)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        return _Standing(
            authority,
            certificate.serial_number,
            certificate.not_valid_before_utc,
            certificate.not_valid_after_utc,
            tuple(names.get_values_for_type(x509.UniformResourceIdentifier)),
        )


def _check_made_for_clients(certificate: x509.Certificate) -> None:
    """Raise MALFORMED unless *certificate* is an end entity's, and names client authentication among its usages.

    The handshake looks at usages only where a certificate names some. Without this check a certificate for a server, for
    mail or for signing code, and a subordinate authority's own, would name a user as well as one that was made to.
    anyExtendedKeyUsage says nothing about clients, so it is not enough.
    """
    constraints = _extension(certificate, x509.BasicConstraints)
    if constraints is not None and constraints.ca:
        raise malformed("client certificate", "expected one of a client, not of an authority (its basic constraints say CA)")
    usage = _extension(certificate, x509.KeyUsage)
    if usage is not None and (usage.key_cert_sign or usage.crl_sign):
        raise malformed("client certificate", "expected a key usage without keyCertSign and cRLSign, which are for authorities")
    purposes = _extension(certificate, x509.ExtendedKeyUsage)
    if purposes is None or ExtendedKeyUsageOID.CLIENT_AUTH not in purposes:
        raise malformed("client certificate", "expected clientAuth among its extended key usages")


def _extension(certificate: x509.Certificate, kind: type[E]) -> E | None:
    """Return the extension of this *kind*, None where there is none. Raises ValueError for one that does not parse."""
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None


def _only(auth_context: Mapping[str, Iterable[bytes]], name: str) -> bytes:
    values = tuple(auth_context.get(name, ()))
    if len(values) != 1:
        raise malformed("client certificate", f"expected one {name}, found {len(values)}")
    return values[0]
