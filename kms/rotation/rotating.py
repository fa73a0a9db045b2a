"""Rotating a key.

    RotateKey ──► log row: pending ──► a worker claims it ──► make the successor in the token
                                                          ──► switch (one transaction): name, states, both MACs
                                                          ──► confirm a RESIDENT successor in the token
                                                          ──► take the dependents along ──► completed

A worker that dies leaves a row whose lease runs out. The next worker goes on behind the last finished step. A successor that was
made and not switched is dropped: only a RESIDENT one leaves an object in the token, with a mark that reconciliation removes.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from kms.app.keyring import require_key
from kms.app.ports import Call, Hsm, Keys
from kms.domain.errors import KmsError, Reason, about_key
from kms.domain.ids import KeyId, KeyRef, UserId
from kms.domain.keys import Custody, KeyIdentity
from kms.jobs.leasing import Lease
from kms.keys.ledger.repeats import RepeatableRequest, Repeats
from kms.rotation.ports import OldKey, Rotations, ServedKeys
from kms.rotation.rotation import Rotation, RotationRequest, check_rotatable, parse_reason

# Refusals that no later attempt changes.
FINAL_REASONS: Final = frozenset(
    {
        Reason.KEY_NOT_FOUND,
        Reason.KEY_PRE_ACTIVE,
        Reason.KEY_INACTIVE,
        Reason.KEY_COMPROMISED,
        Reason.KEY_REVOKED,
        Reason.KEY_PENDING_DESTRUCTION,
        Reason.KEY_DESTROYED,
        Reason.RECORD_INVALID,
        Reason.WRONG_PURPOSE,
        Reason.HSM_MECHANISM_UNSUPPORTED,
    }
)
_SWITCHES_MAX: Final = 5


@dataclass(frozen=True, slots=True)
class RotatingWorker:
    """Does rotations that are due."""

    rotations: Rotations
    hsm: Hsm
    served: ServedKeys

    async def rotate(self, lease: Lease) -> Mapping[str, object]:
        """Do the rotation of *lease* from behind its last finished step. Return its successor and the number of dependents.

        Raises why the key must not be rotated, HSM_UNAVAILABLE, STORE_UNAVAILABLE, LeaseLostError.
        """
        new_key = lease.claim.item["new_key_id"]
        key_id = KeyId(new_key) if isinstance(new_key, UUID) else await self._switch(lease)
        if key_id.hex in await self.hsm.residents():
            await self.hsm.confirm(key_id)
        return {"successor": key_id, "affected": await self.rotations.copy_grants(lease)}

    async def _switch(self, lease: Lease) -> KeyId:
        """Make the successor and switch to it. Return its id."""
        request = await self.rotations.proven_request(lease)
        for attempts_left in reversed(range(_SWITCHES_MAX)):
            old = await self.rotations.old_key(request)
            try:
                return await self._switched(lease, old)
            except KmsError as error:
                # The key was changed or used meanwhile.
                if error.reason is not Reason.STALE or not attempts_left:
                    raise
            finally:
                self.served.drop(old.identity.key_id)
        raise AssertionError("the last attempt returns or raises")

    async def _switched(self, lease: Lease, old: OldKey) -> KeyId:
        key_id = KeyId(UUID(bytes=await self.hsm.random(16), version=4))
        identity = KeyIdentity(key_id, old.identity.owner_id, old.identity.spec)
        # The same custody: no weaker, as the caller once asked, and no stronger, since places for RESIDENT keys are few.
        custody = Custody(str(old.row["custody"]))
        material = await self.hsm.generate(identity, custody)
        try:
            await self.rotations.switch(lease, old, key_id, material)
        except KmsError as error:
            if custody is Custody.RESIDENT and error.reason is not Reason.STORE_UNAVAILABLE:
                await self.hsm.abandon(key_id)
            raise
        return key_id


@dataclass(frozen=True, slots=True)
class Rotating:
    """RotateKey: asks for a rotation, and helps until its first attempt has ended."""

    keys: Keys
    hsm: Hsm
    rotations: Rotations
    repeats: Repeats
    do_due: Callable[[], Awaitable[object]]
    pause: Callable[[], Awaitable[object]]

    async def rotate(
        self, call: Call, ref: KeyRef, reason: str, repeatable: RepeatableRequest | None, *, allow_compromised: bool
    ) -> Rotation:
        """Rotate a key of the caller, and return the rotation when its first attempt has ended.

        If the key is being rotated already, return that rotation. Raises KEY_NOT_FOUND, why the key must not be rotated,
        MALFORMED for the reason, REQUEST_ID_REUSED.
        """
        parse_reason(reason)
        answers = None if repeatable is None else await self.repeats.answers(call, repeatable)
        stored = None if answers is None else await answers.find()
        if stored is not None:
            return await self._ended(call.user.user_id, UUID(bytes=stored.content))
        key = await require_key(self.keys, call.user.user_id, ref)
        with about_key(key.identity.key_id):
            check_rotatable(key, allow_compromised=allow_compromised)
            request = RotationRequest(
                rotation_id=UUID(bytes=await self.hsm.random(16), version=4),
                owner_id=call.user.user_id,
                key_id=key.identity.key_id,
                reason=reason,
                initiated_by=call.user.user_id,
                allows_compromised=allow_compromised,
                created_at=await self.rotations.now(),
            )
            repeat = None if answers is None else answers.storable(request.rotation_id.bytes)
            rotation_id = await self.rotations.request(call, request, repeat)
            return await self._ended(call.user.user_id, rotation_id)

    async def find(self, caller: UserId, rotation_id: UUID) -> Rotation:
        """Return a rotation of a key of *caller*, or raise ROTATION_NOT_FOUND."""
        found = await self.rotations.find(caller, rotation_id)
        if found is None:
            raise KmsError(Reason.ROTATION_NOT_FOUND, "there is no rotation of this id of a key of yours")
        return found

    async def _ended(self, caller: UserId, rotation_id: UUID) -> Rotation:
        """Do what is due until an attempt at the rotation has ended."""
        while True:
            rotation = await self.find(caller, rotation_id)
            if rotation.was_tried:
                return rotation
            await self.do_due()
            await self.pause()
