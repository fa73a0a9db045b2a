"""The delegated signers of OCSP answers: each authority has one, with a key of its own.

The key stays when its certificate is renewed, so that answers which were signed before are still believed.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Final, Protocol

from kms.certificates.authority import Authority, check_signs
from kms.certificates.certificate import Certificate, Issuance
from kms.certificates.crls import Locks
from kms.certificates.issuer import Draft
from kms.certificates.names import Attribute, Subject
from kms.certificates.ports import Authorities, Certificates
from kms.certificates.profiles import Profile
from kms.certificates.revocation_ports import Answers
from kms.certificates.x509.signing import spki_of_pem
from kms.domain.errors import KmsError, Reason
from kms.domain.ids import KeyName, UserId
from kms.domain.keys import KeyRecord
from kms.domain.lifecycle import State

BOUND_TO: Final = "ocsp"
_SIGNER: Final = -1  # the lock of an authority's signer, beside those of its shards
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
            if certificate is not None and self._is_good(certificate, authority, now):
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
        name = KeyName(f"ocsp/{authority.name}/{authority.generation}")
        key = await self.keys.find_or_make(authority.key_owner_id, name, BOUND_TO)
        if key.identity.bound_to != BOUND_TO or key.state is not State.ACTIVE:
            raise KmsError(Reason.KEY_INACTIVE, f"the key {name} of the service signs no OCSP answers")
        return key

    def _is_good(self, certificate: Certificate, authority: Authority, now: datetime) -> bool:
        return (
            certificate.issuer_id == authority.authority_id
            and certificate.profile == self.profile.name
            and certificate.issuance is Issuance.ISSUED
            and certificate.revocation is None
            and certificate.key_id is not None
            and certificate.owner_id == authority.key_owner_id
            and certificate.not_before <= now < certificate.not_after
        )


def is_to_be_renewed(certificate: Certificate, now: datetime) -> bool:
    """Whether a signer's certificate is in the last third of its life."""
    return certificate.not_after - now < (certificate.not_after - certificate.not_before) / _RENEWED_SHARE
