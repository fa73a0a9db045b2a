"""Rotating a key.

    RotateKey ──► log row: pending ──► a worker claims it ──► make the successor in the token
                                                          ──► switch (one transaction): name, states, both MACs
                                                          ──► confirm a RESIDENT successor in the token
                                                          ──► take the dependents along ──► completed

When a worker dies, its lease on the row runs out. The next worker continues after the last finished step. It makes another
successor if the switch did not happen. Of the first only a RESIDENT one is left in the token, and reconciliation removes it.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from kms.app.keyring import require_key
from kms.app.ports import Call, Hsm, Keys, Repeat
from kms.domain.errors import KmsError, Reason, about_key
from kms.domain.ids import KeyId, KeyRef, UserId
from kms.domain.key_row import record_invalid
from kms.domain.keys import Custody, KeyIdentity
from kms.jobs.leases import LeaseLostError
from kms.jobs.leasing import Lease
from kms.keys.ledger.repeats import Answers, RepeatableRequest, Repeats, StoredAnswer
from kms.rotation.ports import OldKey, Rotations, ServedKeys
from kms.rotation.rotation import Rotation, RotationRequest, RotationStatus, check_rotatable, parse_reason

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
        Reason.DEADLINE_EXCEEDED,
    }
)
_SWITCHES_MAX: Final = 3
_AFTER_A_TWIN: Final = frozenset({Reason.REQUEST_ID_REUSED, Reason.KEY_INACTIVE})


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
        request = await self.rotations.proven_request(lease)
        new_key = lease.claim.item["new_key_id"]
        key_id = KeyId(new_key) if isinstance(new_key, UUID) else await self._switch(lease, request)
        # Neither the row of the log nor the verdict of the switch is believed: the records of both keys prove it.
        key = await self.rotations.proven_successor(request.owner_id, request.key_id, key_id)
        if key.custody is Custody.RESIDENT:
            await self.hsm.confirm(key_id)
        return {"successor": key_id, "affected": await self.rotations.copy_grants(lease)}

    async def _switch(self, lease: Lease, request: RotationRequest) -> KeyId:
        """Make the successor and switch to it. Return its id."""
        for attempts_left in reversed(range(_SWITCHES_MAX)):
            old = await self.rotations.old_key(request)
            try:
                return await self._switched(lease, old)
            except LeaseLostError:
                raise
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
            if custody is Custody.RESIDENT and await self._is_made_in_vain(identity, error):
                await self.hsm.abandon(key_id)
            raise
        return key_id

    async def _is_made_in_vain(self, identity: KeyIdentity, error: KmsError) -> bool:
        """Whether no row has the key. Where that is not known its mark stays, and reconciliation decides later."""
        if error.reason is Reason.STORE_UNAVAILABLE:
            return False
        return not await self.rotations.has_key(identity.owner_id, identity.key_id)


@dataclass(frozen=True, slots=True)
class Rotating:
    """RotateKey: asks for a rotation, and helps until its first attempt has ended."""

    keys: Keys
    hsm: Hsm
    rotations: Rotations
    repeats: Repeats
    do: Callable[[UUID], Awaitable[object]]
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
            return await self._ended(call.user.user_id, *_ids(stored))
        try:
            rotation_id, key_id = await self._request(call, ref, reason, answers, allow_compromised=allow_compromised)
        except KmsError as refusal:
            # A twin of this request may have been faster, and have rotated the key.
            stored = await answers.find() if answers is not None and refusal.reason in _AFTER_A_TWIN else None
            if stored is None:
                raise
            rotation_id, key_id = _ids(stored)
        return await self._ended(call.user.user_id, rotation_id, key_id)

    async def _request(
        self, call: Call, ref: KeyRef, reason: str, answers: Answers | None, *, allow_compromised: bool
    ) -> tuple[UUID, KeyId]:
        """Write the request into the log, and return the id of its rotation and that of the key."""
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

            def repeat_of(rotation_id: UUID) -> Repeat:
                assert answers is not None  # noqa: S101  # used with answers alone
                return answers.storable(rotation_id.bytes + request.key_id.bytes)

            return await self.rotations.request(call, request, None if answers is None else repeat_of), request.key_id

    async def find(self, caller: UserId, rotation_id: UUID) -> Rotation:
        """Return a rotation of a key of *caller*, or raise ROTATION_NOT_FOUND."""
        found = await self.rotations.find(caller, rotation_id)
        if found is None:
            raise KmsError(Reason.ROTATION_NOT_FOUND, "there is no rotation of this id of a key of yours")
        return found

    async def _ended(self, caller: UserId, rotation_id: UUID, key_id: KeyId) -> Rotation:
        """Do the rotation of the key, or wait for the worker that does, until an attempt has ended.

        Raises RECORD_INVALID if the log says that the rotation is completed, and the records of the keys do not prove it.
        """
        while True:
            rotation = await self.find(caller, rotation_id)
            if rotation.was_tried:
                break
            await self.do(rotation_id)
            await self.pause()
        if rotation.status is RotationStatus.COMPLETED:
            if rotation.old_key_id != key_id or rotation.new_key_id is None:
                raise record_invalid(key_id)
            await self.rotations.proven_successor(caller, key_id, rotation.new_key_id)
        return rotation


def _ids(stored: StoredAnswer) -> tuple[UUID, KeyId]:
    """Return the ids of the rotation and of the key in the stored answer of a RotateKey."""
    return UUID(bytes=stored.content[:16]), KeyId(UUID(bytes=stored.content[16:]))
