"""Certificates of authorities elsewhere, for keys of the caller: a request goes out, and a certificate comes back."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from kms.app.keyring import require_key, require_usable_key
from kms.app.ports import Call, Keys
from kms.certificates.certificate import Certificate, Issuance
from kms.certificates.issuing import check_signs
from kms.certificates.names import GeneralName, Subject, certificate_invalid
from kms.certificates.ports import Certificates
from kms.certificates.x509.certificates import build_request, certificates_in, parse_certificate
from kms.certificates.x509.signing import spki_of_pem
from kms.certificates.x509.stored import check_storable, tbs_sha256_of
from kms.domain.algorithms import Scheme, SignatureForm
from kms.domain.ids import KeyRef
from kms.domain.lifecycle import Use
from kms.keys.crypto.charged import ChargedUses
from kms.keys.crypto.signing import ToSign

IMPORTED: Final = "imported"


@dataclass(frozen=True, slots=True)
class OwnKeys:
    """CreateCertificateRequest for a key of the caller, and ImportCertificate."""

    keys: Keys
    uses: ChargedUses
    certificates: Certificates
    random: Callable[[int], Awaitable[bytes]]

    async def request(self, call: Call, ref: KeyRef, subject: Subject, names: tuple[GeneralName, ...]) -> bytes:
        """Return a request of PKCS#10 for a key of the caller, in DER; a use of the key, charged as any signature.

        Raises CERTIFICATE_INVALID, KEY_NOT_FOUND and why the key must not sign.
        """
        if not subject.attributes and not names:
            raise certificate_invalid("subject", "expected a subject or a name")
        key = (await require_usable_key(self.keys, call.user.user_id, ref, Use.PROTECT, fresh=False)).record
        check_signs(key)
        unsigned = build_request(subject, names, spki_of_pem(key.public_key))
        data, is_digest = unsigned.token_input
        algorithm = unsigned.algorithm
        form = SignatureForm.DER if algorithm.scheme is Scheme.ECDSA else None
        to_sign = ToSign(key.identity.key_id, data, is_digest, algorithm.scheme, algorithm.hash, form)
        return unsigned.signed((await self.uses.sign(call, to_sign)).signature)

    async def keep(self, call: Call, ref: KeyRef, data: bytes) -> Certificate:
        """Store a certificate that an authority elsewhere issued for a key of the caller, in whatever state the key is.

        Raises CERTIFICATE_INVALID for one of another key, KEY_NOT_FOUND, CREDENTIALS_INVALID.
        """
        key = await require_key(self.keys, call.user.user_id, ref)
        check_signs(key)
        found = certificates_in(data)
        if len(found) != 1:
            raise certificate_invalid("certificate", "expected one certificate")
        check_storable(found[0])
        parsed = parse_certificate(found[0])
        if parsed.public_key != spki_of_pem(key.public_key):
            raise certificate_invalid("certificate", "expected a certificate of this key")
        certificate = Certificate(
            certificate_id=UUID(bytes=await self.random(16), version=4),
            owner_id=call.user.user_id,
            key_id=key.identity.key_id,
            issuer_id=None,
            profile=IMPORTED,
            serial_number=parsed.serial_number,
            issuer=parsed.issuer,
            subject=parsed.subject,
            names=tuple(map(str, parsed.names)),
            not_before=parsed.validity.not_before,
            not_after=parsed.validity.not_after,
            is_ca=parsed.is_ca,
            tbs_sha256=tbs_sha256_of(found[0]),
            requested_by=call.user.user_id,
            created_at=await self.certificates.now(),
            issuance=Issuance.IMPORTED,
            der=found[0],
        )
        await self.certificates.add(call, certificate, None)
        return certificate
