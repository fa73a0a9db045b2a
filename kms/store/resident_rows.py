"""The port `ResidentRows`: rows of keys that the token names, whoever owns them."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from kms.domain.ids import KeyId, UserId
from kms.domain.keys import HeldKey
from kms.store.keys import StoredKeys
from kms.store.pool import AS_ADMINISTRATOR, Pool

OWNERS: Final = "SELECT id, user_id FROM cryptography.keys WHERE id = ANY (%(ids)s)"


@dataclass(frozen=True, slots=True)
class StoredResidentRows:
    """`ResidentRows` in `cryptography.keys`. An administrator sees whose the keys are, and only their owners the envelopes."""

    pool: Pool

    async def find(self, key_ids: Collection[KeyId]) -> dict[KeyId, HeldKey | None]:
        """See `ResidentRows.find`."""
        if not key_ids:
            return {}
        found = await self.pool.fetch(AS_ADMINISTRATOR, OWNERS, {"ids": list(key_ids)})
        return {KeyId(row["id"]): await self._held(UserId(row["user_id"]), KeyId(row["id"])) for row in found}

    async def _held(self, owner: UserId, key_id: KeyId) -> HeldKey | None:
        key = await StoredKeys(self.pool).find_usable(owner, key_id)
        # What SQL returns is not believed: the row of another key would open, and prove nothing of this one.
        return key.held if key is not None and key.held.identity.key_id == key_id else None
