"""Another validator decides by the CRLs and OCSP answers of the service as openssl does."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import pytest
from asn1crypto import crl as asn1_crl  # type: ignore[import-untyped]  # it has no annotations
from asn1crypto import ocsp as asn1_ocsp
from asn1crypto import x509 as asn1_x509
from pyhanko_certvalidator import CertificateValidator, ValidationContext
from pyhanko_certvalidator.errors import RevokedError

from kms.certificates.certificate import Revocation, RevocationReason
from kms.certificates.crl import next_crl
from kms.certificates.x509.crls import build_crl
from kms.certificates.x509.ocsp import CertId, CertStatus, build_answer, issuer_hashes
from tests.certificates.memory_authority import NOW, MemoryAuthority, authority

_REVOCATION = Revocation(NOW - timedelta(hours=1), RevocationReason.KEY_COMPROMISE)
_LATER = NOW + timedelta(minutes=1)


def _certificate(entity: MemoryAuthority) -> asn1_x509.Certificate:
    return asn1_x509.Certificate.load(entity.der)


def _crl(issuer: MemoryAuthority, *revoked: int) -> asn1_crl.CertificateList:
    crl = next_crl(None, dict.fromkeys(revoked, _REVOCATION), (), NOW, "")
    return asn1_crl.CertificateList.load(issuer.sign(build_crl(crl, issuer.der)))


def _answer(issuer: MemoryAuthority, serial_number: int, revocation: Revocation | None) -> asn1_ocsp.OCSPResponse:
    responder = issuer.issue(2, for_ocsp=True)
    status = CertStatus(CertId("sha1", *issuer_hashes(issuer.der, "sha1"), serial_number), revocation)
    unsigned = build_answer([status], responder.der, NOW, NOW + timedelta(days=1), None)
    return asn1_ocsp.OCSPResponse.load(responder.sign(unsigned))


async def _validate(
    issuer: MemoryAuthority,
    leaf: MemoryAuthority,
    *,
    crls: Sequence[asn1_crl.CertificateList] = (),
    ocsps: Sequence[asn1_ocsp.OCSPResponse] = (),
) -> None:
    """Raise `RevokedError` if *leaf* is revoked, and another error where that is not known."""
    context = ValidationContext(
        trust_roots=[_certificate(issuer)], moment=_LATER, revocation_mode="require", crls=crls, ocsps=ocsps
    )
    validator: Any = CertificateValidator(_certificate(leaf), validation_context=context)
    await validator.async_validate_usage({"digital_signature"})


@pytest.mark.parametrize("kind", ["p256", "rsa", "ed25519"])
async def test_pyhanko_believes_lists_and_answers(kind: str) -> None:
    issuer = authority(kind)
    good, revoked = issuer.issue(1001), issuer.issue(1002)
    await _validate(issuer, good, crls=[_crl(issuer, 1002)])
    with pytest.raises(RevokedError):
        await _validate(issuer, revoked, crls=[_crl(issuer, 1002)])
    await _validate(issuer, good, ocsps=[_answer(issuer, 1001, None)])
    with pytest.raises(RevokedError):
        await _validate(issuer, revoked, ocsps=[_answer(issuer, 1002, _REVOCATION)])
