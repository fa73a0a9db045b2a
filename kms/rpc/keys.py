"""The servicer of KeyService."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

from kms.app.keyring import Keyring, KeyWish, require_key
from kms.app.lineage import neighbours
from kms.app.moving import Moving
from kms.app.ports import Call
from kms.domain.algorithms import key_spec
from kms.domain.errors import KmsError, Reason, about_key
from kms.domain.ids import base_name, parse_key_name, parse_key_ref
from kms.domain.key_row import PENDING_DAYS_DEFAULT
from kms.domain.keys import KeyRecord
from kms.domain.lifecycle import Change, Move
from kms.keys.ledger.repeats import Repeats
from kms.rpc import convert, enums
from kms.v1 import keys_pb2


@dataclass(frozen=True, slots=True)
class KeyServicer:
    """Decodes, calls `Keyring` and `Moving`, encodes. *repeats* answers a CreateKey that is repeated.

    *complete* adds to the answer of GetKey what other parts know of the key.
    """

    keyring: Keyring
    moving: Moving
    repeats: Repeats
    complete: Callable[[KeyRecord, keys_pb2.Key], Awaitable[None]]

    async def CreateKey(self, request: keys_pb2.CreateKeyRequest, call: Call) -> keys_pb2.CreateKeyResponse:
        """Make a key."""
        spec = key_spec(
            enums.required(enums.KEY_TYPES, request.type, "type"),
            enums.required(enums.PURPOSES, request.purpose, "purpose"),
            request.size_bits or None,
        )
        wish = KeyWish(
            name=parse_key_name(request.name),
            spec=spec,
            custody_min=enums.optional(enums.CUSTODIES, request.custody_min, "custody_min"),
            metadata=request.metadata,
            max_usage_count=convert.usage_limit(request),
            activated_at=convert.moment(request, "activated_at"),
            expires_at=convert.moment(request, "expires_at"),
        )
        create = partial(self.keyring.create, call, wish)
        key = await self.repeats.created(call, convert.repeatable(request), create)
        return keys_pb2.CreateKeyResponse(key=convert.wire_key(key))

    async def GetKey(self, request: keys_pb2.GetKeyRequest, call: Call) -> keys_pb2.GetKeyResponse:
        """Return a key."""
        keys, caller = self.keyring.keys, call.user.user_id
        key = await require_key(keys, caller, parse_key_ref(request.key))
        answer = keys_pb2.GetKeyResponse(key=convert.wire_key(key))
        predecessor, successor = await neighbours(keys, caller, key)
        answer.key.predecessor_id = "" if predecessor is None else str(predecessor.identity.key_id)
        answer.key.successor_id = "" if successor is None else str(successor.identity.key_id)
        await self.complete(key, answer.key)
        return answer

    async def ListKeys(self, request: keys_pb2.ListKeysRequest, call: Call) -> keys_pb2.ListKeysResponse:
        """List the caller's keys."""
        keys, caller, lineage = self.keyring.keys, call.user.user_id, None
        if request.lineage:
            lineage = base_name((await require_key(keys, caller, parse_key_ref(request.lineage, field="lineage"))).name)
        which, after, limit = convert.page_request(request, lineage)
        page = await keys.page(caller, which, after=after, limit=limit)
        token = convert.page_token(page.goes_on_after, which) if page.goes_on_after is not None else ""
        for key_id in page.invalid:
            self.repeats.settling.ledger.note_refusal(call, "ListKeys", key_id, Reason.RECORD_INVALID)
        return keys_pb2.ListKeysResponse(
            keys=[convert.wire_key(key) for key in page.keys], next_page_token=token, invalid_key_ids=map(str, page.invalid)
        )

    async def GetPublicKey(self, request: keys_pb2.GetPublicKeyRequest, call: Call) -> keys_pb2.GetPublicKeyResponse:
        """Return the public half of a key."""
        key = await require_key(self.keyring.keys, call.user.user_id, parse_key_ref(request.key), recent=True)
        spec = key.identity.spec
        with about_key(key.identity.key_id):
            if spec.is_symmetric:
                raise KmsError(Reason.WRONG_PURPOSE, "an AES key has no public half", key_type=spec.key_type)
            return keys_pb2.GetPublicKeyResponse(
                key_id=str(key.identity.key_id),
                type=enums.number_of(enums.KEY_TYPES, spec.key_type),
                public_key_pem=key.public_key,
                public_key_der=convert.der_of(key.public_key),
            )

    async def UpdateKey(self, request: keys_pb2.UpdateKeyRequest, call: Call) -> keys_pb2.UpdateKeyResponse:
        """Lower the limit, bring the expiry forward, replace the metadata."""
        return keys_pb2.UpdateKeyResponse(key=await self._move(call, request, Move.UPDATE, convert.update(request)))

    async def ActivateKey(self, request: keys_pb2.ActivateKeyRequest, call: Call) -> keys_pb2.ActivateKeyResponse:
        """Make a pre-active key active."""
        return keys_pb2.ActivateKeyResponse(key=await self._move(call, request, Move.ACTIVATE))

    async def DeactivateKey(self, request: keys_pb2.DeactivateKeyRequest, call: Call) -> keys_pb2.DeactivateKeyResponse:
        """Make an active key inactive."""
        return keys_pb2.DeactivateKeyResponse(key=await self._move(call, request, Move.DEACTIVATE))

    async def ReactivateKey(self, request: keys_pb2.ReactivateKeyRequest, call: Call) -> keys_pb2.ReactivateKeyResponse:
        """Make an inactive key active."""
        return keys_pb2.ReactivateKeyResponse(key=await self._move(call, request, Move.REACTIVATE))

    async def RevokeKey(self, request: keys_pb2.RevokeKeyRequest, call: Call) -> keys_pb2.RevokeKeyResponse:
        """Revoke a key."""
        return keys_pb2.RevokeKeyResponse(key=await self._move(call, request, Move.REVOKE, Change(reason=request.reason)))

    async def MarkKeyCompromised(
        self, request: keys_pb2.MarkKeyCompromisedRequest, call: Call
    ) -> keys_pb2.MarkKeyCompromisedResponse:
        """Mark a key compromised."""
        change = Change(reason=request.reason, occurred_at=convert.moment(request, "occurred_at"))
        return keys_pb2.MarkKeyCompromisedResponse(key=await self._move(call, request, Move.COMPROMISE, change))

    async def ScheduleKeyDestruction(
        self, request: keys_pb2.ScheduleKeyDestructionRequest, call: Call
    ) -> keys_pb2.ScheduleKeyDestructionResponse:
        """Schedule the destruction of a key."""
        change = Change(pending_days=request.pending_days or PENDING_DAYS_DEFAULT)
        return keys_pb2.ScheduleKeyDestructionResponse(key=await self._move(call, request, Move.SCHEDULE_DESTRUCTION, change))

    async def CancelKeyDestruction(
        self, request: keys_pb2.CancelKeyDestructionRequest, call: Call
    ) -> keys_pb2.CancelKeyDestructionResponse:
        """Cancel the destruction of a key."""
        return keys_pb2.CancelKeyDestructionResponse(key=await self._move(call, request, Move.CANCEL_DESTRUCTION))

    async def _move(self, call: Call, request: convert.Moves, move: Move, change: Change | None = None) -> keys_pb2.Key:
        ref, version = parse_key_ref(request.key), convert.version(request)
        key = await self.moving.move(call, ref, move, change or Change(), version=version)
        return convert.wire_key(key)
