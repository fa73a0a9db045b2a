"""The calls that `operations.py` measures: what each sends, how every answer is checked, and how some are proved.

The check of every answer is cheap, since the clients share the cores with the service; the proof, by another library or by
another call, is made of answers that were kept, after the time that is measured.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final
from uuid import uuid4

import grpc
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from kms.v1 import crypto_pb2, crypto_pb2_grpc, keys_pb2, keys_pb2_grpc

MESSAGE: Final = b"thirty-two bytes to be signed..."
PLAINTEXT: Final = b"forty-eight bytes that are encrypted, more or less"[:48]
BATCH_ITEMS: Final = 100
ECHO: Final = "/benchmarks.Echo/Echo"
_SECONDS_MAX: Final = 60.0

SIGNING: Final[Mapping[str, "keys_pb2.KeyType.ValueType"]] = {
    "secp256k1": keys_pb2.KEY_TYPE_SECP256K1,
    "secp256r1": keys_pb2.KEY_TYPE_SECP256R1,
    "ed25519": keys_pb2.KEY_TYPE_ED25519,
    "rsa-2048": keys_pb2.KEY_TYPE_RSA,
}
AES: Final = "aes"


class WrongError(Exception):
    """An answer that is not what was asked for: the run is worth nothing."""


@dataclass(frozen=True, slots=True)
class Known:
    """What the clients need to know of the keys: public keys in PEM by name, and a ciphertext of `PLAINTEXT`."""

    public_keys: Mapping[str, str]
    ciphertext: bytes


@dataclass(frozen=True, slots=True)
class Calls:
    """One kind of call on one channel. `check` and `prove` raise `WrongError`; `items` results are in an answer."""

    method: Callable[..., Awaitable[Any]]
    request: Callable[[], Any]
    check: Callable[[Any], None]
    prove: Callable[[Any], Awaitable[None]]
    items: int = 1

    async def send(self) -> Any:  # noqa: ANN401  # each method has its response
        """Send one request and return the answer, checked. Raises `grpc.RpcError` for every status but OK."""
        answer = await self.method(self.request(), timeout=_SECONDS_MAX)
        self.check(answer)
        return answer


def expect(*, holds: bool, what: str) -> None:
    """Raise `WrongError` saying *what* unless it holds."""
    if not holds:
        raise WrongError(what)


def echo_calls(channel: grpc.aio.Channel) -> Calls:
    """Return the call of the bare echo: a request as long as one to sign, and the same back."""
    body = crypto_pb2.SignRequest(key="secp256k1", message=MESSAGE).SerializeToString()

    def check(answer: bytes) -> None:
        expect(holds=answer == body, what="the echo answered something else")

    async def prove(answer: bytes) -> None:
        check(answer)

    return Calls(channel.unary_unary(ECHO, None, None), lambda: body, check, prove)


def service_calls(operation: str, channel: grpc.aio.Channel, known: Known) -> Calls:
    """Return the calls of *operation*, as `operations.py` names it, on *channel*."""
    crypto: Any = crypto_pb2_grpc.CryptoServiceStub(channel)
    keys: Any = keys_pb2_grpc.KeyServiceStub(channel)
    kind, _, key = operation.partition("-") if operation.startswith("sign-") else (operation, "", "")
    if operation.startswith("batch-"):
        return _batch(service_calls(operation.removeprefix("batch-"), channel, known), operation, crypto)
    match kind:
        case "sign":
            return _sign(crypto, key, known)
        case "encrypt":
            return _encrypt(crypto)
        case "decrypt":
            return _decrypt(crypto, known)
        case "generate-data-key":
            return _data_key(crypto)
        case "create-key":
            return _create(keys)
    raise ValueError(f"no such operation: {operation}")


def _sign(crypto: Any, key: str, known: Known) -> Calls:  # noqa: ANN401  # a stub for asyncio, which the generated types do not know
    request = crypto_pb2.SignRequest(key=key, message=MESSAGE)
    public_key = load_pem_public_key(known.public_keys[key].encode())

    def check(answer: crypto_pb2.SignResponse) -> None:
        expect(holds=len(answer.signature) >= 64, what="a signature is missing")

    async def prove(answer: crypto_pb2.SignResponse) -> None:
        match public_key:
            case ec.EllipticCurvePublicKey():
                public_key.verify(answer.signature, MESSAGE, ec.ECDSA(hashes.SHA256()))
            case ed25519.Ed25519PublicKey():
                public_key.verify(answer.signature, MESSAGE)
            case rsa.RSAPublicKey():
                pss = padding.PSS(mgf=padding.MGF1(hashes.SHA256()), salt_length=32)
                public_key.verify(answer.signature, MESSAGE, pss, hashes.SHA256())
            case _:
                raise WrongError("the key is of another kind")

    return Calls(crypto.Sign, lambda: request, check, prove)


def _encrypt(crypto: Any) -> Calls:  # noqa: ANN401  # as above
    request = crypto_pb2.EncryptRequest(key=AES, plaintext=PLAINTEXT)

    def check(answer: crypto_pb2.EncryptResponse) -> None:
        expect(holds=len(answer.ciphertext) > len(PLAINTEXT) + 28, what="a ciphertext is missing")

    async def prove(answer: crypto_pb2.EncryptResponse) -> None:
        opened = await crypto.Decrypt(crypto_pb2.DecryptRequest(ciphertext=answer.ciphertext))
        expect(holds=opened.plaintext == PLAINTEXT, what="a ciphertext holds another plaintext")

    return Calls(crypto.Encrypt, lambda: request, check, prove)


def _decrypt(crypto: Any, known: Known) -> Calls:  # noqa: ANN401  # as above
    request = crypto_pb2.DecryptRequest(ciphertext=known.ciphertext)

    def check(answer: crypto_pb2.DecryptResponse) -> None:
        expect(holds=answer.plaintext == PLAINTEXT, what="decrypted to another plaintext")

    async def prove(answer: crypto_pb2.DecryptResponse) -> None:
        check(answer)

    return Calls(crypto.Decrypt, lambda: request, check, prove)


def _data_key(crypto: Any) -> Calls:  # noqa: ANN401  # as above
    request = crypto_pb2.GenerateDataKeyRequest(key=AES)

    def check(answer: crypto_pb2.GenerateDataKeyResponse) -> None:
        expect(holds=len(answer.plaintext) == 32 and len(answer.ciphertext) > 60, what="a data key is missing")

    async def prove(answer: crypto_pb2.GenerateDataKeyResponse) -> None:
        opened = await crypto.Decrypt(crypto_pb2.DecryptRequest(ciphertext=answer.ciphertext))
        expect(holds=opened.plaintext == answer.plaintext, what="an encrypted data key holds another")

    return Calls(crypto.GenerateDataKey, lambda: request, check, prove)


def _create(keys: Any) -> Calls:  # noqa: ANN401  # as above
    def request() -> keys_pb2.CreateKeyRequest:
        return keys_pb2.CreateKeyRequest(
            name=f"made-{uuid4().hex}", type=keys_pb2.KEY_TYPE_SECP256K1, purpose=keys_pb2.KEY_PURPOSE_SIGNING
        )

    def check(answer: keys_pb2.CreateKeyResponse) -> None:
        is_made = answer.key.custody == keys_pb2.CUSTODY_WRAPPED and answer.key.state == keys_pb2.KEY_STATE_ACTIVE
        expect(holds=is_made, what="a key is not active and wrapped")

    async def prove(answer: keys_pb2.CreateKeyResponse) -> None:
        found = await keys.GetKey(keys_pb2.GetKeyRequest(key=answer.key.id))
        expect(holds=found.key.public_key_pem == answer.key.public_key_pem, what="a key was not stored")

    return Calls(keys.CreateKey, request, check, prove)


def _batch(one: Calls, operation: str, crypto: Any) -> Calls:  # noqa: ANN401  # as above
    method, kind = _batch_form(operation, crypto)
    request = kind(items=[one.request()] * BATCH_ITEMS)

    def check(answer: Any) -> None:  # noqa: ANN401  # one of three responses
        expect(holds=len(answer.items) == BATCH_ITEMS, what="a batch was answered in part")
        for item in answer.items:
            expect(holds=item.WhichOneof("outcome") == "result", what="an item of a batch was refused")
            one.check(item.result)

    async def prove(answer: Any) -> None:  # noqa: ANN401  # as above
        for item in (answer.items[0], answer.items[-1]):
            await one.prove(item.result)

    return Calls(method, lambda: request, check, prove, BATCH_ITEMS)


def _batch_form(operation: str, crypto: Any) -> tuple[Callable[..., Awaitable[Any]], Callable[..., Any]]:  # noqa: ANN401  # as above
    match operation.split("-")[1]:
        case "sign":
            return crypto.BatchSign, crypto_pb2.BatchSignRequest
        case "encrypt":
            return crypto.BatchEncrypt, crypto_pb2.BatchEncryptRequest
        case _:
            return crypto.BatchDecrypt, crypto_pb2.BatchDecryptRequest
