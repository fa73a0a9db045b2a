"""The delegated signers of OCSP answers: each authority has one, with a key of its own.

The key stays when its certificate is renewed, so that answers which were signed before are still believed.
"""

from dataclasses import dataclass
from typing import Final

from kms.certificates.authority import Authority, check_signs
from kms.certificates.certificate import Certificate
from kms.certificates.issuer import Draft, Issuer
from kms.certificates.names import Attribute, Subject
from kms.certificates.ocsp import OcspAnswering
from kms.certificates.ports import Authorities
from kms.certificates.profiles import Profile
from kms.certificates.service_keys import OCSP, ServiceKeys
from kms.certificates.x509.signing import spki_of_pem
from kms.domain.algorithms import KeyType, Purpose, key_spec
from kms.domain.errors import KmsError, Reason
from kms.domain.ids import KeyName
from kms.domain.keys import KeyRecord
from kms.domain.lifecycle import State

_SPEC: Final = key_spec(KeyType.SECP256R1, Purpose.SIGNING, None)
_RENEWED_SHARE: Final = 3  # in the last third of its life


@dataclass(frozen=True, slots=True)
class Responders:
    """Makes and renews the signers of authorities. *profile* is that of their certificates."""

    authorities: Authorities
    answering: OcspAnswering
    keys: ServiceKeys
    issuer: Issuer
    profile: Profile

    async def renew(self, authority: Authority) -> Certificate:
        """Return the certificate of the signer of an authority, a new one in the last third of its life.

        Raises AUTHORITY_INACTIVE, and what `Issuer.issue_to_responder` raises.
        """
        now = await self.authorities.now()
        check_signs(authority, now)
        current = await self.answering.responder(authority, now)
        if current is not None and current.not_after - now >= (current.not_after - current.not_before) / _RENEWED_SHARE:
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
        found = await self.keys.keyring.keys.find(authority.key_owner_id, name)
        if found is None:
            try:
                return await self.keys.make(None, name, _SPEC, None, OCSP)
            except KmsError as error:
                if error.reason is not Reason.NAME_TAKEN:  # another worker was faster
                    raise
            found = await self.keys.keyring.keys.find(authority.key_owner_id, name)
        if found is None or found.identity.bound_to != OCSP or found.state is not State.ACTIVE:
            raise KmsError(Reason.KEY_INACTIVE, f"the key {name} of the service signs no OCSP answers")
        return found
