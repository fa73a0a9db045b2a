"""Encrypt, Decrypt, data keys and random bytes."""

import uuid
from collections.abc import Callable

import grpc
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from kms.v1 import crypto_pb2 as cpb
from tests.conformance.refusals import refusal
from tests.conformance.requests import made
from tests.fixtures.server import Caller

SECRET = b"\x00 a secret \xff"


@pytest.mark.parametrize("size_bits", [128, 192, 256])
@pytest.mark.parametrize("plaintext", [b"", SECRET, bytes(65_536)])
@pytest.mark.parametrize("aad", [b"", b"context", bytes(65_536)])
def test_aes_opens_what_it_encrypted_and_finds_its_key_by_itself(
    caller: Caller, size_bits: int, plaintext: bytes, aad: bytes
) -> None:
    key = made(caller, "aes", size_bits=size_bits)
    made_ = caller.crypto.Encrypt(cpb.EncryptRequest(key="k", plaintext=plaintext, aad=aad))
    assert made_.key_id == key.id
    assert made_.ciphertext[:17] == b"\x01" + uuid.UUID(key.id).bytes
    assert len(made_.ciphertext) == len(plaintext) + 45
    opened = caller.crypto.Decrypt(cpb.DecryptRequest(ciphertext=made_.ciphertext, aad=aad))
    assert (opened.plaintext, opened.key_id) == (plaintext, key.id)


def test_a_nonce_never_repeats(caller: Caller) -> None:
    made(caller, "aes")
    request = cpb.BatchEncryptRequest(items=[cpb.EncryptRequest(key="k", plaintext=b"x")] * 200)
    nonces = {item.result.ciphertext[17:29] for item in caller.crypto.BatchEncrypt(request).items}
    assert len(nonces) == 200


def test_each_byte_of_a_ciphertext_matters_and_every_fault_reads_the_same(caller: Caller) -> None:
    made(caller, "aes")
    good = caller.crypto.Encrypt(cpb.EncryptRequest(key="k", plaintext=SECRET, aad=b"a")).ciphertext
    told = set()
    for position in (0, *range(17, len(good))):
        bad = good[:position] + bytes((good[position] ^ 0x80,)) + good[position + 1 :]
        told.add(refusal(caller.crypto.Decrypt, cpb.DecryptRequest(ciphertext=bad, aad=b"a")).message)
    for ciphertext, aad in (
        (good, b""),
        (good, b"b"),
        (good[:-1], b"a"),
        (good + b"\x00", b"a"),
        (good[:45], b"a"),
        (b"\x01", b"a"),
    ):
        found = refusal(caller.crypto.Decrypt, cpb.DecryptRequest(ciphertext=ciphertext, aad=aad))
        assert (found.code, found.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "CIPHERTEXT_INVALID")
        told.add(found.message)
    assert len(told) == 1
    assert caller.crypto.Decrypt(cpb.DecryptRequest(ciphertext=good, aad=b"a")).plaintext == SECRET


def test_a_ciphertext_of_another_key_is_incorrect_for_the_key_named(caller: Caller) -> None:
    for name in ("a", "b"):
        made(caller, "aes", name=name)
    ciphertext = caller.crypto.Encrypt(cpb.EncryptRequest(key="a", plaintext=SECRET)).ciphertext
    assert caller.crypto.Decrypt(cpb.DecryptRequest(ciphertext=ciphertext, key="a")).plaintext == SECRET
    found = refusal(caller.crypto.Decrypt, cpb.DecryptRequest(ciphertext=ciphertext, key="b"))
    assert (found.code, found.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INCORRECT_KEY")


def test_a_ciphertext_moved_to_another_key_does_not_open(caller: Caller) -> None:
    made(caller, "aes", name="a")
    other = made(caller, "aes", name="b")
    ciphertext = caller.crypto.Encrypt(cpb.EncryptRequest(key="a", plaintext=SECRET)).ciphertext
    moved = ciphertext[:1] + uuid.UUID(other.id).bytes + ciphertext[17:]
    assert refusal(caller.crypto.Decrypt, cpb.DecryptRequest(ciphertext=moved)).reason == "CIPHERTEXT_INVALID"


def test_anothers_ciphertext_does_not_open_and_does_not_tell(new_caller: Callable[[], Caller]) -> None:
    ada, bob = new_caller(), new_caller()
    made(ada, "aes")
    ciphertext = ada.crypto.Encrypt(cpb.EncryptRequest(key="k", plaintext=SECRET)).ciphertext
    unknown = ciphertext[:1] + uuid.uuid4().bytes + ciphertext[17:]
    found = refusal(bob.crypto.Decrypt, cpb.DecryptRequest(ciphertext=ciphertext))
    assert found.reason == "KEY_NOT_FOUND"
    assert found == refusal(bob.crypto.Decrypt, cpb.DecryptRequest(ciphertext=unknown))


def test_rsa_opens_what_the_service_encrypted(caller: Caller) -> None:
    key = made(caller, "rsa-encryption")
    made_ = caller.crypto.Encrypt(cpb.EncryptRequest(key="k", plaintext=SECRET))
    assert made_.ciphertext[:17] == b"\x02" + uuid.UUID(key.id).bytes
    assert caller.crypto.Decrypt(cpb.DecryptRequest(ciphertext=made_.ciphertext)).plaintext == SECRET
    bad = made_.ciphertext[:-1] + bytes((made_.ciphertext[-1] ^ 1,))
    assert refusal(caller.crypto.Decrypt, cpb.DecryptRequest(ciphertext=bad)).reason == "CIPHERTEXT_INVALID"


def test_rsa_opens_what_pyca_encrypted_with_the_public_key(caller: Caller) -> None:
    public = load_pem_public_key(made(caller, "rsa-encryption").public_key_pem.encode())
    assert isinstance(public, rsa.RSAPublicKey)
    oaep = padding.OAEP(padding.MGF1(hashes.SHA1()), hashes.SHA1(), None)  # noqa: S303 - all that SoftHSM has
    request = cpb.DecryptRequest(
        key="k",
        ciphertext=public.encrypt(SECRET, oaep),
        format=cpb.CIPHERTEXT_FORMAT_RAW_RSA_OAEP,
        oaep_hash=cpb.HASH_ALGORITHM_SHA_1,
    )
    assert caller.crypto.Decrypt(request).plaintext == SECRET
    request.oaep_hash = cpb.HASH_ALGORITHM_UNSPECIFIED
    assert refusal(caller.crypto.Decrypt, request).metadata == {"field": "oaep_hash"}


def test_an_oaep_hash_that_the_token_lacks_is_refused_by_name_both_ways(caller: Caller) -> None:
    made(caller, "rsa-encryption")
    request = cpb.EncryptRequest(key="k", plaintext=SECRET, oaep_hash=cpb.HASH_ALGORITHM_SHA_512)
    try:
        ciphertext = caller.crypto.Encrypt(request).ciphertext
    except grpc.RpcError:
        found = refusal(caller.crypto.Encrypt, request)
        assert (found.code, found.reason) == (grpc.StatusCode.UNIMPLEMENTED, "HSM_MECHANISM_UNSUPPORTED")
        assert found.metadata["mechanism"] == "CKM_RSA_PKCS_OAEP"
    else:
        assert caller.crypto.Decrypt(cpb.DecryptRequest(ciphertext=ciphertext)).plaintext == SECRET


@pytest.mark.parametrize(
    ("kind", "request_", "field"),
    [
        ("aes", cpb.EncryptRequest(plaintext=bytes(65_537)), "plaintext"),
        ("aes", cpb.EncryptRequest(aad=bytes(65_537)), "aad"),
        ("aes", cpb.EncryptRequest(oaep_hash=cpb.HASH_ALGORITHM_SHA_256), "oaep_hash"),
        ("rsa-encryption", cpb.EncryptRequest(plaintext=bytes(300)), "plaintext"),
        ("rsa-encryption", cpb.EncryptRequest(aad=b"x"), "aad"),
        ("rsa-encryption", cpb.EncryptRequest(oaep_hash=cpb.HASH_ALGORITHM_KECCAK_256), "oaep_hash"),
    ],
)
def test_what_does_not_fit_is_malformed(caller: Caller, kind: str, request_: cpb.EncryptRequest, field: str) -> None:
    made(caller, kind)
    request_.key = "k"
    found = refusal(caller.crypto.Encrypt, request_)
    assert (found.code, found.metadata) == (grpc.StatusCode.INVALID_ARGUMENT, {"field": field})


@pytest.mark.parametrize("kind", ["secp256k1", "ed25519", "rsa"])
def test_a_signing_key_does_not_encrypt(caller: Caller, kind: str) -> None:
    made(caller, kind)
    for call, request in (
        (caller.crypto.Encrypt, cpb.EncryptRequest(key="k", plaintext=b"x")),
        (caller.crypto.GenerateDataKey, cpb.GenerateDataKeyRequest(key="k")),
    ):
        found = refusal(call, request)
        assert (found.code, found.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "WRONG_PURPOSE")


def test_a_data_key_comes_in_the_clear_and_encrypted(caller: Caller) -> None:
    made(caller, "aes")
    for size in (16, 32, 64):
        data_key = caller.crypto.GenerateDataKey(cpb.GenerateDataKeyRequest(key="k", size_bytes=size, aad=b"table 1"))
        assert len(data_key.plaintext) == size
        opened = caller.crypto.Decrypt(cpb.DecryptRequest(ciphertext=data_key.ciphertext, aad=b"table 1"))
        assert opened.plaintext == data_key.plaintext
    assert len(caller.crypto.GenerateDataKey(cpb.GenerateDataKeyRequest(key="k")).plaintext) == 32
    without = caller.crypto.GenerateDataKey(cpb.GenerateDataKeyRequest(key="k", without_plaintext=True))
    assert (without.plaintext, len(without.ciphertext)) == (b"", 77)
    for size in (1, 15, 65, 2**32 - 1):
        assert refusal(caller.crypto.GenerateDataKey, cpb.GenerateDataKeyRequest(key="k", size_bytes=size)).reason == "MALFORMED"


def test_random_bytes_are_as_many_as_asked_for_and_bounded(caller: Caller) -> None:
    for size in (1, 32, 65_536):
        assert len(caller.crypto.GenerateRandom(cpb.GenerateRandomRequest(size_bytes=size)).random) == size
    draws = {caller.crypto.GenerateRandom(cpb.GenerateRandomRequest(size_bytes=16)).random for _ in range(50)}
    assert len(draws) == 50
    for size in (0, 65_537, 2**32 - 1):
        assert refusal(caller.crypto.GenerateRandom, cpb.GenerateRandomRequest(size_bytes=size)).metadata == {
            "field": "size_bytes"
        }


def test_decrypt_needs_the_key_for_a_bare_ciphertext(caller: Caller) -> None:
    request = cpb.DecryptRequest(ciphertext=bytes(256), format=cpb.CIPHERTEXT_FORMAT_RAW_RSA_OAEP)
    assert refusal(caller.crypto.Decrypt, request).metadata == {"field": "key"}
