"""Repeats: a caller that lost an answer asks again under the same `request_id` and gets that result without a second charge."""

import hmac
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Final, TypeVar
from uuid import UUID

from kms.app.access import Access
from kms.app.keyring import existing, is_read_anew
from kms.app.ports import Call, Hsm, Keys, Ledger, Repeat
from kms.app.uses import LOOK_AGAIN, Draft, Turn, used
from kms.domain.answers import RequestSecret, request_bytes
from kms.domain.errors import KmsError, Reason
from kms.domain.fields import parse_request_id
from kms.domain.ids import KeyId
from kms.domain.keys import KeyRecord
from kms.domain.lifecycle import check_repeat
from kms.domain.permissions import check_permitted

_ANY_USE: Final = "CryptoService/"  # what is true of the permission to use keys is true of each RPC that does

_TAKEN: Final = frozenset({Reason.NAME_TAKEN, Reason.REQUEST_ID_REUSED})

T = TypeVar("T")
Keep = Callable[[KeyId], Repeat]
"""Makes of a new key's id what is stored for a repeat of the request that made the key."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A request under an id of the caller's own: the RPC, the id, and the request in one deterministic spelling."""

    rpc: str
    request_id: str
    body: bytes

    def __post_init__(self) -> None:
        parse_request_id(self.request_id)


@dataclass(frozen=True, slots=True)
class Uses:
    """Uses of keys, settled in the ledger; one that has a `request_id` is handed out again instead of being made again."""

    keys: Keys
    hsm: Hsm
    ledger: Ledger
    access: Access

    async def admitted(self, call: Call) -> Call:
        """Return the call with its user as he is known now: for a draft that is made anew because he was refused."""
        user = await self.access.admit(call.user.user_id, recent=not is_read_anew())
        check_permitted(user.permissions, _ANY_USE)
        return replace(call, user=user)

    async def once(
        self,
        call: Call,
        asked: Asked | None,
        draft: Callable[[], Awaitable[Draft[T]]],
        turn: Turn,
        *,
        keep: Callable[[T], bytes],
        again: Callable[[bytes], Awaitable[Draft[T]]],
    ) -> T:
        """Return the result of *draft* once it is settled, or, repeated, what `again` makes of what `keep` kept.

        Raises REQUEST_ID_REUSED for an id that was used with another request.
        """
        if asked is None:
            return await used(self.ledger, draft, turn)
        secret = await self._secret(call, asked)

        async def answered_or_drafted() -> Draft[T]:
            # Looked at before every attempt: a twin may have been settled first.
            kept = await self._kept(call, asked, secret)
            if kept is not None:
                return await again(kept)
            try:
                made = await draft()
            except KmsError as error:
                # It may have been settled meanwhile, and have made the last use of the key.
                kept = await self._kept(call, asked, secret) if error.reason in LOOK_AGAIN else None
                if kept is None:
                    raise
                return await again(kept)
            repeat = _repeat(asked, secret, keep(made.result))
            return Draft(made.result, made.entry and replace(made.entry, repeat=repeat))

        return await used(self.ledger, answered_or_drafted, turn)

    async def created(self, call: Call, asked: Asked | None, create: Callable[[Keep | None], Awaitable[KeyRecord]]) -> KeyRecord:
        """Return the key that *create* makes, or, repeated, the key that was made then, as it is now.

        Raises what *create* raises, and REQUEST_ID_REUSED for an id that was used with another request.
        """
        if asked is None:
            return await create(None)
        secret = await self._secret(call, asked)
        kept = await self._kept(call, asked, secret)
        if kept is None:
            try:
                return await create(lambda key_id: _repeat(asked, secret, key_id.bytes))
            except KmsError as error:
                # A twin of this request was faster: it has taken the name, or the id.
                kept = await self._kept(call, asked, secret) if error.reason in _TAKEN else None
                if kept is None:
                    raise
        key_id = KeyId(UUID(bytes=kept))
        await self.check_repeatable(call, key_id)
        return await existing(self.keys, call.user.user_id, key_id)

    async def check_repeatable(self, call: Call, key_id: KeyId) -> None:
        """Raise unless a result by this key may be handed out again: the key is visible, and not revoked or worse.

        No charge looks at the caller again, so it is done here.
        """
        check_permitted((await self.access.admit(call.user.user_id)).permissions, _ANY_USE)
        check_repeat((await existing(self.keys, call.user.user_id, key_id)).state)

    async def _secret(self, call: Call, asked: Asked) -> RequestSecret:
        return RequestSecret(await self.hsm.mac(request_bytes(call.user.user_id, asked.rpc, asked.request_id, asked.body)))

    async def _kept(self, call: Call, asked: Asked, secret: RequestSecret) -> bytes | None:
        found = await self.ledger.earlier(call.user.user_id, asked.rpc, asked.request_id)
        if found is None:
            return None
        if not hmac.compare_digest(found.body_mac, secret.body_mac):
            raise KmsError(Reason.REQUEST_ID_REUSED, "this request_id was used for another request", field="request_id")
        return secret.content(found.result)


def _repeat(asked: Asked, secret: RequestSecret, content: bytes) -> Repeat:
    """Return *content* as it is stored, proven to be ours."""
    return Repeat(asked.rpc, asked.request_id, secret.body_mac, secret.stored(content))
