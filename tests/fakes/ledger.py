"""A `Ledger`, `Keys` and `Users` in memory, for unit tests of what uses them. A test scripts what the ledger answers."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from kms.app.keyring import key_not_found
from kms.app.ports import Call, Entry, KeyPage, NewKey, Repeat, Stranger, User
from kms.domain.errors import KmsError
from kms.domain.ids import KeyId, KeyName, KeyRef, UserId
from kms.domain.keys import KeyFilter, KeyRecord, UsableKey

Answer = KmsError | Callable[[], None] | None


@dataclass
class FakeLedger:
    """Settles each use, unless `answers` holds another answer for it: an error to raise, or something to do first."""

    answers: list[Answer] = field(default_factory=list)
    settled: list[Entry] = field(default_factory=list)
    attempts: list[Entry] = field(default_factory=list)
    stored: dict[tuple[UserId, str, str], Repeat] = field(default_factory=dict)
    refusals: list[tuple[str, KeyId | None, str]] = field(default_factory=list)
    charge: Callable[[Entry], None] = lambda entry: None

    async def settle(self, entry: Entry) -> None:
        self.attempts.append(entry)
        answer = self.answers.pop(0) if self.answers else None
        if isinstance(answer, KmsError):
            raise answer
        if answer is not None:
            answer()
        self.settled.append(entry)
        self.charge(entry)
        if entry.repeat is not None:
            self.stored[entry.call.user.user_id, entry.repeat.rpc, entry.repeat.request_id] = replace(entry.repeat, answer_id=b"")

    async def earlier(self, user_id: UserId, rpc: str, request_id: str) -> Repeat | None:
        return self.stored.get((user_id, rpc, request_id))

    def note_refusal(self, call: Call | Stranger, action: str, key: KeyId | None, reason: str) -> None:
        self.refusals.append((action, key, reason))


@dataclass
class FakeKeys:
    """Keys by id and by name. `reads` notes whether each read of a usable key could be recent."""

    keys: dict[KeyRef, UsableKey] = field(default_factory=dict)
    reads: list[bool] = field(default_factory=list)

    def put(self, key: UsableKey) -> None:
        self.keys[key.record.identity.key_id] = self.keys[key.record.name] = key

    def change(self, ref: KeyRef, **fields: object) -> None:
        key = self.keys[ref]
        self.put(replace(key, record=replace(key.record, **fields)))  # type: ignore[arg-type]

    async def insert(self, caller: UserId, key: NewKey, *, call: Call | None = None, repeat: Repeat | None = None) -> KeyRecord:
        raise AssertionError("no test of a use stores a key")

    async def find(self, caller: UserId, ref: KeyRef, *, recent: bool = False) -> KeyRecord | None:
        key = self.keys.get(ref)
        return key.record if key is not None and key.record.identity.owner_id == caller else None

    async def find_usable(self, caller: UserId, ref: KeyRef, *, recent: bool = False) -> UsableKey | None:
        self.reads.append(recent)
        key = self.keys.get(ref)
        return key if key is not None and key.record.identity.owner_id == caller else None

    async def predecessors(self, caller: UserId, name: KeyName) -> int:
        return 0

    async def page(self, caller: UserId, which: KeyFilter, *, after: str, limit: int) -> KeyPage:
        raise key_not_found()


@dataclass
class FakeUsers:
    """Users by id. Take one out, and nobody admits them any more."""

    users: dict[UserId, User] = field(default_factory=dict)
    finds: int = 0

    async def find(self, user_id: UserId, *, recent: bool = False) -> User | None:
        self.finds += 1
        return self.users.get(user_id)
