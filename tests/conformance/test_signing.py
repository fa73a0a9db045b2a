"""Sign and Verify, judged by openssl, pyca, coincurve and eth-keys."""

import hashlib
import itertools
import subprocess
from pathlib import Path

import coincurve
import eth_keys.datatypes
import grpc
import pytest
from Crypto.Hash import keccak
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa, utils
from cryptography.hazmat.primitives.serialization import load_der_public_key

from kms.v1 import crypto_pb2 as cpb
from kms.v1 import keys_pb2 as kpb
from tests.conformance.refusals import refusal
from tests.conformance.requests import create, made
from tests.fixtures.server import Caller

MESSAGE = b"pay 5 to Bob"
ORDERS = {
    "secp256k1": 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141,
    "secp256r1": 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551,
}
RSA_HASHES = {
    cpb.HASH_ALGORITHM_SHA_256: hashes.SHA256(),
    cpb.HASH_ALGORITHM_SHA_384: hashes.SHA384(),
    cpb.HASH_ALGORITHM_SHA_512: hashes.SHA512(),
}


def public_key(caller: Caller) -> object:
    return load_der_public_key(caller.keys.GetPublicKey(kpb.GetPublicKeyRequest(key="k")).public_key_der)


def keccak_256(message: bytes) -> bytes:
    return bytes(keccak.new(digest_bits=256, data=message).digest())


def is_valid(caller: Caller, request: cpb.SignRequest, signature: bytes, *, require_low_s: bool = False) -> bool:
    verify = cpb.VerifyRequest(key="k", signature=signature, require_low_s=require_low_s)
    verify.scheme, verify.hash, verify.format = request.scheme, request.hash, request.format
    if request.WhichOneof("input") == "digest":
        verify.digest = request.digest
    else:
        verify.message = request.message
    return caller.crypto.Verify(verify).valid


@pytest.mark.parametrize("kind", ["secp256k1", "secp256r1", "ed25519", "rsa"])
def test_openssl_verifies_what_the_service_signed(caller: Caller, kind: str, tmp_path: Path) -> None:
    pem = made(caller, kind).public_key_pem
    signature = caller.crypto.Sign(cpb.SignRequest(key="k", message=MESSAGE)).signature
    for name, content in (("key.pem", pem.encode()), ("signature", signature), ("message", MESSAGE)):
        (tmp_path / name).write_bytes(content)
    options = {
        "ed25519": ["-rawin"],
        "rsa": ["-rawin", "-digest", "sha256", "-pkeyopt", "rsa_padding_mode:pss", "-pkeyopt", "rsa_pss_saltlen:digest"],
    }.get(kind, ["-rawin", "-digest", "sha256"])
    command = [
        "openssl",
        "pkeyutl",
        "-verify",
        "-pubin",
        "-inkey",
        "key.pem",
        "-sigfile",
        "signature",
        "-in",
        "message",
        *options,
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (tmp_path / "message").write_bytes(MESSAGE + b"!")
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode != 0


@pytest.mark.parametrize("curve", ["secp256k1", "secp256r1"])
@pytest.mark.parametrize(
    ("hash_", "digest"),
    [
        (cpb.HASH_ALGORITHM_SHA_256, hashlib.sha256(MESSAGE).digest()),
        (cpb.HASH_ALGORITHM_SHA3_256, hashlib.sha3_256(MESSAGE).digest()),
        (cpb.HASH_ALGORITHM_KECCAK_256, keccak_256(MESSAGE)),
    ],
)
def test_ecdsa_signs_the_message_and_its_digest_alike(
    caller: Caller, curve: str, hash_: "cpb.HashAlgorithm.ValueType", digest: bytes
) -> None:
    made(caller, curve)
    public = public_key(caller)
    assert isinstance(public, ec.EllipticCurvePublicKey)
    for request in (cpb.SignRequest(key="k", message=MESSAGE, hash=hash_), cpb.SignRequest(key="k", digest=digest, hash=hash_)):
        response = caller.crypto.Sign(request)
        assert (response.scheme, response.hash) == (cpb.SIGNATURE_SCHEME_ECDSA, hash_)
        public.verify(response.signature, digest, ec.ECDSA(utils.Prehashed(hashes.SHA256())))
        assert is_valid(caller, request, response.signature)
        assert not is_valid(caller, cpb.SignRequest(digest=bytes(32), hash=hash_), response.signature)


@pytest.mark.parametrize("scheme", [cpb.SIGNATURE_SCHEME_RSA_PSS, cpb.SIGNATURE_SCHEME_RSA_PKCS1])
def test_rsa_signs_with_each_padding_and_hash(caller: Caller, scheme: "cpb.SignatureScheme.ValueType") -> None:
    made(caller, "rsa")
    public = public_key(caller)
    assert isinstance(public, rsa.RSAPublicKey)
    for number, algorithm in RSA_HASHES.items():
        digester = hashes.Hash(algorithm)
        digester.update(MESSAGE)
        pad = (
            padding.PSS(padding.MGF1(algorithm), algorithm.digest_size)
            if scheme == cpb.SIGNATURE_SCHEME_RSA_PSS
            else padding.PKCS1v15()
        )
        for request in (
            cpb.SignRequest(key="k", message=MESSAGE, scheme=scheme, hash=number),
            cpb.SignRequest(key="k", digest=digester.copy().finalize(), scheme=scheme, hash=number),
        ):
            signature = caller.crypto.Sign(request).signature
            public.verify(signature, MESSAGE, pad, algorithm)
            assert is_valid(caller, request, signature)


def test_ed25519_signs_the_message_itself(caller: Caller) -> None:
    made(caller, "ed25519")
    public = public_key(caller)
    assert isinstance(public, ed25519.Ed25519PublicKey)
    for message in (b"", MESSAGE, bytes(65_536)):
        request = cpb.SignRequest(key="k", message=message)
        signature = caller.crypto.Sign(request).signature
        public.verify(signature, message)
        assert is_valid(caller, request, signature)
        with pytest.raises(InvalidSignature):
            public.verify(signature, message + b"!")
    assert refusal(caller.crypto.Sign, cpb.SignRequest(key="k", digest=bytes(32))).metadata == {"field": "digest"}


def test_recoverable_signatures_give_ethereum_the_right_address(caller: Caller) -> None:
    made(caller, "secp256k1")
    public = public_key(caller)
    assert isinstance(public, ec.EllipticCurvePublicKey)
    numbers = public.public_numbers()
    expected = numbers.x.to_bytes(32, "big") + numbers.y.to_bytes(32, "big")
    request = cpb.SignRequest(
        key="k", message=MESSAGE, hash=cpb.HASH_ALGORITHM_KECCAK_256, format=cpb.SIGNATURE_FORMAT_RECOVERABLE
    )
    signature = caller.crypto.Sign(request).signature
    found = eth_keys.datatypes.Signature(signature).recover_public_key_from_msg_hash(keccak_256(MESSAGE))
    assert found.to_bytes() == expected
    assert is_valid(caller, request, signature)
    other_v = signature[:-1] + bytes((signature[-1] ^ 1,))
    assert not is_valid(caller, request, other_v)


def test_a_thousand_ecdsa_signatures_are_low_s_and_recover_to_the_right_key(caller: Caller) -> None:
    key = made(caller, "secp256k1")
    expected = coincurve.PublicKey(_point(public_key(caller)))
    seen = 0
    for batch in range(4):
        digests = [hashlib.sha256(f"{batch} {number}".encode()).digest() for number in range(250)]
        items = [cpb.SignRequest(key=key.id, digest=digest, format=cpb.SIGNATURE_FORMAT_RECOVERABLE) for digest in digests]
        answers = caller.crypto.BatchSign(cpb.BatchSignRequest(items=items), timeout=60).items
        for digest, answer in zip(digests, answers, strict=True):
            signature = answer.result.signature
            assert len(signature) == 65
            assert int.from_bytes(signature[32:64], "big") <= ORDERS["secp256k1"] // 2
            assert coincurve.PublicKey.from_signature_and_message(signature, digest, hasher=None) == expected
            seen += 1
    assert seen == 1000


def _point(public: object) -> bytes:
    assert isinstance(public, ec.EllipticCurvePublicKey)
    numbers = public.public_numbers()
    return b"\x04" + numbers.x.to_bytes(32, "big") + numbers.y.to_bytes(32, "big")


@pytest.mark.parametrize("curve", ["secp256k1", "secp256r1"])
def test_verify_takes_high_s_unless_low_s_is_required(caller: Caller, curve: str) -> None:
    made(caller, curve)
    request = cpb.SignRequest(key="k", message=MESSAGE, format=cpb.SIGNATURE_FORMAT_RAW)
    low = caller.crypto.Sign(request).signature
    high = low[:32] + (ORDERS[curve] - int.from_bytes(low[32:], "big")).to_bytes(32, "big")
    assert [
        is_valid(caller, request, each, require_low_s=strict) for each, strict in itertools.product((low, high), (False, True))
    ] == [
        True,
        True,
        True,
        False,
    ]


def test_a_signature_that_is_not_in_the_format_is_malformed(caller: Caller) -> None:
    made(caller, "secp256k1")
    for signature, form in (
        (b"", cpb.SIGNATURE_FORMAT_DER),
        (bytes(64), cpb.SIGNATURE_FORMAT_RAW),
        (bytes(63), cpb.SIGNATURE_FORMAT_RAW),
        (b"\x01" * 64 + b"\x04", cpb.SIGNATURE_FORMAT_RECOVERABLE),
        (b"\x30\x06\x02\x01\x01\x02\x01\x01\x00", cpb.SIGNATURE_FORMAT_DER),
        (bytes(1025), cpb.SIGNATURE_FORMAT_DER),
    ):
        found = refusal(caller.crypto.Verify, cpb.VerifyRequest(key="k", message=MESSAGE, signature=signature, format=form))
        assert (found.code, found.reason, found.metadata) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            "MALFORMED",
            {"field": "signature"},
        )


@pytest.mark.parametrize("size", [0, 1, 20, 31, 33, 48, 64])
def test_a_digest_of_another_length_is_refused(caller: Caller, size: int) -> None:
    made(caller, "secp256k1")
    found = refusal(caller.crypto.Sign, cpb.SignRequest(key="k", digest=bytes(size)))
    assert (found.code, found.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "DIGEST_LENGTH")


@pytest.mark.parametrize(
    ("kind", "request_"),
    [
        ("aes", cpb.SignRequest(message=MESSAGE)),
        ("rsa-encryption", cpb.SignRequest(message=MESSAGE)),
        ("secp256k1", cpb.SignRequest(message=MESSAGE, scheme=cpb.SIGNATURE_SCHEME_RSA_PSS)),
        ("rsa", cpb.SignRequest(message=MESSAGE, scheme=cpb.SIGNATURE_SCHEME_ECDSA)),
    ],
)
def test_a_key_that_does_not_sign_so_says_wrong_purpose(caller: Caller, kind: str, request_: cpb.SignRequest) -> None:
    made(caller, kind)
    request_.key = "k"
    found = refusal(caller.crypto.Sign, request_)
    assert (found.code, found.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "WRONG_PURPOSE")


@pytest.mark.parametrize(
    ("kind", "request_", "field"),
    [
        ("secp256k1", cpb.SignRequest(message=MESSAGE, hash=cpb.HASH_ALGORITHM_SHA_512), "hash"),
        ("rsa", cpb.SignRequest(message=MESSAGE, hash=cpb.HASH_ALGORITHM_KECCAK_256), "hash"),
        ("ed25519", cpb.SignRequest(message=MESSAGE, hash=cpb.HASH_ALGORITHM_SHA_256), "hash"),
        ("ed25519", cpb.SignRequest(message=MESSAGE, format=cpb.SIGNATURE_FORMAT_DER), "format"),
        ("secp256r1", cpb.SignRequest(message=MESSAGE, format=cpb.SIGNATURE_FORMAT_RECOVERABLE), "format"),
        ("secp256k1", cpb.SignRequest(), "input"),
        ("secp256k1", cpb.SignRequest(message=bytes(65_537)), "message"),
    ],
)
def test_what_does_not_fit_the_algorithm_is_malformed(caller: Caller, kind: str, request_: cpb.SignRequest, field: str) -> None:
    made(caller, kind)
    request_.key = "k"
    found = refusal(caller.crypto.Sign, request_)
    assert (found.code, found.reason, found.metadata) == (grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED", {"field": field})


def test_rsa_4096_signs_while_another_is_being_made(caller: Caller) -> None:
    made(caller, "ed25519")
    slow = caller.keys.CreateKey.future(create("rsa", name="slow", size_bits=4096), timeout=60)
    while not slow.done():
        caller.crypto.Sign(cpb.SignRequest(key="k", message=MESSAGE), timeout=2)
    assert slow.result().key.size_bits == 4096
    assert len(caller.crypto.Sign(cpb.SignRequest(key="slow", message=MESSAGE)).signature) == 512
