"""The delegated signers of OCSP answers: each authority has one, with a key of its own.

The key stays when its certificate is renewed, so that answers which were signed before are still believed. Once one of its
certificates is revoked because the key is compromised, the next certificate is of another key.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Final, Protocol

from kms.certificates.authority import Authority, check_signs
from kms.certificates.certificate import Certificate, Issuance, RevocationReason
from kms.certificates.crls import Locks
from kms.certificates.issuer import Draft
from kms.certificates.names import Attribute, Subject
from kms.certificates.ports import Authorities, Certificates
from kms.certificates.profiles import Profile
from kms.certificates.revocation_ports import Answers
from kms.certificates.x509.signing import spki_of_pem
from kms.domain.errors import KmsError, Reason
from kms.domain.ids import KeyId, KeyName, UserId
from kms.domain.keys import KeyRecord
from kms.domain.lifecycle import State

BOUND_TO: Final = "ocsp"
_SIGNER: Final = -1  # the lock of an authority's signer, beside those of its shards
_KEYS_MAX: Final = 20
_RENEWED_SHARE: Final = 3  # in the last third of its life


class SignerKeys(Protocol):
    """The keys of signers, which belong to the service itself."""

    async def find_or_make(self, owner: UserId, name: KeyName, bound_to: str) -> KeyRecord:
        """Return the key of that name, an elliptic-curve key that is made if need be. Raises what `Keyring.create` raises."""
        ...


class SignerIssuer(Protocol):
    """Issues the certificates of signers."""

    async def issue_to_responder(self, authority: Authority, draft: Draft) -> Certificate:
        """See `Issuer.issue_to_responder`."""
        ...


@dataclass(frozen=True, slots=True)
class Responders:
    """Finds, makes and renews the signers of authorities. *profile* is that of their certificates."""

    authorities: Authorities
    certificates: Certificates
    answers: Answers
    keys: SignerKeys
    issuer: SignerIssuer
    profile: Profile
    locks: Locks

    async def find(self, authority: Authority, now: datetime) -> Certificate | None:
        """Return the certificate of the signer of an authority that ends last, or None without one that is good at *now*.

        A record that is not as the service left it is passed over.
        """
        for certificate_id in await self.answers.responder_ids(authority.authority_id):
            try:
                certificate = await self.certificates.find_any(certificate_id)
            except KmsError as error:
                if error.reason is not Reason.RECORD_INVALID:
                    raise
                continue
            if certificate is None or not self._is_good(certificate, authority, now) or certificate.key_id is None:
                continue
            if not await self._is_compromised(authority.key_owner_id, certificate.key_id):
                return certificate
        return None

    async def renew(self, authority: Authority) -> Certificate:
        """Return the certificate of the signer of an authority: a new one in the last third of its life, and the first.

        Raises AUTHORITY_INACTIVE, and what `Issuer.issue_to_responder` and `Keyring.create` raise.
        """
        async with self.locks((authority.authority_id, _SIGNER)):
            now = await self.authorities.now()
            check_signs(authority, now)
            current = await self.find(authority, now)
            if current is not None and not is_to_be_renewed(current, now):
                return current
            key = await self._key(authority)
            draft = Draft(
                owner_id=authority.key_owner_id,
                key_id=key.identity.key_id,
                profile=self.profile,
                subject=Subject(((Attribute.COMMON_NAME, f"OCSP {authority.name} {authority.generation}"),)),
                names=(),
                public_key=spki_of_pem(key.public_key),
            )
            return await self.issuer.issue_to_responder(authority, draft)

    async def _key(self, authority: Authority) -> KeyRecord:
        name = f"ocsp/{authority.name}/{authority.generation}"
        for attempt in range(1, _KEYS_MAX + 1):
            key_name = KeyName(name if attempt == 1 else f"{name}/{attempt}")
            key = await self.keys.find_or_make(authority.key_owner_id, key_name, BOUND_TO)
            is_usable = key.identity.bound_to == BOUND_TO and key.state is State.ACTIVE
            if is_usable and not await self._is_compromised(authority.key_owner_id, key.identity.key_id):
                return key
        raise KmsError(Reason.KEY_INACTIVE, f"no key {name} of the service signs OCSP answers")

    async def _is_compromised(self, owner: UserId, key_id: KeyId) -> bool:
        """Whether a certificate of a key was revoked since the key is compromised, or its records do not tell."""
        try:
            certificates = await self.certificates.of_key(owner, key_id)
        except KmsError as error:
            if error.reason is not Reason.RECORD_INVALID:
                raise
            return True
        reasons = {each.revocation.reason for each in certificates if each.revocation is not None}
        return RevocationReason.KEY_COMPROMISE in reasons

    def _is_good(self, certificate: Certificate, authority: Authority, now: datetime) -> bool:
        return (
            certificate.issuer_id == authority.authority_id
            and certificate.profile == self.profile.name
            and certificate.issuance is Issuance.ISSUED
            and certificate.revocation is None
            and certificate.owner_id == authority.key_owner_id
            and certificate.not_before <= now < certificate.not_after
        )


def is_to_be_renewed(certificate: Certificate, now: datetime) -> bool:
    """Whether a signer's certificate is in the last third of its life."""
    return certificate.not_after - now < (certificate.not_after - certificate.not_before) / _RENEWED_SHARE
