"""What depends on a key, kind by kind. After the switch a rotation takes all of it along.

    DEPENDENTS ──► grants:     the successor gets the live grants of its predecessor, which keeps its own
               ──► child keys: the successor becomes their parent
               ──► addresses:  they stay, and are marked. Nothing here derives the address of a key on a chain.

A kind that fails holds up no other. Its step is not recorded, so the next attempt takes it up again.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final, LiteralString
from uuid import UUID

from kms.domain.errors import KmsError, Reason
from kms.domain.ids import KeyId, UserId
from kms.domain.key_row import AUTHENTICATED, record_invalid
from kms.jobs.leases import LeaseLostError
from kms.jobs.leasing import Lease
from kms.rotation.rotation import adopted
from kms.store.pool import AS_JOB, Pool, as_user
from kms.store.proven_keys import ProvenKeys

COPY_GRANTS: Final = "SELECT cryptography.copy_grants(%(rotation)s, %(worker)s, %(claim)s) AS taken"
MARK_ADDRESSES: Final = "SELECT cryptography.mark_addresses(%(rotation)s, %(worker)s, %(claim)s) AS taken"
CHILDREN_MAX: Final = 100
CHILDREN: Final = """
    SELECT id FROM cryptography.keys
    WHERE user_id = %(owner)s AND parent_key_id = %(parent)s AND destroyed_at IS NULL
        AND (%(after)s::uuid IS NULL OR id > %(after)s)
    ORDER BY id
    LIMIT %(limit)s
"""
COUNT_CHILDREN: Final = """
    SELECT count(*) AS taken FROM cryptography.keys
    WHERE user_id = %(owner)s AND parent_key_id = %(parent)s AND destroyed_at IS NULL
"""
ADOPT: Final = """
    SELECT cryptography.adopt_child(%(rotation)s, %(worker)s, %(claim)s, %(child)s, %(version)s, %(mac)s) AS verdict
"""


@dataclass(frozen=True, slots=True)
class Handover:
    """What is taken along: from which key of whom to which, for the worker that holds the lease of the rotation."""

    lease: Lease
    owner_id: UserId
    old_key_id: KeyId
    new_key_id: KeyId


TakeAlong = Callable[[ProvenKeys, Handover], Awaitable[int]]


@dataclass(frozen=True, slots=True)
class Dependent:
    """One kind of what depends on a key.

    `take_along` takes all of the kind along and returns how many there are. It bears being done again.
    It raises LeaseLostError, STORE_UNAVAILABLE, HSM_UNAVAILABLE, RECORD_INVALID.
    """

    name: str
    take_along: TakeAlong


def by_statement(statement: LiteralString) -> TakeAlong:
    """Return what takes a kind along by one statement. Of it follows `taken`: how many there are, NULL for a lost lease."""

    async def take_along(keys: ProvenKeys, handover: Handover) -> int:
        taken = (await keys.pool.fetch(AS_JOB, statement, _claim(handover)))[0]["taken"]
        if taken is None:
            raise LeaseLostError
        return _count(taken)

    return take_along


async def adopt_children(keys: ProvenKeys, handover: Handover) -> int:
    """Make the successor the parent of all children of its predecessor. One whose record is invalid holds up no other."""
    after: UUID | None = None
    failure: KmsError | None = None
    while children := await _children(keys.pool, handover, after):
        for child in children:
            try:
                await _adopt(keys, handover, child)
            except LeaseLostError:
                raise
            except KmsError as error:
                failure = error
        after = children[-1]
    if failure is not None:
        raise failure
    parameters = {"owner": handover.owner_id, "parent": handover.new_key_id}
    return _count((await keys.pool.fetch(as_user(handover.owner_id), COUNT_CHILDREN, parameters))[0]["taken"])


async def _children(pool: Pool, handover: Handover, after: UUID | None) -> Sequence[KeyId]:
    parameters = {"owner": handover.owner_id, "parent": handover.old_key_id, "after": after, "limit": CHILDREN_MAX}
    return [KeyId(row["id"]) for row in await pool.fetch(as_user(handover.owner_id), CHILDREN, parameters)]


async def _adopt(keys: ProvenKeys, handover: Handover, child_id: KeyId) -> None:
    found = await keys.find(handover.owner_id, child_id)
    if found is None or found.row["parent_key_id"] != handover.old_key_id:
        raise record_invalid(child_id)
    child = found.row
    row = adopted({column: child[column] for column in AUTHENTICATED}, handover.new_key_id)
    parameters = {
        **_claim(handover),
        "child": child_id,
        "version": child["version"],
        "mac": await keys.records.mac_of_key(row),
    }
    verdict = (await keys.pool.fetch(AS_JOB, ADOPT, parameters))[0]["verdict"]
    if verdict == "LEASE_LOST":
        raise LeaseLostError
    if verdict != "OK":
        raise KmsError(Reason.STALE, "a child key was changed meanwhile")


def _claim(handover: Handover) -> dict[str, object]:
    claim = handover.lease.claim
    return {"rotation": claim.item_id, "worker": handover.lease.worker, "claim": claim.number}


def _count(taken: object) -> int:
    if not isinstance(taken, int) or isinstance(taken, bool) or taken < 0:
        raise record_invalid()
    return taken


DEPENDENTS: Final = (
    Dependent("grants", by_statement(COPY_GRANTS)),
    Dependent("child keys", adopt_children),
    Dependent("addresses", by_statement(MARK_ADDRESSES)),
)
"""Every kind. Whoever adds a table that refers to keys adds its kind here."""
