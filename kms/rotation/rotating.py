"""Rotating a key.

    RotateKey ──► log row: pending ──► a worker claims it ──► make the successor in the token
                                                          ──► switch (one transaction): name, states, both MACs
                                                          ──► confirm a RESIDENT successor in the token
                                                          ──► take the dependents along, kind by kind ──► completed

When a worker dies, its lease on the row runs out. The next worker continues after the last finished step. It makes another
successor if the switch did not happen. Of the first only a RESIDENT one is left in the token, and reconciliation removes it.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Final
from uuid import UUID

import structlog

from kms.app.keyring import require_key
from kms.app.ports import Call, Hsm, Keys, Repeat, User
from kms.domain.errors import KmsError, Reason, about_key
from kms.domain.ids import KeyId, KeyName, KeyRef
from kms.domain.key_row import record_invalid
from kms.domain.keys import Custody, KeyIdentity, KeyRecord
from kms.jobs.leases import LeaseLostError
from kms.jobs.leasing import Lease
from kms.keys.ledger.repeats import Answers, RepeatableRequest, Repeats, StoredAnswer
from kms.rotation.policy import is_due, next_rotation
from kms.rotation.ports import OldKey, Policies, Rotations, ServedKeys
from kms.rotation.rotation import (
    Rotation,
    RotationRequest,
    RotationStatus,
    check_rotatable,
    check_still_wanted,
    not_taken_along,
    parse_reason,
    rotates_any,
    rotation_not_found,
)

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
        Reason.USAGE_LIMIT_REACHED,
        Reason.RECORD_INVALID,
        Reason.WRONG_PURPOSE,
        Reason.HSM_MECHANISM_UNSUPPORTED,
        Reason.DEADLINE_EXCEEDED,
        Reason.PERMISSION_DENIED,
    }
)
TAKEN_ALONG: Final = "dependents"
_SWITCHES_MAX: Final = 3
_LOG = structlog.get_logger("kms")
_AFTER_A_TWIN: Final = frozenset({Reason.REQUEST_ID_REUSED, Reason.KEY_INACTIVE})


@dataclass(frozen=True, slots=True)
class RotatingWorker:
    """Does rotations that are due."""

    rotations: Rotations
    policies: Policies
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
        return {"successor": key_id, "affected": await self._take_along(lease, request, key_id)}

    async def _take_along(self, lease: Lease, request: RotationRequest, key_id: KeyId) -> int:
        """Take the dependents along, kind by kind, and return how many there are. A kind that fails holds up no other."""
        taken = {kind: count for kind, count in lease.claim.step_state.items() if isinstance(count, int) and count >= 0}
        failures = dict[str, Exception]()
        for kind in self.rotations.kinds:
            if kind in taken:
                continue
            try:
                taken[kind] = await self.rotations.take_along(kind, lease, request, key_id)
            except LeaseLostError:
                raise
            except Exception as error:  # noqa: BLE001  # a bug in one kind must not keep the others back
                _LOG.warning("not taken along", rotation=str(lease.claim.item_id), kind=kind, exc_info=_is_bug(error))
                failures[kind] = error
            else:
                await lease.finish_step(TAKEN_ALONG, taken)
        if failures:
            raise not_taken_along(failures)
        return sum(taken[kind] for kind in self.rotations.kinds)

    async def _switch(self, lease: Lease, request: RotationRequest) -> KeyId:
        """Make the successor and switch to it. Return its id."""
        for attempts_left in reversed(range(_SWITCHES_MAX)):
            old = await self.rotations.old_key(request)
            is_by_policy = request.initiated_by is None
            version = await self._due_under(request, KeyName(str(old.row["key_name"]))) if is_by_policy else None
            try:
                return await self._switched(lease, old, version)
            except LeaseLostError:
                raise
            except KmsError as error:
                # The key was changed or used meanwhile, or the policy changed.
                if error.reason is not Reason.STALE or not attempts_left:
                    raise
            finally:
                self.served.drop(old.identity.key_id)
        raise AssertionError("the last attempt returns or raises")

    async def _due_under(self, request: RotationRequest, name: KeyName) -> int:
        """Return the version of the policy that has the key rotated.

        Raises PERMISSION_DENIED if the policy that asked does not have the key rotated any more: it may have been paused since.
        """
        policy = await self.policies.find(request.owner_id, name)
        found = None if policy is None else await self.policies.key(policy)
        if policy is None or found is None or not is_due(next_rotation(policy, *found), *found):
            raise KmsError(Reason.PERMISSION_DENIED, "the policy that asked does not have the key rotated any more")
        return policy.version

    async def _switched(self, lease: Lease, old: OldKey, policy_version: int | None) -> KeyId:
        key_id = KeyId(UUID(bytes=await self.hsm.random(16), version=4))
        identity = KeyIdentity(key_id, old.identity.owner_id, old.identity.spec)
        # The same custody: no weaker, as the caller once asked, and no stronger, since places for RESIDENT keys are few.
        custody = Custody(str(old.row["custody"]))
        material = await self.hsm.generate(identity, custody)
        try:
            await self.rotations.switch(lease, old, key_id, material, policy_version)
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
    """RotateKey and RetryRotation: ask for a rotation, and help until an attempt has ended. WatchRotation.

    `pause` waits for a moment where a caller waits for an attempt, `rest` where a stream waits for a change.
    """

    keys: Keys
    hsm: Hsm
    rotations: Rotations
    repeats: Repeats
    do: Callable[[UUID], Awaitable[object]]
    pause: Callable[[], Awaitable[object]]
    rest: Callable[[], Awaitable[object]]

    async def rotate(
        self, call: Call, ref: KeyRef, reason: str, repeatable: RepeatableRequest | None, *, allow_compromised: bool
    ) -> Rotation:
        """Rotate a key of the caller, or for a rotator of any user, and return the rotation when its first attempt has ended.

        If the key is being rotated already, return that rotation. Raises KEY_NOT_FOUND, why the key must not be rotated,
        MALFORMED for the reason, REQUEST_ID_REUSED.
        """
        parse_reason(reason)
        answers = None if repeatable is None else await self.repeats.answers(call, repeatable)
        stored = None if answers is None else await answers.find()
        if stored is not None:
            return await self._ended(call.user, *_ids(stored))
        try:
            rotation_id, key_id = await self._request(call, ref, reason, answers, allow_compromised=allow_compromised)
        except KmsError as refusal:
            # A twin of this request may have been faster, and have rotated the key.
            stored = await answers.find() if answers is not None and refusal.reason in _AFTER_A_TWIN else None
            if stored is None:
                raise
            rotation_id, key_id = _ids(stored)
        return await self._ended(call.user, rotation_id, key_id)

    async def retry(self, call: Call, rotation_id: UUID) -> Rotation:
        """Make a rotation that failed, or that waits for its next attempt, due again. Return it when an attempt has ended.

        A rotation that is completed is returned as it is. Raises ROTATION_NOT_FOUND; STALE if another rotation of the key is
        under way; for a key that has no successor yet, why it must not be rotated, and DEADLINE_EXCEEDED a day after the request.
        """
        rotation = await self.find(call.user, rotation_id)
        with about_key(rotation.old_key_id):
            if rotation.status is not RotationStatus.COMPLETED and rotation.new_key_id is None:
                key = await require_key(self.keys, rotation.owner_id, rotation.old_key_id)
                check_rotatable(key, allow_compromised=rotation.allows_compromised, by=rotation.initiated_by)
                check_still_wanted(key, rotation.created_at, await self.rotations.now())
            if rotation.was_tried and rotation.status is not RotationStatus.COMPLETED:
                is_due = await self.rotations.retry(call, rotation_id)
                rotation = await self.find(call.user, rotation_id)
                if not is_due and rotation.status is RotationStatus.FAILED:
                    raise KmsError(Reason.STALE, "another rotation of the key is under way")
            return await self._ended(call.user, rotation_id, rotation.old_key_id)

    async def _request(
        self, call: Call, ref: KeyRef, reason: str, answers: Answers | None, *, allow_compromised: bool
    ) -> tuple[UUID, KeyId]:
        """Write the request into the log, and return the id of its rotation and that of the key."""
        key = await self.key(call.user, ref)
        with about_key(key.identity.key_id):
            check_rotatable(key, allow_compromised=allow_compromised, by=call.user.user_id)
            request = RotationRequest(
                rotation_id=UUID(bytes=await self.hsm.random(16), version=4),
                owner_id=key.identity.owner_id,
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

    async def key(self, caller: User, ref: KeyRef) -> KeyRecord:
        """Return a key that *caller* may rotate, proven, or raise KEY_NOT_FOUND. A rotator names the key of another by its id."""
        owner = caller.user_id
        if rotates_any(caller) and isinstance(ref, UUID):
            owner = await self.rotations.owner_of(caller, ref) or owner
        return await require_key(self.keys, owner, ref)

    async def find(self, caller: User, rotation_id: UUID) -> Rotation:
        """Return a rotation of a key that *caller* may rotate, or raise ROTATION_NOT_FOUND."""
        found = await self.rotations.find(caller, rotation_id)
        if found is None:
            raise rotation_not_found()
        return found

    async def watch(self, caller: User, rotation_id: UUID) -> AsyncIterator[Rotation]:
        """Yield a rotation at once, and again with each change, until it is over. Raises ROTATION_NOT_FOUND."""
        shown: Rotation | None = None
        while shown is None or not shown.is_over:
            rotation = await self.find(caller, rotation_id)
            if rotation != shown:
                yield rotation
                shown = rotation
            else:
                await self.rest()

    async def _ended(self, caller: User, rotation_id: UUID, key_id: KeyId) -> Rotation:
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
            await self.rotations.proven_successor(rotation.owner_id, key_id, rotation.new_key_id)
        return rotation


def _is_bug(error: Exception) -> bool:
    return not isinstance(error, KmsError)


def _ids(stored: StoredAnswer) -> tuple[UUID, KeyId]:
    """Return the ids of the rotation and of the key in the stored answer of a RotateKey."""
    return UUID(bytes=stored.content[:16]), KeyId(UUID(bytes=stored.content[16:]))
