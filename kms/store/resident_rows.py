"""The port `ResidentRows`: rows of keys that the token names, whoever owns them."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from kms.domain.errors import KmsError, Reason
from kms.domain.ids import KeyId, UserId
from kms.domain.keys import HeldKey
from kms.store.keys import StoredKeys
from kms.store.pool import AS_ADMINISTRATOR, Pool

OWNERS: Final = "SELECT id, user_id FROM cryptography.keys WHERE id = ANY (%(ids)s)"


@dataclass(frozen=True, slots=True)
class StoredResidentRows:
    """`ResidentRows` in `cryptography.keys`. An administrator sees whose the keys are, and only their owners the envelopes."""

    pool: Pool
    keys: StoredKeys

    async def find(self, key_ids: Collection[KeyId]) -> dict[KeyId, HeldKey | None]:
        """See `ResidentRows.find`."""
        if not key_ids:
            return {}
        found = await self.pool.fetch(AS_ADMINISTRATOR, OWNERS, {"ids": list(key_ids)})
        return {KeyId(row["id"]): await self._held(UserId(row["user_id"]), KeyId(row["id"])) for row in found}

    async def _held(self, owner: UserId, key_id: KeyId) -> HeldKey | None:
        try:
            key = await self.keys.find_usable(owner, key_id)
        except KmsError as error:
            if error.reason is not Reason.RECORD_INVALID:
                raise
            return None  # a row that is not ours proves nothing
        return None if key is None else key.held
