"""The key that signs checkpoints: a RESIDENT one of a user of its own, bound to the audit, so that no caller can use it."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from kms.app.keyring import Keyring, KeyWish
from kms.app.ports import Call, Keys, User
from kms.app.sealing import SealingKey
from kms.domain.algorithms import KeyType, Purpose, key_spec
from kms.domain.checkpoint import verifier_key
from kms.domain.errors import KmsError, Reason
from kms.domain.ids import KeyName, UserId
from kms.domain.keys import Custody, KeyRecord
from kms.domain.lifecycle import Use, check_use
from kms.domain.trail_check import NoteReader, SignatureCheck

AUDIT: Final = "audit"
USER_NAME: Final = "kms-audit"
KEY_NAME: Final = KeyName("audit-checkpoints")
_WISH: Final = KeyWish(KEY_NAME, key_spec(KeyType.ED25519, Purpose.SIGNING, None), Custody.RESIDENT, {}, bound_to=AUDIT)


@dataclass(frozen=True, slots=True)
class SealingKeys:
    """Finds the key, and makes it where there is none. `owner` returns the id of its user, made if need be."""

    keys: Keys
    keyring: Keyring
    owner: Callable[[str], Awaitable[UserId]]
    is_valid: SignatureCheck
    origin: str

    async def find_or_make(self) -> SealingKey:
        """Return the key.

        Raises HSM_MECHANISM_UNSUPPORTED or CUSTODY_UNAVAILABLE where the token cannot have one, KEY_REVOKED and its like where
        the key was taken out of use; STORE_UNAVAILABLE, HSM_UNAVAILABLE.
        """
        owner = await self.owner(USER_NAME)
        found = await self.keys.find_usable(owner, KEY_NAME)
        if found is None:
            await self._make(owner)
            found = await self.keys.find_usable(owner, KEY_NAME)
        if found is None or found.record.identity.bound_to != AUDIT:
            raise KmsError(Reason.KEY_NOT_FOUND, f"the key {KEY_NAME} of the user {USER_NAME} is not one for checkpoints")
        # What is inactive goes on: a restore deactivates every key, and sealing protects nothing of a user's.
        check_use(found.record.state, Use.PROCESS)
        return SealingKey(found.held, reader_of(found.record, self.is_valid, self.origin))

    async def is_made(self) -> bool:
        """Whether there is a key: whoever does not seal makes none. Raises STORE_UNAVAILABLE."""
        return await self.keys.find_usable(await self.owner(USER_NAME), KEY_NAME) is not None

    async def _make(self, owner: UserId) -> None:
        call = Call(User(owner, USER_NAME, 1), "sealing", "")
        try:
            await self.keyring.create(call, _WISH)
        except KmsError as error:
            if error.reason is not Reason.NAME_TAKEN:  # another worker was faster
                raise


def reader_of(key: KeyRecord, is_valid: SignatureCheck, origin: str) -> NoteReader:
    """Return what reads the notes of *key*, in a trail called *origin*."""
    return NoteReader(verifier_key(origin, key.public_key), is_valid)


def origin_of(deployment_id: str) -> str:
    """Return the name of a deployment's trail."""
    return f"{deployment_id}/audit"
