"""Policies of rotation: setting them, and asking for the rotations that have become due by them.

    SetRotationPolicy ──► policy with the service's MAC
    each round ──► what is to be looked at ──► proven policy, proven key ──► due? ──► a request with the service's MAC

The job of rotations does what is asked for. Two workers that find the same key due make one rotation: the database has one
unfinished rotation for each key.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Final
from uuid import UUID

import structlog

from kms.app.keyring import require_key
from kms.app.ports import Call, Hsm, Keys
from kms.domain.errors import INTERNAL, KmsError, Reason, about_key
from kms.domain.ids import KeyRef
from kms.domain.keys import KeyRecord
from kms.jobs.leases import LeasePolicy
from kms.rotation.policy import COMPROMISED, Due, RotationPolicy, Triggers, check_triggers, is_due, next_rotation
from kms.rotation.ports import Policies, Rotations, StoredPolicy
from kms.rotation.rotation import RotationRequest

# A key whose rotation fails is asked for again after 5 minutes, and after twice as long each time.
WAITS: Final = LeasePolicy(backoff_seconds_min=300.0, backoff_seconds_max=86_400.0)
_LOG = structlog.get_logger("kms")


@dataclass(frozen=True, slots=True)
class Schedule:
    """The policy of a key, and its next rotation as things stand. None: there is none."""

    policy: RotationPolicy | None = None
    due: Due | None = None


@dataclass(frozen=True, slots=True)
class Scheduling:
    """SetRotationPolicy, and what GetKey shows of a policy."""

    keys: Keys
    policies: Policies
    rotations: Rotations

    async def set(self, call: Call, ref: KeyRef, triggers: Triggers | None, *, is_paused: bool, version: int | None) -> Schedule:
        """Set the policy of a key of the caller, or clear it where *triggers* are None. Return what holds then.

        Raises KEY_NOT_FOUND; MALFORMED with the field of a policy that makes no sense; why the key is never rotated; STALE if the
        policy is not at *version* (None: any).
        """
        key = await require_key(self.keys, call.user.user_id, ref)
        with about_key(key.identity.key_id):
            if triggers is None:
                await self.policies.clear(call, key.name)
                return Schedule()
            check_triggers(triggers, key)
            # What is stored may be anything. Its version only orders the changes.
            stored = await self.policies.version(key.identity.owner_id, key.name)
            if version is not None and version != stored:
                raise _stale()
            policy = RotationPolicy(key.identity.owner_id, key.name, triggers, is_paused, (stored or 0) + 1)
            due = next_rotation(policy, key, await self.rotations.now())
            if not await self.policies.set(call, policy, None if due is None else due.at):
                raise _stale()
            return Schedule(policy, due)

    async def of(self, key: KeyRecord) -> Schedule:
        """Return the policy of a proven key. Raises RECORD_INVALID for a stored one that the service did not make."""
        if key.superseded_at is not None:
            return Schedule()
        with about_key(key.identity.key_id):
            policy = await self.policies.find(key.identity.owner_id, key.name)
        return Schedule() if policy is None else Schedule(policy, next_rotation(policy, key, await self.rotations.now()))


@dataclass(frozen=True, slots=True)
class PolicyRounds:
    """The job: asks for the rotations that have become due."""

    policies: Policies
    rotations: Rotations
    hsm: Hsm

    async def ask_for_due(self) -> int:
        """Ask for every rotation that is due, and return for how many. What became due while nothing ran is made up once.

        A policy or a key that is not proven, or that meets a bug, is logged, and looked at less and less often.
        It holds up no other.
        Raises STORE_UNAVAILABLE, HSM_UNAVAILABLE.
        """
        asked = 0
        async for stored in self.policies.to_look_at():
            try:
                asked += await self._look(stored)
            except Exception as error:  # a bug in one policy must not end the round for the others
                reason = error.reason if isinstance(error, KmsError) else INTERNAL
                if reason not in (Reason.RECORD_INVALID, INTERNAL):
                    raise
                owner, name, is_bug = str(stored.owner_id), str(stored.name), reason == INTERNAL
                _LOG.warning("policy not followed", owner=owner, name=name, reason=reason, exc_info=is_bug)
                wait = timedelta(seconds=WAITS.backoff_seconds(stored.requests + 1))
                await self.policies.look_later(stored, await self.rotations.now() + wait, is_failure=True)
        return asked

    async def _look(self, stored: StoredPolicy) -> bool:
        """Ask for a rotation if one is due, and return whether it was asked for."""
        policy = await self.policies.proven(stored)
        found = await self.policies.key(policy)
        if found is None:
            await self.policies.look_later(stored, None)
            return False
        key, now = found
        due = next_rotation(policy, key, now)
        if due is None or not is_due(due, key, now):
            await self.policies.look_later(stored, None if due is None else max(due.at, now + timedelta(seconds=1)))
            return False
        request = RotationRequest(
            rotation_id=UUID(bytes=await self.hsm.random(16), version=4),
            owner_id=policy.owner_id,
            key_id=key.identity.key_id,
            reason=due.reason,
            initiated_by=None,
            allows_compromised=due.reason == COMPROMISED,
            created_at=now,
        )
        is_asked = await self.policies.request(request, stored, WAITS.backoff_seconds(stored.requests + 1))
        if is_asked:
            _LOG.info("rotation due", key=str(request.key_id), rotation=str(request.rotation_id), why=due.reason)
        return is_asked


def _stale() -> KmsError:
    return KmsError(Reason.STALE, "the policy is another than you have seen: look at it again")
