"""The servicer of CryptoService."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import TypeVar
from uuid import UUID

from kms.app.encryption import DataKey, Encryption, ToDecrypt
from kms.app.keyring import refused_key
from kms.app.ports import Call, Entry
from kms.app.repeats import Uses
from kms.app.signing import Signing
from kms.app.uses import Alone, Draft, Turn, used
from kms.domain.errors import Reason
from kms.domain.ids import KeyId, parse_key_ref
from kms.rpc import convert
from kms.rpc.batches import answer_each, check_items
from kms.rpc.edge import Context, current
from kms.v1 import crypto_pb2 as pb
from kms.v1 import crypto_pb2_grpc

Repeatable = pb.SignRequest | pb.EncryptRequest | pb.GenerateDataKeyRequest
Response = TypeVar("Response", pb.SignResponse, pb.EncryptResponse, pb.GenerateDataKeyResponse)


@dataclass(frozen=True, slots=True)
class CryptoServicer(crypto_pb2_grpc.CryptoServiceServicer):
    """Decodes, calls `Signing` and `Encryption`, has the use settled, encodes."""

    signing: Signing
    encryption: Encryption
    uses: Uses

    async def Sign(self, request: pb.SignRequest, context: Context) -> pb.SignResponse:
        """Sign a message or a digest."""
        return await self._sign(request, Alone())

    async def Verify(self, request: pb.VerifyRequest, context: Context) -> pb.VerifyResponse:
        """Verify a signature."""
        return await self._verify(request, Alone())

    async def Encrypt(self, request: pb.EncryptRequest, context: Context) -> pb.EncryptResponse:
        """Encrypt a plaintext."""
        return await self._encrypt(request, Alone())

    async def Decrypt(self, request: pb.DecryptRequest, context: Context) -> pb.DecryptResponse:
        """Decrypt a ciphertext."""
        return await self._decrypt(request, Alone())

    async def GenerateDataKey(self, request: pb.GenerateDataKeyRequest, context: Context) -> pb.GenerateDataKeyResponse:
        """Make a data key."""
        return await self._once(request, lambda: self._data_key(request), pb.GenerateDataKeyResponse, Alone())

    async def GenerateRandom(self, request: pb.GenerateRandomRequest, context: Context) -> pb.GenerateRandomResponse:
        """Draw random bytes."""
        return pb.GenerateRandomResponse(random=await self.encryption.random(request.size_bytes))

    async def BatchSign(self, request: pb.BatchSignRequest, context: Context) -> pb.BatchSignResponse:
        """Sign each item."""
        check_items(request.items, lambda item: len(item.message) + len(item.digest))
        items = await answer_each(request.items, self._sign, pb.BatchSignResponse.Item, self._note("BatchSign"), is_charged=True)
        return pb.BatchSignResponse(items=items)

    async def BatchVerify(self, request: pb.BatchVerifyRequest, context: Context) -> pb.BatchVerifyResponse:
        """Verify each item."""
        check_items(request.items, lambda item: len(item.message) + len(item.digest) + len(item.signature))
        items = await answer_each(
            request.items, self._verify, pb.BatchVerifyResponse.Item, self._note("BatchVerify"), is_charged=False
        )
        return pb.BatchVerifyResponse(items=items)

    async def BatchEncrypt(self, request: pb.BatchEncryptRequest, context: Context) -> pb.BatchEncryptResponse:
        """Encrypt each item."""
        check_items(request.items, lambda item: len(item.plaintext) + len(item.aad))
        items = await answer_each(
            request.items, self._encrypt, pb.BatchEncryptResponse.Item, self._note("BatchEncrypt"), is_charged=True
        )
        return pb.BatchEncryptResponse(items=items)

    async def BatchDecrypt(self, request: pb.BatchDecryptRequest, context: Context) -> pb.BatchDecryptResponse:
        """Decrypt each item."""
        check_items(request.items, lambda item: len(item.ciphertext) + len(item.aad))
        items = await answer_each(
            request.items, self._decrypt, pb.BatchDecryptResponse.Item, self._note("BatchDecrypt"), is_charged=False
        )
        return pb.BatchDecryptResponse(items=items)

    def _note(self, action: str) -> Callable[[Reason], None]:
        return lambda reason: self.uses.ledger.note_refusal(current(), action, refused_key(reason), reason)

    async def _call(self) -> Call:
        return await self.uses.admitted(current())

    async def _sign(self, request: pb.SignRequest, turn: Turn) -> pb.SignResponse:
        what = convert.to_sign(request)

        async def draft() -> Draft[pb.SignResponse]:
            return (await self.signing.sign(await self._call(), what)).map(convert.signed)

        return await self._once(request, draft, pb.SignResponse, turn)

    async def _verify(self, request: pb.VerifyRequest, turn: Turn) -> pb.VerifyResponse:
        async def draft() -> Draft[pb.VerifyResponse]:
            valid, key_id = await self.signing.verify(
                current().user.user_id, convert.to_sign(request), request.signature, require_low_s=request.require_low_s
            )
            return Draft(pb.VerifyResponse(valid=valid, key_id=str(key_id)), None)

        return await used(self.uses.ledger, draft, turn)

    async def _encrypt(self, request: pb.EncryptRequest, turn: Turn) -> pb.EncryptResponse:
        what = convert.to_encrypt(request)

        async def draft() -> Draft[pb.EncryptResponse]:
            return (await self.encryption.encrypt(await self._call(), what)).map(
                lambda made: pb.EncryptResponse(ciphertext=made[0], key_id=str(made[1]))
            )

        return await self._once(request, draft, pb.EncryptResponse, turn)

    async def _decrypt(self, request: pb.DecryptRequest, turn: Turn) -> pb.DecryptResponse:
        what = convert.to_decrypt(request)

        async def draft() -> Draft[pb.DecryptResponse]:
            return (await self.encryption.decrypt(await self._call(), what)).map(
                lambda opened: pb.DecryptResponse(plaintext=opened[0], key_id=str(opened[1]))
            )

        return await used(self.uses.ledger, draft, turn)

    async def _data_key(self, request: pb.GenerateDataKeyRequest) -> Draft[pb.GenerateDataKeyResponse]:
        def answer(made: DataKey) -> pb.GenerateDataKeyResponse:
            plaintext = b"" if request.without_plaintext else made.plaintext
            return pb.GenerateDataKeyResponse(plaintext=plaintext, ciphertext=made.ciphertext, key_id=str(made.key_id))

        key, size = parse_key_ref(request.key), convert.data_key_size(request)
        return (await self.encryption.data_key(await self._call(), key, size, request.aad)).map(answer)

    async def _once(
        self, request: Repeatable, draft: Callable[[], Awaitable[Draft[Response]]], kind: type[Response], turn: Turn
    ) -> Response:
        async def again(kept: bytes) -> Draft[Response]:
            response = kind.FromString(kept)
            await self.uses.check_repeatable(current(), KeyId(UUID(response.key_id)))
            if isinstance(response, pb.GenerateDataKeyResponse) and isinstance(request, pb.GenerateDataKeyRequest):
                return Draft(response, await self._unwrap_again(request, response))
            return Draft(response, None)

        return await self.uses.once(current(), convert.asked(request), draft, turn, keep=_kept, again=again)

    async def _unwrap_again(self, request: pb.GenerateDataKeyRequest, response: pb.GenerateDataKeyResponse) -> Entry | None:
        # The plaintext was never stored: it comes out of the token once more, under the state that the key has now. That it
        # does is recorded, and not charged.
        if request.without_plaintext:
            return None
        what = ToDecrypt(response.ciphertext, request.aad, key=None, raw_oaep=False, oaep_hash=None)
        opened = await self.encryption.decrypt(await self._call(), what)
        response.plaintext = opened.result[0]
        return opened.entry and replace(opened.entry, action="generate_data_key.repeat")


def _kept(response: Response) -> bytes:
    """Return what of *response* may be stored: all but a plaintext."""
    if isinstance(response, pb.GenerateDataKeyResponse):
        return pb.GenerateDataKeyResponse(ciphertext=response.ciphertext, key_id=response.key_id).SerializeToString()
    return response.SerializeToString()
