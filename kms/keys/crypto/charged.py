"""The one way to use a key: check, compute, charge, answer; repeat for free.

Our RPCs call these functions, and so does everything else that uses a key: rotation, certificates, other APIs. Each function
takes the caller's call and a value, and returns a value. Each use has a batch form, in which every item has its own outcome.

A caller may name a request by an id of their own (`RepeatableRequest`). Then the answer is stored with the charge for 24 hours,
and the same request gets it again without a charge.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

from kms.app.keyring import require_usable_key
from kms.app.ports import Call
from kms.domain.errors import KmsError
from kms.domain.ids import KeyId
from kms.domain.lifecycle import Use
from kms.keys.crypto.answers import (
    decode_data_key,
    decode_encrypted,
    decode_reencrypted,
    decode_signature,
    encode_data_key,
    encode_encrypted,
    encode_reencrypted,
    encode_signature,
)
from kms.keys.crypto.encryption import DataKey, Decrypted, Encrypted, Encryption, ToDecrypt, ToEncrypt, ToGenerate
from kms.keys.crypto.reencryption import ReEncrypted, ToReEncrypt, of_new_ciphertext
from kms.keys.crypto.signing import Signature, Signing, ToSign, ToVerify, Verification
from kms.keys.ledger.repeats import RepeatableRequest, Repeats, StoredAnswer
from kms.keys.ledger.settling import RETRYABLE_REFUSALS, SINGLE, Compute, PendingResult, Settling, Slot

Request = TypeVar("Request")
Result = TypeVar("Result", Signature, Encrypted, ReEncrypted, DataKey)
T = TypeVar("T")
Again = Callable[[Call, StoredAnswer, bool], Awaitable[PendingResult[T]]]
"""Makes the result of a repeated request from its stored answer. True: read keys from the database, not from the cache."""


@dataclass(frozen=True, slots=True)
class Item(Generic[Request]):
    """One use of a batch, which the caller may repeat under an id of its own."""

    request: Request
    repeatable: RepeatableRequest | None = None


class RunBatch(Protocol):
    """Runs the items of a batch, a few at a time, and settles them in their order."""

    async def __call__(
        self,
        items: Sequence[Item[Request] | KmsError],
        use: Callable[[Item[Request], Slot], Awaitable[T]],
        note: Callable[[KmsError], None],
        /,
        *,
        is_charged: bool,
    ) -> list[T | KmsError]:
        """Return the result or the refusal of each item. *note* is called with each refusal.

        An item that is a refusal, because it could not be parsed, keeps its place.

        If the call is cancelled after an item may have been charged (*is_charged*), it raises OUTCOME_UNKNOWN.
        """
        ...


@dataclass(frozen=True, slots=True)
class ChargedUses:
    """Uses of keys by callers: charged where they protect something, recorded where they open it."""

    signing: Signing
    encryption: Encryption
    settling: Settling
    repeats: Repeats
    run_batch: RunBatch

    async def sign(
        self, call: Call, request: ToSign, repeatable: RepeatableRequest | None = None, slot: Slot = SINGLE
    ) -> Signature:
        """Sign a message or a digest; charged. See `Signing.sign`."""

        async def compute(call: Call, fresh: bool) -> PendingResult[Signature]:
            return await self.signing.sign(call, request, fresh=fresh)

        return await self._charged(call, repeatable, compute, slot, encode_signature, self._again(decode_signature))

    async def verify(self, call: Call, request: ToVerify, slot: Slot = SINGLE) -> Verification:
        """Verify a signature; neither charged nor recorded. See `Signing.verify`."""

        async def compute(call: Call, fresh: bool) -> PendingResult[Verification]:
            return PendingResult(await self.signing.verify(call, request), None)

        return await self.settling.settle_use(call, compute, slot)

    async def encrypt(
        self, call: Call, request: ToEncrypt, repeatable: RepeatableRequest | None = None, slot: Slot = SINGLE
    ) -> Encrypted:
        """Encrypt a plaintext; charged. See `Encryption.encrypt`."""

        async def compute(call: Call, fresh: bool) -> PendingResult[Encrypted]:
            return await self.encryption.encrypt(call, request, fresh=fresh)

        return await self._charged(call, repeatable, compute, slot, encode_encrypted, self._again(decode_encrypted))

    async def decrypt(self, call: Call, request: ToDecrypt, slot: Slot = SINGLE) -> Decrypted:
        """Decrypt a ciphertext; recorded. See `Encryption.decrypt`."""
        return await self._decrypt(call, request, "decrypt", slot)

    async def reencrypt(
        self, call: Call, request: ToReEncrypt, repeatable: RepeatableRequest | None = None, slot: Slot = SINGLE
    ) -> ReEncrypted:
        """Move a ciphertext to another key: recorded as a decryption by its key, charged as an encryption by the other.

        The decryption is recorded once and before anything is charged. If the other key cannot encrypt, nothing is decrypted.
        Raises what `decrypt` raises about the one key, and what `encrypt` raises about the other.
        """
        opened: Decrypted | None = None

        async def compute(call: Call, fresh: bool) -> PendingResult[ReEncrypted]:
            nonlocal opened
            request.check()
            keys, caller = self.encryption.keys, call.user.user_id
            target = await request.target(keys, caller)
            await require_usable_key(keys, caller, target, Use.PROTECT, fresh=fresh)
            opened = opened or await self._decrypt(call, request.to_decrypt(), "decrypt.reencrypt")
            with of_new_ciphertext():
                pending = await self.encryption.encrypt(call, request.to_encrypt(target, opened.plaintext), fresh=fresh)
            result = ReEncrypted(pending.result.ciphertext, pending.result.key_id, opened.key_id)
            return PendingResult(result, pending.entry and replace(pending.entry, action="encrypt.reencrypt"))

        return await self._charged(call, repeatable, compute, slot, encode_reencrypted, self._again(decode_reencrypted))

    async def data_key(self, call: Call, request: ToGenerate, repeatable: RepeatableRequest | None = None) -> DataKey:
        """Make a data key; charged. See `Encryption.data_key`. Without its plaintext if the request says so."""

        async def compute(call: Call, fresh: bool) -> PendingResult[DataKey]:
            pending = await self.encryption.data_key(call, request, fresh=fresh)
            return replace(pending, result=replace(pending.result, plaintext=b"")) if request.without_plaintext else pending

        async def again(call: Call, stored: StoredAnswer, fresh: bool) -> PendingResult[DataKey]:
            data_key = decode_data_key(stored.content)
            await self.repeats.check_repeatable(call, data_key.key_id, stored.answer_id)
            if request.without_plaintext:
                return PendingResult(data_key, None)
            # The plaintext was never stored. The token opens it again if the key's state permits. That is recorded, not charged.
            to_open = ToDecrypt(data_key.ciphertext, request.aad, key=None, raw_oaep=False, oaep_hash=None)
            opened = await self.encryption.decrypt(call, to_open, fresh=fresh)
            entry = opened.entry and replace(opened.entry, action="generate_data_key.repeat")
            return PendingResult(replace(data_key, plaintext=opened.result.plaintext), entry)

        return await self._charged(call, repeatable, compute, SINGLE, encode_data_key, again)

    async def sign_each(self, call: Call, items: Sequence[Item[ToSign] | KmsError]) -> list[Signature | KmsError]:
        """Sign each item, charged in the order of the items."""

        async def sign(item: Item[ToSign], slot: Slot) -> Signature:
            return await self.sign(call, item.request, item.repeatable, slot)

        return await self.run_batch(items, sign, self._note(call, "BatchSign"), is_charged=True)

    async def verify_each(self, call: Call, items: Sequence[Item[ToVerify] | KmsError]) -> list[Verification | KmsError]:
        """Verify each item."""

        async def verify(item: Item[ToVerify], slot: Slot) -> Verification:
            return await self.verify(call, item.request, slot)

        return await self.run_batch(items, verify, self._note(call, "BatchVerify"), is_charged=False)

    async def encrypt_each(self, call: Call, items: Sequence[Item[ToEncrypt] | KmsError]) -> list[Encrypted | KmsError]:
        """Encrypt each item, charged in the order of the items."""

        async def encrypt(item: Item[ToEncrypt], slot: Slot) -> Encrypted:
            return await self.encrypt(call, item.request, item.repeatable, slot)

        return await self.run_batch(items, encrypt, self._note(call, "BatchEncrypt"), is_charged=True)

    async def decrypt_each(self, call: Call, items: Sequence[Item[ToDecrypt] | KmsError]) -> list[Decrypted | KmsError]:
        """Decrypt each item, recorded in the order of the items."""

        async def decrypt(item: Item[ToDecrypt], slot: Slot) -> Decrypted:
            return await self.decrypt(call, item.request, slot)

        return await self.run_batch(items, decrypt, self._note(call, "BatchDecrypt"), is_charged=False)

    async def reencrypt_each(self, call: Call, items: Sequence[Item[ToReEncrypt] | KmsError]) -> list[ReEncrypted | KmsError]:
        """Move the ciphertext of each item to another key, charged in the order of the items."""

        async def reencrypt(item: Item[ToReEncrypt], slot: Slot) -> ReEncrypted:
            return await self.reencrypt(call, item.request, item.repeatable, slot)

        return await self.run_batch(items, reencrypt, self._note(call, "BatchReEncrypt"), is_charged=True)

    async def _decrypt(self, call: Call, request: ToDecrypt, action: str, slot: Slot = SINGLE) -> Decrypted:
        """Decrypt a ciphertext; recorded as *action*."""

        async def compute(call: Call, fresh: bool) -> PendingResult[Decrypted]:
            pending = await self.encryption.decrypt(call, request, fresh=fresh)
            return PendingResult(pending.result, pending.entry and replace(pending.entry, action=action))

        return await self.settling.settle_use(call, compute, slot)

    def _note(self, call: Call, action: str) -> Callable[[KmsError], None]:
        def note(refusal: KmsError) -> None:
            key_id = None if refusal.key_id is None else KeyId(refusal.key_id)
            self.settling.ledger.note_refusal(call, action, key_id, refusal.reason)

        return note

    async def _charged(
        self,
        call: Call,
        repeatable: RepeatableRequest | None,
        compute: Compute[Result],
        slot: Slot,
        encode: Callable[[Result], bytes],
        again: Again[Result],
    ) -> Result:
        """Return a computed result once it is charged. For a repeated request return its stored answer."""
        if repeatable is None:
            return await self.settling.settle_use(call, compute, slot)
        answers = await self.repeats.answers(call, repeatable)

        async def answered_or_computed(call: Call, fresh: bool) -> PendingResult[Result]:
            # Looked up before every attempt: a twin of this request may have been settled first.
            stored = await answers.find()
            if stored is not None:
                return await again(call, stored, fresh)
            try:
                pending = await compute(call, fresh)
            except KmsError as refusal:
                # A twin may have been settled meanwhile, and may have made the last use of the key.
                stored = await answers.find() if refusal.reason in RETRYABLE_REFUSALS else None
                if stored is None:
                    raise
                return await again(call, stored, fresh)
            entry = pending.entry and replace(pending.entry, repeat=answers.storable(encode(pending.result)))
            return PendingResult(pending.result, entry)

        return await self.settling.settle_use(call, answered_or_computed, slot)

    def _again(self, decode: Callable[[bytes], Result]) -> Again[Result]:
        async def again(call: Call, stored: StoredAnswer, fresh: bool) -> PendingResult[Result]:
            result = decode(stored.content)
            await self.repeats.check_repeatable(call, result.key_id, stored.answer_id)
            return PendingResult(result, None)

        return again
