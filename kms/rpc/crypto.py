"""The servicer of CryptoService."""

from dataclasses import dataclass

from kms.app.encryption import Encryption
from kms.app.signing import Signing
from kms.domain.ids import parse_key_ref
from kms.rpc import convert
from kms.rpc.batches import answer_each, check_items
from kms.rpc.edge import Context, caller
from kms.v1 import crypto_pb2 as pb
from kms.v1 import crypto_pb2_grpc


@dataclass(frozen=True, slots=True)
class CryptoServicer(crypto_pb2_grpc.CryptoServiceServicer):
    """Decodes, calls `Signing` and `Encryption`, encodes."""

    signing: Signing
    encryption: Encryption

    async def Sign(self, request: pb.SignRequest, context: Context) -> pb.SignResponse:
        """Sign a message or a digest."""
        return await self._sign(request)

    async def Verify(self, request: pb.VerifyRequest, context: Context) -> pb.VerifyResponse:
        """Verify a signature."""
        return await self._verify(request)

    async def Encrypt(self, request: pb.EncryptRequest, context: Context) -> pb.EncryptResponse:
        """Encrypt a plaintext."""
        return await self._encrypt(request)

    async def Decrypt(self, request: pb.DecryptRequest, context: Context) -> pb.DecryptResponse:
        """Decrypt a ciphertext."""
        return await self._decrypt(request)

    async def GenerateDataKey(self, request: pb.GenerateDataKeyRequest, context: Context) -> pb.GenerateDataKeyResponse:
        """Make a data key."""
        convert.refuse_unimplemented(request, "request_id")
        made = await self.encryption.data_key(caller(), parse_key_ref(request.key), convert.data_key_size(request), request.aad)
        plaintext = b"" if request.without_plaintext else made.plaintext
        return pb.GenerateDataKeyResponse(plaintext=plaintext, ciphertext=made.ciphertext, key_id=str(made.key_id))

    async def GenerateRandom(self, request: pb.GenerateRandomRequest, context: Context) -> pb.GenerateRandomResponse:
        """Draw random bytes."""
        return pb.GenerateRandomResponse(random=await self.encryption.random(request.size_bytes))

    async def BatchSign(self, request: pb.BatchSignRequest, context: Context) -> pb.BatchSignResponse:
        """Sign each item."""
        check_items(request.items, lambda item: len(item.message) + len(item.digest))
        return pb.BatchSignResponse(items=await answer_each(request.items, self._sign, pb.BatchSignResponse.Item))

    async def BatchVerify(self, request: pb.BatchVerifyRequest, context: Context) -> pb.BatchVerifyResponse:
        """Verify each item."""
        check_items(request.items, lambda item: len(item.message) + len(item.digest) + len(item.signature))
        return pb.BatchVerifyResponse(items=await answer_each(request.items, self._verify, pb.BatchVerifyResponse.Item))

    async def BatchEncrypt(self, request: pb.BatchEncryptRequest, context: Context) -> pb.BatchEncryptResponse:
        """Encrypt each item."""
        check_items(request.items, lambda item: len(item.plaintext) + len(item.aad))
        return pb.BatchEncryptResponse(items=await answer_each(request.items, self._encrypt, pb.BatchEncryptResponse.Item))

    async def BatchDecrypt(self, request: pb.BatchDecryptRequest, context: Context) -> pb.BatchDecryptResponse:
        """Decrypt each item."""
        check_items(request.items, lambda item: len(item.ciphertext) + len(item.aad))
        return pb.BatchDecryptResponse(items=await answer_each(request.items, self._decrypt, pb.BatchDecryptResponse.Item))

    async def _sign(self, request: pb.SignRequest) -> pb.SignResponse:
        convert.refuse_unimplemented(request, "request_id")
        return convert.signed(await self.signing.sign(caller(), convert.to_sign(request)))

    async def _verify(self, request: pb.VerifyRequest) -> pb.VerifyResponse:
        valid, key_id = await self.signing.verify(
            caller(), convert.to_sign(request), request.signature, require_low_s=request.require_low_s
        )
        return pb.VerifyResponse(valid=valid, key_id=str(key_id))

    async def _encrypt(self, request: pb.EncryptRequest) -> pb.EncryptResponse:
        convert.refuse_unimplemented(request, "request_id")
        ciphertext, key_id = await self.encryption.encrypt(caller(), convert.to_encrypt(request))
        return pb.EncryptResponse(ciphertext=ciphertext, key_id=str(key_id))

    async def _decrypt(self, request: pb.DecryptRequest) -> pb.DecryptResponse:
        plaintext, key_id = await self.encryption.decrypt(caller(), convert.to_decrypt(request))
        return pb.DecryptResponse(plaintext=plaintext, key_id=str(key_id))
