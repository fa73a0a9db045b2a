"""The keys with which the service signs certificates, CRLs and OCSP answers.

They belong to a user of the service itself and are bound to what they are for. So no caller uses, moves or rotates one, and each
signature is charged and recorded as that of any key is: with whose request it was made for.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from kms.app.access import Access
from kms.app.keyring import Keyring, KeyWish
from kms.app.ports import Call
from kms.certificates.authority import Authority
from kms.certificates.ports import ServiceUsers
from kms.certificates.x509.signing import Unsigned
from kms.domain.algorithms import KeySpec, KeyType, Purpose, Scheme, SignatureForm, key_spec
from kms.domain.errors import KmsError, Reason
from kms.domain.ids import KeyId, KeyName, UserId
from kms.domain.key_row import record_invalid
from kms.domain.keys import Custody, KeyRecord
from kms.keys.crypto.charged import ChargedUses
from kms.keys.crypto.signing import ToSign

USER_NAME: Final = "kms-certificates"
AUTHORITY: Final = "certificate-authority"
OCSP: Final = "ocsp"
_P256: Final = key_spec(KeyType.SECP256R1, Purpose.SIGNING, None)


@dataclass(frozen=True, slots=True)
class ServiceKeys:
    """Makes those keys, and signs with them."""

    users: ServiceUsers
    access: Access
    keyring: Keyring
    uses: ChargedUses

    async def make(self, call: Call | None, name: KeyName, spec: KeySpec, custody: Custody | None, bound_to: str) -> KeyRecord:
        """Make a signing key. Raises NAME_TAKEN, CUSTODY_UNAVAILABLE, HSM_MECHANISM_UNSUPPORTED, HSM_UNAVAILABLE."""
        try:
            owner = await self.users.find_or_create_service(USER_NAME)
        except KmsError as error:
            if error.reason is not Reason.NAME_TAKEN:  # another worker was faster
                raise
            owner = await self.users.find_or_create_service(USER_NAME)
        return await self.keyring.create(await self._call(owner, call), KeyWish(name, spec, custody, {}, bound_to=bound_to))

    async def find(self, owner: UserId, key_id: KeyId) -> KeyRecord:
        """Return a key. Raises RECORD_INVALID where there is none, RECORD_INVALID of its record."""
        found = await self.keyring.keys.find(owner, key_id)
        if found is None:
            raise record_invalid(key_id)
        return found

    async def find_or_make(self, owner: UserId, name: KeyName, bound_to: str) -> KeyRecord:
        """Return the key of that name, a P-256 key that is made if need be. Raises what `make` raises except NAME_TAKEN."""
        found = await self.keyring.keys.find(owner, name)
        if found is None:
            try:
                return await self.make(None, name, _P256, None, bound_to)
            except KmsError as error:
                if error.reason is not Reason.NAME_TAKEN:  # another worker was faster
                    raise
            found = await self.keyring.keys.find(owner, name)
        if found is None:
            raise record_invalid()
        return found

    async def sign_for(self, call: Call | None, authority: Authority, unsigned: Unsigned, details: Mapping[str, str]) -> bytes:
        """Return *unsigned* signed by *authority*, as DER. None as *call*: the service does it by itself."""
        owner, key_id = authority.key_owner_id, authority.key_id
        return await self.sign(call, owner, key_id, AUTHORITY, unsigned, {"authority": str(authority.authority_id), **details})

    async def sign(
        self, call: Call | None, owner: UserId, key_id: KeyId, bound_to: str, unsigned: Unsigned, details: Mapping[str, str]
    ) -> bytes:
        """Return *unsigned* signed by a key that is bound to *bound_to*, as DER; charged, with *details* in the trail.

        Raises the reason of the key's state, USAGE_LIMIT_REACHED, WRONG_PURPOSE, HSM_UNAVAILABLE, STORE_UNAVAILABLE,
        OUTCOME_UNKNOWN; RECORD_INVALID if the signature is not of the key that the certificate names.
        """
        data, is_digest = unsigned.token_input
        form = SignatureForm.DER if unsigned.algorithm.scheme is Scheme.ECDSA else None
        requested_by = {} if call is None else {"requested_by": str(call.user.user_id)}
        request = ToSign(
            key_id,
            data,
            is_digest,
            unsigned.algorithm.scheme,
            unsigned.algorithm.hash,
            form,
            bound_to=bound_to,
            details={**details, **requested_by},
        )
        return unsigned.signed((await self.uses.sign(await self._call(owner, call), request)).signature)

    async def _call(self, owner: UserId, call: Call | None) -> Call:
        """Return the call in which the service's own user acts, on behalf of *call*."""
        user = await self.access.admit(owner, recent=True)  # the charge looks at them again
        return Call(user, "", "") if call is None else Call(user, call.request_id, call.peer)


def authority_key_name(name: str, generation: int, authority_id: UUID) -> KeyName:
    """Return the name of an authority's key. An attempt that failed leaves its key behind: the next one has another name."""
    return KeyName(f"ca/{name}/{generation}/{authority_id.hex[:8]}")
