"""Repeats: a caller that lost an answer asks again under the same id and gets the same answer without a second charge.

secret of the request (token) ──▶ find the stored answer ──▶ found: check it, and return it again
                                             │
                                             └▶ none: compute; the ledger stores the answer with the charge
"""

import hmac
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, Self
from uuid import UUID

from kms.app.keyring import require_key
from kms.app.ports import Call, Hsm, Keys, Ledger, Repeat
from kms.domain.answers import RequestSecret, request_bytes
from kms.domain.errors import KmsError, Reason, about_key
from kms.domain.fields import parse_request_id
from kms.domain.ids import KeyId
from kms.domain.keys import KeyRecord
from kms.domain.lifecycle import check_repeat
from kms.keys.ledger.counts import Counts, Meanwhile
from kms.keys.ledger.settling import Settling

_TAKEN: Final = frozenset({Reason.NAME_TAKEN, Reason.REQUEST_ID_REUSED})

Keep = Callable[[KeyId], Repeat]
"""Makes of a new key's id the answer that is stored for a repeat of the request that made the key."""


@dataclass(frozen=True, slots=True)
class RepeatableRequest:
    """A request under an idempotency id of the caller's: the name of the RPC, the id, and the request in one spelling."""

    rpc: str
    idempotency_id: str
    body: bytes

    def __post_init__(self) -> None:
        parse_request_id(self.idempotency_id)


@dataclass(frozen=True, slots=True)
class StoredAnswer:
    """An answer that was stored for a repeat."""

    answer_id: bytes
    content: bytes


@dataclass(frozen=True, slots=True)
class Answers:
    """The stored answers of one request of one caller."""

    call: Call
    request: RepeatableRequest
    _secret: RequestSecret
    _ledger: Ledger
    _counts: Counts

    @classmethod
    async def of(cls, call: Call, request: RepeatableRequest, repeats: "Repeats") -> Self:
        """Return the answers of *request*. The token makes its secret."""
        text = request_bytes(call.user.user_id, request.rpc, request.idempotency_id, request.body)
        return cls(call, request, RequestSecret(await repeats.hsm.mac(text)), repeats.settling.ledger, repeats.counts)

    async def find(self) -> StoredAnswer | None:
        """Return the answer that was stored. Raises REQUEST_ID_REUSED for another request, RECORD_INVALID."""
        found = await self._ledger.earlier(self.call.user.user_id, self.request.rpc, self.request.idempotency_id)
        if found is None:
            return None
        if not hmac.compare_digest(found.body_mac, self._secret.body_mac):
            raise KmsError(Reason.REQUEST_ID_REUSED, "this request_id was used for another request", field="request_id")
        return StoredAnswer(*self._secret.opened(found.result))

    def storable(self, content: bytes) -> Repeat:
        """Return *content* in the form in which the ledger stores it."""
        answer_id, request = self._counts.new_answer_id(), self.request
        stored = self._secret.stored(answer_id, content)
        return Repeat(request.rpc, request.idempotency_id, self._secret.body_mac, stored, answer_id)


@dataclass(frozen=True, slots=True)
class Repeats:
    """Repeated requests, and who may have their answers again."""

    keys: Keys
    hsm: Hsm
    settling: Settling
    counts: Counts

    async def answers(self, call: Call, request: RepeatableRequest) -> Answers:
        """Return the stored answers of *request*."""
        return await Answers.of(call, request, self)

    async def check_repeatable(self, call: Call, key_id: KeyId, answer_id: bytes) -> None:
        """Raise unless the answer of a use of *key_id* may be handed out again. Count it where it was not counted.

        No charge looks at the caller and the key again, so this does. Raises CREDENTIALS_INVALID, PERMISSION_DENIED,
        KEY_NOT_FOUND, the reason of a key that is revoked or worse, RECORD_INVALID.
        """
        record, meanwhile = await self._visible(call, key_id)
        with about_key(key_id):
            self.counts.repeated(record, answer_id, meanwhile)

    async def created(
        self, call: Call, request: RepeatableRequest | None, create: Callable[[Keep | None], Awaitable[KeyRecord]]
    ) -> KeyRecord:
        """Return the key that *create* makes. For a repeated request return the key that was made then, as it is now.

        Raises what *create* raises, and REQUEST_ID_REUSED for an id that was used with another request.
        """
        if request is None:
            return await create(None)
        answers = await self.answers(call, request)
        stored = await answers.find()
        if stored is None:
            try:
                return await create(lambda key_id: answers.storable(key_id.bytes))
            except KmsError as refusal:
                # A twin of this request was faster: it has taken the name, or the id.
                stored = await answers.find() if refusal.reason in _TAKEN else None
                if stored is None:
                    raise
        record, _ = await self._visible(call, KeyId(UUID(bytes=stored.content)))
        return record

    async def _visible(self, call: Call, key_id: KeyId) -> tuple[KeyRecord, Meanwhile]:
        caller = (await self.settling.readmitted(call)).user
        with self.counts.reading() as meanwhile:
            record = await require_key(self.keys, caller.user_id, key_id)
        with about_key(key_id):
            check_repeat(record.state)
        return record, meanwhile
