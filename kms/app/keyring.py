"""Making keys and looking at them."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Final
from uuid import UUID

from kms.app.ports import Call, Hsm, Keys, NewKey, Repeat, Uninterrupted
from kms.domain.algorithms import KeySpec
from kms.domain.errors import KmsError, Reason, about_key, malformed
from kms.domain.fields import check_metadata
from kms.domain.ids import KeyId, KeyName, KeyRef, UserId
from kms.domain.keys import Custody, KeyIdentity, KeyRecord, UsableKey
from kms.domain.lifecycle import State, Use, check_use, is_open_to, use_among

_UNDECIDED: Final = frozenset({Reason.STORE_UNAVAILABLE, Reason.OUTCOME_UNKNOWN})


@dataclass(frozen=True, slots=True)
class KeyWish:
    """What a caller asks of a new key. None: no minimum, no limit, active at once, without end.

    `bound_to` names what the service itself needs the key for; no caller can use such a key.
    """

    name: KeyName
    spec: KeySpec
    custody_min: Custody | None
    metadata: Mapping[str, str]
    max_usage_count: int | None = None
    activated_at: datetime | None = None
    expires_at: datetime | None = None
    bound_to: str = ""


@dataclass(frozen=True, slots=True)
class Keyring:
    """The keys of a caller."""

    keys: Keys
    hsm: Hsm
    uninterrupted: Uninterrupted

    async def create(self, call: Call, wish: KeyWish, keep: Callable[[KeyId], Repeat] | None = None) -> KeyRecord:
        """Make a key in the token and store it, or raise NAME_TAKEN, CUSTODY_UNAVAILABLE, MALFORMED or HSM_UNAVAILABLE.

        What *keep* makes of its id is stored with it, for a repeat of the request. OUTCOME_UNKNOWN: a RESIDENT key is stored,
        and the token did not answer afterwards.
        """
        caller, name, spec = call.user.user_id, wish.name, wish.spec
        check_metadata(wish.metadata)
        if wish.expires_at is not None and wish.activated_at is not None and wish.expires_at <= wish.activated_at:
            raise malformed("expires_at", "expected a moment behind activated_at")
        custody = self.hsm.custody_for(spec, wish.custody_min)
        if await self.keys.find(caller, name) is not None:
            raise KmsError(Reason.NAME_TAKEN, "you have a key of that name", field="name")
        identity = KeyIdentity(KeyId(UUID(bytes=await self.hsm.random(16), version=4)), caller, spec, wish.bound_to)
        repeat = None if keep is None else keep(identity.key_id)
        material = await self.hsm.generate(identity, custody)
        new = NewKey(identity, name, material, dict(wish.metadata), wish.max_usage_count, wish.activated_at, wish.expires_at)
        if custody is Custody.RESIDENT:
            return await self.uninterrupted(self._store_resident(call, new, repeat))
        return await self.keys.insert(caller, new, call=call, repeat=repeat)

    async def _store_resident(self, call: Call, new: NewKey, repeat: Repeat | None) -> KeyRecord:
        """Store a key whose object is in the token, and then remove its mark; or remove both.

        A token object without a row is a nuisance. A row without its token object is a lost key. So where it is not known
        whether the row is stored, both stay, and reconciliation decides later.
        """
        key_id = new.identity.key_id
        try:
            record = await self.keys.insert(call.user.user_id, new, call=call, repeat=repeat)
        except KmsError as error:
            if error.reason not in _UNDECIDED:
                with suppress(KmsError):  # the mark stays where the token fails
                    await self.hsm.abandon(key_id)
            raise
        try:
            await self.hsm.confirm(key_id)
        except KmsError as error:
            # A key whose creation was answered has no mark: else whoever deletes its row would have its object removed.
            message = f"the key is stored, but the HSM failed afterwards ({error.message}): look for the key by its name"
            raise KmsError(Reason.OUTCOME_UNKNOWN, message) from None
        return record


async def require_key(keys: Keys, caller: UserId, ref: KeyRef, *, recent: bool = False) -> KeyRecord:
    """Return the caller's key, or raise KEY_NOT_FOUND."""
    record = await keys.find(caller, ref, recent=recent)
    if record is None:
        raise key_not_found()
    return record


async def require_usable_key(keys: Keys, caller: UserId, ref: KeyRef, *uses: Use, fresh: bool, bound_to: str = "") -> UsableKey:
    """Return the caller's key if its state permits one of *uses*. It must be bound to *bound_to*: of a caller, to nothing.

    A key may be as it was a second ago, unless it is to be *fresh*. No key is refused for a state that it had a moment ago.
    Raises KEY_NOT_FOUND, the reason of the state that forbids each of *uses*, USAGE_LIMIT_REACHED, WRONG_PURPOSE.
    """
    key = await keys.find_usable(caller, ref, recent=not fresh)
    if key is not None and not any(is_open_to(key.record.state, use) for use in uses):
        key = await keys.find_usable(caller, ref)
    if key is None:
        # A destroyed key has no envelope left, but its owner learns what became of it.
        record = await require_key(keys, caller, ref)
        with about_key(record.identity.key_id):
            check_use(record.state, uses[0])
        raise key_not_found()
    use = use_among(key.record.state, *uses)
    with about_key(key.record.identity.key_id):
        _check_limit(key.record, use)
        check_use(key.record.state, use)
        if (found := key.record.identity.bound_to) != bound_to:
            message = "this key belongs to the service itself" if found else "this key does not belong to the service itself"
            raise KmsError(Reason.WRONG_PURPOSE, message, bound_to=found)
    return key


def _check_limit(key: KeyRecord, use: Use) -> None:
    # A key that has reached its limit is stored as inactive: the caller is told what made it so.
    is_spent = key.usage_limit is not None and key.usage_counter >= key.usage_limit
    if use is Use.PROTECT and key.state is State.INACTIVE and is_spent:
        raise KmsError(Reason.USAGE_LIMIT_REACHED, f"this key's {key.usage_limit} uses have been made")


def key_not_found() -> KmsError:
    """Return the one answer for a key that does not exist and for one of somebody else."""
    return KmsError(Reason.KEY_NOT_FOUND, "you have no such key")
