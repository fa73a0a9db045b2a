"""The servicer of CryptoService."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from kms.app.ports import Call
from kms.domain.errors import KmsError
from kms.keys.crypto.charged import ChargedUses, Item
from kms.rpc import convert
from kms.rpc.batches import check_items
from kms.rpc.status import status_of
from kms.v1 import crypto_pb2 as pb

Message = TypeVar("Message", pb.SignRequest, pb.VerifyRequest, pb.EncryptRequest, pb.DecryptRequest, pb.ReEncryptRequest)
Request = TypeVar("Request")
Result = TypeVar("Result")
Wire = TypeVar("Wire")


@dataclass(frozen=True, slots=True)
class CryptoServicer:
    """Decodes, uses keys through `ChargedUses`, encodes."""

    uses: ChargedUses

    async def Sign(self, request: pb.SignRequest, call: Call) -> pb.SignResponse:
        """Sign a message or a digest."""
        return convert.wire_signature(await self.uses.sign(call, convert.to_sign(request), convert.repeatable(request)))

    async def Verify(self, request: pb.VerifyRequest, call: Call) -> pb.VerifyResponse:
        """Verify a signature."""
        return convert.wire_verification(await self.uses.verify(call, convert.to_verify(request)))

    async def Encrypt(self, request: pb.EncryptRequest, call: Call) -> pb.EncryptResponse:
        """Encrypt a plaintext."""
        return convert.wire_encrypted(await self.uses.encrypt(call, convert.to_encrypt(request), convert.repeatable(request)))

    async def Decrypt(self, request: pb.DecryptRequest, call: Call) -> pb.DecryptResponse:
        """Decrypt a ciphertext."""
        return convert.wire_decrypted(await self.uses.decrypt(call, convert.to_decrypt(request)))

    async def ReEncrypt(self, request: pb.ReEncryptRequest, call: Call) -> pb.ReEncryptResponse:
        """Move a ciphertext to another key."""
        moved = await self.uses.reencrypt(call, convert.to_reencrypt(request), convert.repeatable(request))
        return convert.wire_reencrypted(moved)

    async def GenerateDataKey(self, request: pb.GenerateDataKeyRequest, call: Call) -> pb.GenerateDataKeyResponse:
        """Make a data key."""
        made = await self.uses.data_key(call, convert.to_generate(request), convert.repeatable(request))
        return pb.GenerateDataKeyResponse(plaintext=made.plaintext, ciphertext=made.ciphertext, key_id=str(made.key_id))

    async def GenerateRandom(self, request: pb.GenerateRandomRequest, call: Call) -> pb.GenerateRandomResponse:
        """Draw random bytes."""
        return pb.GenerateRandomResponse(random=await self.uses.encryption.random(request.size_bytes))

    async def BatchSign(self, request: pb.BatchSignRequest, call: Call) -> pb.BatchSignResponse:
        """Sign each item."""
        check_items(request.items, lambda item: len(item.message) + len(item.digest))
        items = _items(request.items, lambda item: Item(convert.to_sign(item), convert.repeatable(item)))
        outcomes = await self.uses.sign_each(call, items)
        return pb.BatchSignResponse(items=_wire_items(outcomes, convert.wire_signature, pb.BatchSignResponse.Item))

    async def BatchVerify(self, request: pb.BatchVerifyRequest, call: Call) -> pb.BatchVerifyResponse:
        """Verify each item."""
        check_items(request.items, lambda item: len(item.message) + len(item.digest) + len(item.signature))
        items = _items(request.items, lambda item: Item(convert.to_verify(item)))
        outcomes = await self.uses.verify_each(call, items)
        return pb.BatchVerifyResponse(items=_wire_items(outcomes, convert.wire_verification, pb.BatchVerifyResponse.Item))

    async def BatchEncrypt(self, request: pb.BatchEncryptRequest, call: Call) -> pb.BatchEncryptResponse:
        """Encrypt each item."""
        check_items(request.items, lambda item: len(item.plaintext) + len(item.aad))
        items = _items(request.items, lambda item: Item(convert.to_encrypt(item), convert.repeatable(item)))
        outcomes = await self.uses.encrypt_each(call, items)
        return pb.BatchEncryptResponse(items=_wire_items(outcomes, convert.wire_encrypted, pb.BatchEncryptResponse.Item))

    async def BatchDecrypt(self, request: pb.BatchDecryptRequest, call: Call) -> pb.BatchDecryptResponse:
        """Decrypt each item."""
        check_items(request.items, lambda item: len(item.ciphertext) + len(item.aad))
        items = _items(request.items, lambda item: Item(convert.to_decrypt(item)))
        outcomes = await self.uses.decrypt_each(call, items)
        return pb.BatchDecryptResponse(items=_wire_items(outcomes, convert.wire_decrypted, pb.BatchDecryptResponse.Item))

    async def BatchReEncrypt(self, request: pb.BatchReEncryptRequest, call: Call) -> pb.BatchReEncryptResponse:
        """Move the ciphertext of each item to another key."""
        check_items(request.items, lambda item: len(item.ciphertext) + len(item.aad) + len(item.new_aad))
        items = _items(request.items, lambda item: Item(convert.to_reencrypt(item), convert.repeatable(item)))
        outcomes = await self.uses.reencrypt_each(call, items)
        return pb.BatchReEncryptResponse(items=_wire_items(outcomes, convert.wire_reencrypted, pb.BatchReEncryptResponse.Item))


def _items(messages: Sequence[Message], parse: Callable[[Message], Item[Request]]) -> list[Item[Request] | KmsError]:
    """Return the items of a batch. One that cannot be parsed is its own refusal."""

    def parsed(message: Message) -> Item[Request] | KmsError:
        try:
            return parse(message)
        except KmsError as refusal:
            return refusal

    return [parsed(message) for message in messages]


def _wire_items(
    outcomes: Sequence[Result | KmsError], encode: Callable[[Result], object], item: Callable[..., Wire]
) -> list[Wire]:
    return [
        item(error=status_of(outcome)) if isinstance(outcome, KmsError) else item(result=encode(outcome)) for outcome in outcomes
    ]
