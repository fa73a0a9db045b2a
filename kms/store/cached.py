"""The ports `Keys` and `Users` with a memory of a second, and what makes it forget.

What is remembered saves reads and decides nothing: the charge looks at the database again. An envelope in memory is as the
database has it, ciphertext.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Final
from uuid import UUID

from kms.app.ports import (
    Call,
    DestroyedKey,
    Entry,
    KeyPage,
    Keys,
    Ledger,
    Lifecycle,
    NewKey,
    Repeat,
    Stranger,
    User,
    Users,
)
from kms.domain.errors import KmsError, Reason
from kms.domain.ids import KeyId, KeyName, KeyRef, UserId
from kms.domain.keys import KeyFilter, KeyRecord, UsableKey
from kms.domain.lifecycle import Change, Move
from kms.keys.ledger.counts import Counts
from kms.keys.ledger.settling import RETRYABLE_REFUSALS
from kms.store.cache import Cache, CacheStatus
from kms.store.misses import Misses

_KEY_BYTES: Final = 2048  # of objects, beside the texts in them
_USER_BYTES: Final = 1024


def _key_cache() -> Cache[tuple[UserId, KeyRef], UsableKey]:
    return Cache(lambda key: key.record.identity.key_id, _key_size)


def _user_cache() -> Cache[UserId, User]:
    return Cache(lambda user: user.user_id, lambda _: _USER_BYTES)


@dataclass(frozen=True, slots=True)
class CachedKeys:
    """`Keys` that remembers what was fetched to be used.

    It looks for keys to be used only so often where there are none, and raises RATE_LIMITED beyond that.
    """

    stored: Keys
    cache: Cache[tuple[UserId, KeyRef], UsableKey] = field(default_factory=_key_cache, repr=False)
    misses: Misses = field(default_factory=Misses, repr=False)
    counts: Counts = field(default_factory=Counts, repr=False)

    async def insert(self, caller: UserId, key: NewKey, *, call: Call | None = None, repeat: Repeat | None = None) -> KeyRecord:
        """Store a key: see `Keys.insert`."""
        record = await self.stored.insert(caller, key, call=call, repeat=repeat)
        self.misses.see(record)
        return record

    async def find(self, caller: UserId, ref: KeyRef, *, recent: bool = False) -> KeyRecord | None:
        """Return the key as it is, or where *recent* will do as it was at most a second ago; or None."""
        key = await self.find_usable(caller, ref, recent=True) if recent else None
        if key is not None:
            return key.record
        record = await self.stored.find(caller, ref)
        if record is not None:
            self.misses.see(record)
        return record

    async def find_usable(self, caller: UserId, ref: KeyRef, *, recent: bool = False) -> UsableKey | None:
        """Return the key with its envelope as it is, or where *recent* will do as it was at most a second ago; or None."""
        return await self.cache.find((caller, ref), lambda: self._sought(caller, ref), recent=recent)

    async def predecessors(self, caller: UserId, name: KeyName) -> int:
        """See `Keys.predecessors`."""
        return await self.stored.predecessors(caller, name)

    async def page(self, caller: UserId, which: KeyFilter, *, after: str, limit: int) -> KeyPage:
        """Return keys in the order of their names: see `Keys.page`."""
        return await self.stored.page(caller, which, after=after, limit=limit)

    def drop(self, key_id: UUID | None) -> None:
        """Forget a key under its id and its names, or all keys."""
        self.cache.drop(key_id)

    def status(self) -> CacheStatus:
        """Return what the cache has done so far."""
        return self.cache.status()

    async def _sought(self, caller: UserId, ref: KeyRef) -> UsableKey | None:
        self.misses.pay(caller, ref)
        with self.counts.reading() as meanwhile:
            try:
                key = await self.stored.find_usable(caller, ref)
            except KmsError:
                self.misses.give_back(caller, ref)
                raise
        if key is not None:
            self.misses.give_back(caller, ref)
            self.misses.see(key.record)
            self.counts.check(key.record, meanwhile)
        return key


@dataclass(frozen=True, slots=True)
class CachedUsers:
    """`Users` that remembers those in good standing."""

    stored: Users
    cache: Cache[UserId, User] = field(default_factory=_user_cache, repr=False)

    async def find(self, user_id: UserId, *, recent: bool = False) -> User | None:
        """Return the user in good standing, as he is or where *recent* will do as he was at most a second ago; or None."""
        return await self.cache.find(user_id, lambda: self.stored.find(user_id), recent=recent)

    def drop(self, user_id: UUID | None) -> None:
        """Forget a user, or all."""
        self.cache.drop(user_id)

    def status(self) -> CacheStatus:
        """Return what the cache has done so far."""
        return self.cache.status()


@dataclass(frozen=True, slots=True)
class ForgettingLedger:
    """`Ledger` that makes what it refuses be read again: the next draft is of what the database has then."""

    ledger: Ledger
    keys: CachedKeys
    users: CachedUsers

    async def settle(self, entry: Entry) -> None:
        """Charge and record a use: see `Ledger.settle`."""
        counts, answer_id = self.keys.counts, None if entry.repeat is None else entry.repeat.answer_id
        bounds = counts.of(entry.key_id) if entry.is_charged else None
        limit = None if bounds is None else bounds.limit
        if bounds is not None and answer_id is not None:
            counts.offered(bounds, answer_id)
        try:
            await self.ledger.settle(entry)
        except KmsError as error:
            if error.reason in RETRYABLE_REFUSALS:  # any other refusal says nothing about the cached key
                self.keys.drop(entry.key_id)
            if error.reason is Reason.CREDENTIALS_INVALID:
                self.users.drop(entry.call.user.user_id)
            raise
        if bounds is not None:
            counts.settled(bounds, limit, answer_id)

    async def earlier(self, user_id: UserId, rpc: str, request_id: str) -> Repeat | None:
        """Return what was kept under this id less than 24 hours ago, or None."""
        return await self.ledger.earlier(user_id, rpc, request_id)

    def note_refusal(self, call: Call | Stranger, action: str, key: KeyId | None, reason: str) -> None:
        """Record a refusal, without waiting for it."""
        self.ledger.note_refusal(call, action, key, reason)


@dataclass(frozen=True, slots=True)
class ForgettingLifecycle:
    """`Lifecycle` that forgets a key which it has moved, or has tried to."""

    lifecycle: Lifecycle
    keys: CachedKeys

    async def move(self, call: Call, key_id: KeyId, move: Move, change: Change, *, version: int | None) -> KeyRecord:
        """Make the move: see `Lifecycle.move`."""
        try:
            return await self.lifecycle.move(call, key_id, move, change, version=version)
        finally:
            self.keys.drop(key_id)

    async def destroy_due(self) -> Sequence[DestroyedKey]:
        """Destroy keys whose time has come: see `Lifecycle.destroy_due`."""
        destroyed = await self.lifecycle.destroy_due()
        for key in destroyed:
            self.keys.drop(key.key_id)
        return destroyed

    async def removable_objects(self, hsm_key_ids: Collection[str]) -> Collection[str]:
        """Return which objects may be removed from the token: see `Lifecycle.removable_objects`."""
        return await self.lifecycle.removable_objects(hsm_key_ids)


def _key_size(key: UsableKey) -> int:
    record = key.record
    texts = (key.held.material.envelope, record.public_key, record.name, *record.metadata.keys(), *record.metadata.values())
    return _KEY_BYTES + sum(map(len, texts))
