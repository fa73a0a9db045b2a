"""The lineage of a key: the keys that had its name before, and the key that has it now.

    k@1 ──► k@2 ──► k@3 ──► k      (each was rotated to the next)

The names are part of the records that MACs prove. So the lineage follows from the names, and from nothing that is stored beside.
"""

from kms.app.ports import Keys
from kms.domain.ids import LINEAGE_SEPARATOR, KeyName, UserId
from kms.domain.keys import KeyRecord


async def neighbours(keys: Keys, caller: UserId, key: KeyRecord) -> tuple[KeyRecord | None, KeyRecord | None]:
    """Return the predecessor and the successor of a key of *caller*. None: there is none."""
    base, _, number = str(key.name).partition(LINEAGE_SEPARATOR)
    if number:
        return await _numbered(keys, caller, base, int(number) - 1), (
            await _numbered(keys, caller, base, int(number) + 1) or await keys.find(caller, KeyName(base))
        )
    before = await _numbered(keys, caller, base, await keys.predecessors(caller, key.name))
    # The key may have been rotated since it was read.
    return (None if before is None or before.identity.key_id == key.identity.key_id else before), None


async def _numbered(keys: Keys, caller: UserId, base: str, number: int) -> KeyRecord | None:
    return await keys.find(caller, KeyName(f"{base}{LINEAGE_SEPARATOR}{number}")) if number > 0 else None
