"""OCSP requests and answers (RFC 6960), with nonces (RFC 9654).

pyca writes an answer with one certificate and stamps the current second into it, so a second pass would give other bytes.
asn1crypto joins the answers of a request for several certificates, and puts the token's signature into what was signed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import Enum, auto
from typing import Final

from asn1crypto import core  # type: ignore[import-untyped]  # it has no annotations
from asn1crypto import ocsp as asn1
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import ocsp

from kms.certificates.certificate import Revocation
from kms.certificates.x509.crls import reason_flag, reason_of
from kms.certificates.x509.signing import PublicKey, Unsigned, is_signed, public_key_of, signature_algorithm_of, unsigned
from kms.domain.errors import KmsError, Reason


class OcspError(Enum):
    """Why a request gets no answer. UNAUTHORIZED: this authority has no such certificate (RFC 5019 section 2.2.3)."""

    MALFORMED_REQUEST = auto()
    TRY_LATER = auto()
    UNAUTHORIZED = auto()


REQUEST_BYTES_MAX: Final = 4096
CERTIFICATES_MAX: Final = 16
NONCE_BYTES_MAX: Final = 128
_SERIAL_BITS_MAX: Final = 160
_HASHES: Final[dict[str, hashes.HashAlgorithm]] = {"sha1": hashes.SHA1(), "sha256": hashes.SHA256()}  # noqa: S303 - names an issuer
_ERRORS: Final = {
    OcspError.MALFORMED_REQUEST: ocsp.OCSPResponseStatus.MALFORMED_REQUEST,
    OcspError.TRY_LATER: ocsp.OCSPResponseStatus.TRY_LATER,
    OcspError.UNAUTHORIZED: ocsp.OCSPResponseStatus.UNAUTHORIZED,
}
_UNREADABLE: Final = (ValueError, TypeError, KeyError, OverflowError, UnsupportedAlgorithm)


@dataclass(frozen=True, slots=True)
class CertId:
    """The certificate that a request asks about: hashes of its issuer's name and key by *hash_name*, and its serial number."""

    hash_name: str
    issuer_name_hash: bytes
    issuer_key_hash: bytes
    serial_number: int


@dataclass(frozen=True, slots=True)
class OcspRequest:
    """A request: one certificate or several, and the nonce that the answer must repeat."""

    cert_ids: tuple[CertId, ...]
    nonce: bytes | None


@dataclass(frozen=True, slots=True)
class CertStatus:
    """What an answer says of a certificate. `revocation` None: it is good."""

    cert_id: CertId
    revocation: Revocation | None


@dataclass(frozen=True, slots=True)
class ParsedAnswer:
    """An answer about one certificate, whose signature was verified."""

    status: CertStatus
    this_update: datetime
    next_update: datetime


def malformed_request() -> KmsError:
    """Return the refusal of a request that cannot be read. It becomes an OCSP error, and the log has it."""
    return KmsError(Reason.CERTIFICATE_INVALID, "expected an OCSP request of at most 4 KiB for 1 to 16 certificates")


def parse_ocsp_request(data: bytes) -> OcspRequest:
    """Return a request in DER. A signature of it and a requestor's name are ignored. Raises CERTIFICATE_INVALID."""
    if len(data) > REQUEST_BYTES_MAX:
        raise malformed_request()
    try:
        request = asn1.OCSPRequest.load(data, strict=True)["tbs_request"]
        if request["version"].native != "v1" or not 1 <= len(request["request_list"]) <= CERTIFICATES_MAX:
            raise malformed_request()
        cert_ids = tuple(_cert_id(each) for each in request["request_list"])
        return OcspRequest(cert_ids, _nonce(request["request_extensions"]))
    except _UNREADABLE:
        raise malformed_request() from None


def _cert_id(request: asn1.Request) -> CertId:
    _check_extensions(request["single_request_extensions"])
    found = request["req_cert"]
    hash_name = found["hash_algorithm"]["algorithm"].native
    name_hash, key_hash = found["issuer_name_hash"].native, found["issuer_key_hash"].native
    serial_number = found["serial_number"].native
    size = _HASHES[hash_name].digest_size
    if len(name_hash) != size or len(key_hash) != size or serial_number.bit_length() > _SERIAL_BITS_MAX:
        raise malformed_request()
    return CertId(hash_name, name_hash, key_hash, serial_number)


def _nonce(extensions: asn1.TBSRequestExtensions) -> bytes | None:
    """Return the nonce of a request, None without one."""
    _check_extensions(extensions, known=frozenset({"nonce"}))
    nonces = [each["extn_value"] for each in extensions if each["extn_id"].native == "nonce"]
    if not nonces:
        return None
    # OCTET STRING in the OCTET STRING of the extension: clients from before RFC 6960 left the inner one out.
    nonce: bytes = core.OctetString.load(nonces[0].contents, strict=True).native
    if len(nonces) > 1 or not 1 <= len(nonce) <= NONCE_BYTES_MAX:
        raise malformed_request()
    return nonce


def _check_extensions(extensions: core.SequenceOf, known: frozenset[str] = frozenset()) -> None:
    """Raise CERTIFICATE_INVALID for a critical extension that is not known (RFC 6960 section 4.4)."""
    if any(each["critical"].native and each["extn_id"].native not in known for each in extensions):
        raise malformed_request()


def issuer_hashes(issuer_der: bytes, hash_name: str) -> tuple[bytes, bytes]:
    """Return the hashes of name and key by which a `CertId` names the issuer with this certificate."""
    issuer = x509.load_der_x509_certificate(issuer_der)
    request = ocsp.OCSPRequestBuilder().add_certificate(issuer, issuer, _HASHES[hash_name]).build()
    return request.issuer_name_hash, request.issuer_key_hash


def build_answer(
    statuses: Sequence[CertStatus], responder_der: bytes, this_update: datetime, next_update: datetime, nonce: bytes | None
) -> Unsigned:
    """Return the answer about one certificate or several, to be signed with the key of the responder's certificate."""
    responder = x509.load_der_x509_certificate(responder_der)
    signer = public_key_of(responder.public_key())
    drafts = [_draft(status, responder, signer, this_update, next_update, nonce) for status in statuses]
    answer = drafts[0]
    basic = answer["response_bytes"]["response"].parsed
    responses = basic["tbs_response_data"]["responses"]
    for other in drafts[1:]:
        responses.append(other["response_bytes"]["response"].parsed["tbs_response_data"]["responses"][0])
    to_sign: bytes = basic["tbs_response_data"].dump()
    algorithm = signature_algorithm_of(signer)

    def finish(signature: bytes) -> bytes:
        if not is_signed(signer, algorithm, signature, to_sign):
            raise KmsError(Reason.RECORD_INVALID, "the token's signature is not by the key of the responder's certificate")
        return _with_signature(answer, signature)

    return Unsigned(to_sign, algorithm, answer.dump(), finish)


def _draft(
    status: CertStatus,
    responder: x509.Certificate,
    signer: PublicKey,
    this_update: datetime,
    next_update: datetime,
    nonce: bytes | None,
) -> asn1.OCSPResponse:
    cert_id, revocation = status.cert_id, status.revocation
    builder = (
        ocsp.OCSPResponseBuilder()
        .add_response_by_hash(
            issuer_name_hash=cert_id.issuer_name_hash,
            issuer_key_hash=cert_id.issuer_key_hash,
            serial_number=cert_id.serial_number,
            algorithm=_HASHES[cert_id.hash_name],
            cert_status=ocsp.OCSPCertStatus.GOOD if revocation is None else ocsp.OCSPCertStatus.REVOKED,
            this_update=this_update,
            next_update=next_update,
            revocation_time=None if revocation is None else revocation.at,
            revocation_reason=None if revocation is None else reason_flag(revocation.reason),
        )
        .responder_id(ocsp.OCSPResponderEncoding.HASH, responder)
        .certificates([responder])
    )
    if nonce is not None:
        builder = builder.add_extension(x509.OCSPNonce(nonce), critical=False)
    return asn1.OCSPResponse.load(unsigned(builder, signer).draft)


def _with_signature(answer: asn1.OCSPResponse, signature: bytes) -> bytes:
    basic = answer["response_bytes"]["response"].parsed
    basic["signature"] = core.OctetBitString(signature)
    answer["response_bytes"]["response"] = basic
    der: bytes = answer.dump()
    return der


def parse_answer(der: bytes, responder_der: bytes) -> ParsedAnswer:
    """Return what an answer about one certificate says. Raises CERTIFICATE_INVALID unless the responder signed it."""
    signer = public_key_of(x509.load_der_x509_certificate(responder_der).public_key())
    try:
        answer = ocsp.load_der_ocsp_response(der)
        is_ours = is_signed(signer, signature_algorithm_of(signer), answer.signature, answer.tbs_response_bytes)
        if not is_ours or answer.next_update_utc is None or answer.certificate_status is ocsp.OCSPCertStatus.UNKNOWN:
            raise _not_an_answer()
        hash_name = {"sha1": "sha1", "sha256": "sha256"}[answer.hash_algorithm.name]
        cert_id = CertId(hash_name, answer.issuer_name_hash, answer.issuer_key_hash, answer.serial_number)
        entry = None
        if answer.revocation_time_utc is not None:
            entry = Revocation(answer.revocation_time_utc, reason_of(answer.revocation_reason))
        return ParsedAnswer(CertStatus(cert_id, entry), answer.this_update_utc, answer.next_update_utc)
    except _UNREADABLE:
        raise _not_an_answer() from None


def error_answer(error: OcspError) -> bytes:
    """Return an OCSP answer that is an error, which nobody signs (RFC 6960 section 4.2.1)."""
    return ocsp.OCSPResponseBuilder.build_unsuccessful(_ERRORS[error]).public_bytes(Encoding.DER)


def _not_an_answer() -> KmsError:
    return KmsError(Reason.CERTIFICATE_INVALID, "expected an OCSP answer of this responder")
