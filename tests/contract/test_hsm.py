"""The promises of the port `Hsm`, for every implementation."""

import hashlib
import hmac
from dataclasses import replace
from datetime import UTC, datetime
from typing import cast
from uuid import uuid4

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed, encode_dss_signature

from kms.app.ports import Hsm, Sealed
from kms.domain.algorithms import (
    DIGEST_BYTES,
    Hash,
    KeySpec,
    KeyType,
    Purpose,
    Scheme,
    SignatureAlgorithm,
    key_spec,
    signature_algorithm,
)
from kms.domain.envelope import parse_envelope
from kms.domain.errors import KmsError, Reason
from kms.domain.ids import KeyId, UserId
from kms.domain.keys import Custody, HeldKey, KeyIdentity, Origin
from kms.domain.residents import Holdings
from tests.fakes.hsm import FakeHsm
from tests.fixtures.softhsm import OpenHsm

SECP256K1 = key_spec(KeyType.SECP256K1, Purpose.SIGNING, None)
SECP256R1 = key_spec(KeyType.SECP256R1, Purpose.SIGNING, None)
ED25519 = key_spec(KeyType.ED25519, Purpose.SIGNING, None)
RSA_SIGNING = key_spec(KeyType.RSA, Purpose.SIGNING, 2048)
RSA_ENCRYPTION = key_spec(KeyType.RSA, Purpose.ENCRYPTION, 2048)
AES = key_spec(KeyType.AES, Purpose.ENCRYPTION, None)
SIGNING = (SECP256K1, SECP256R1, ED25519, RSA_SIGNING)
ALL = (*SIGNING, RSA_ENCRYPTION, AES)
PYCA = {
    Hash.SHA_1: hashes.SHA1(),  # noqa: S303  # for OAEP
    Hash.SHA_256: hashes.SHA256(),
    Hash.SHA_384: hashes.SHA384(),
    Hash.SHA_512: hashes.SHA512(),
}


@pytest.fixture(params=["fake", "softhsm", "softhsm inline"])
async def hsm(request: pytest.FixtureRequest, opened: OpenHsm) -> Hsm:
    if request.param == "fake":
        return FakeHsm()
    return await opened(inline_p99_seconds=1.0 if "inline" in request.param else 0.0)


def identity_of(spec: KeySpec) -> KeyIdentity:
    return KeyIdentity(KeyId(uuid4()), UserId(uuid4()), spec)


async def new_key(hsm: Hsm, spec: KeySpec, minimum: Custody | None = None) -> HeldKey:
    identity = identity_of(spec)
    return HeldKey(identity, await hsm.generate(identity, hsm.custody_for(spec, minimum)), version=1)


async def use(hsm: Hsm, key: HeldKey) -> None:
    """Do with *key* what it is for, checked from outside."""
    spec = key.identity.spec
    if spec.key_type is KeyType.AES:
        assert await hsm.decrypt(key, await hsm.encrypt(key, b"plain", b"aad"), b"aad") == b"plain"
    elif spec.purpose is Purpose.ENCRYPTION:
        for hash_ in hsm.oaep_hashes():
            assert await hsm.decrypt_rsa(key, hash_, oaep(key, hash_, b"plain")) == b"plain"
    else:
        await sign_and_verify(hsm, key, signature_algorithm(spec.key_type, None, None))


async def sign_and_verify(hsm: Hsm, key: HeldKey, algorithm: SignatureAlgorithm) -> None:
    digest = hashlib.sha512(b"a message").digest()[: DIGEST_BYTES[algorithm.hash] if algorithm.hash else 64]
    check_signature(key, algorithm, digest, await hsm.sign(key, algorithm, digest))


def check_signature(key: HeldKey, algorithm: SignatureAlgorithm, data: bytes, signature: bytes) -> None:
    public = serialization.load_pem_public_key(key.material.public_key.encode())
    if isinstance(public, ed25519.Ed25519PublicKey):
        public.verify(signature, data)
    elif isinstance(public, ec.EllipticCurvePublicKey):
        assert len(signature) == 64
        der = encode_dss_signature(int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big"))
        public.verify(der, data, ec.ECDSA(Prehashed(hashes.SHA256())))
    else:
        hash_ = PYCA[cast("Hash", algorithm.hash)]
        pss = padding.PSS(padding.MGF1(hash_), hash_.digest_size)
        form = pss if algorithm.scheme is Scheme.RSA_PSS else padding.PKCS1v15()
        cast("rsa.RSAPublicKey", public).verify(signature, data, form, Prehashed(hash_))


def oaep(key: HeldKey, hash_: Hash, plaintext: bytes) -> bytes:
    public = cast("rsa.RSAPublicKey", serialization.load_pem_public_key(key.material.public_key.encode()))
    return public.encrypt(plaintext, padding.OAEP(padding.MGF1(PYCA[hash_]), PYCA[hash_], None))


def flipped(data: bytes, position: int = -1) -> bytes:
    return bytes(byte ^ (1 if index == position % len(data) else 0) for index, byte in enumerate(data))


def named(spec: KeySpec) -> str:
    return f"{spec.key_type}-{spec.purpose}-{spec.strength_bits}"


@pytest.mark.parametrize("spec", ALL, ids=named)
async def test_a_new_key_does_what_it_is_for(hsm: Hsm, spec: KeySpec) -> None:
    key = await new_key(hsm, spec)
    await use(hsm, key)
    assert parse_envelope(key.material.envelope).custody is key.material.custody
    assert key.material.hsm_key_id is None


@pytest.mark.parametrize("spec", [SECP256K1, SECP256R1, ED25519, AES], ids=named)
async def test_a_resident_key_works_until_it_is_discarded(hsm: Hsm, spec: KeySpec) -> None:
    key = await new_key(hsm, spec, Custody.RESIDENT)
    assert key.material.custody is Custody.RESIDENT
    assert key.material.hsm_key_id is not None
    await use(hsm, key)
    assert key.material.hsm_key_id in await hsm.residents()
    await hsm.discard(key.identity.key_id, "")
    assert key.material.hsm_key_id not in await hsm.residents()
    with pytest.raises(KmsError) as caught:
        await use(hsm, replace(key, version=2))
    assert caught.value.reason is Reason.ENVELOPE_INVALID


async def test_a_resident_key_has_a_mark_until_it_is_confirmed(hsm: Hsm) -> None:
    before = datetime.now(UTC)
    key = await new_key(hsm, AES, Custody.RESIDENT)
    held = await hsm.holdings()
    assert held.objects == {key.identity.key_id: ""}
    made_at = held.marks[key.identity.key_id].made_at
    assert made_at is not None
    assert before <= made_at <= datetime.now(UTC)
    for _ in range(2):
        await hsm.confirm(key.identity.key_id)
        assert await hsm.holdings() == Holdings({key.identity.key_id: ""}, {})
    await use(hsm, key)


async def test_an_abandoned_key_is_removed_with_its_mark_and_a_confirmed_one_stays(hsm: Hsm) -> None:
    kept, left = [await new_key(hsm, SECP256K1, Custody.RESIDENT) for _ in range(2)]
    await hsm.confirm(kept.identity.key_id)
    for key in (kept, left, left):
        await hsm.abandon(key.identity.key_id)
    assert await hsm.holdings() == Holdings({kept.identity.key_id: ""}, {})
    await use(hsm, kept)
    with pytest.raises(KmsError) as caught:
        await hsm.confirm(left.identity.key_id)
    assert caught.value.reason is Reason.HSM_UNAVAILABLE


async def test_a_bound_key_is_never_discarded(hsm: Hsm) -> None:
    identity = replace(identity_of(ED25519), bound_to="audit")
    key = HeldKey(identity, await hsm.generate(identity, Custody.RESIDENT), version=1)
    await hsm.confirm(identity.key_id)
    plain = await new_key(hsm, ED25519, Custody.RESIDENT)
    await hsm.confirm(plain.identity.key_id)
    # Neither where the token says what it is bound to, nor where only the record does: older tokens do not say it.
    for key_id, bound_to in ((identity.key_id, ""), (identity.key_id, "audit"), (plain.identity.key_id, "audit")):
        with pytest.raises(KmsError) as caught:
            await hsm.discard(key_id, bound_to)
        assert caught.value.reason is Reason.WRONG_PURPOSE
    assert (await hsm.holdings()).objects == {identity.key_id: "audit", plain.identity.key_id: ""}
    await use(hsm, key)


async def test_a_bound_key_whose_creation_failed_is_removed(hsm: Hsm) -> None:
    identity = replace(identity_of(ED25519), bound_to="audit")
    await hsm.generate(identity, Custody.RESIDENT)
    await hsm.abandon(identity.key_id)
    assert await hsm.holdings() == Holdings({}, {})


async def test_an_envelope_opens_for_its_own_record_alone(hsm: Hsm) -> None:
    key, other = [await new_key(hsm, SECP256R1, Custody.RESIDENT) for _ in range(2)]
    assert await hsm.opens(key)
    assert not await hsm.opens(replace(key, identity=other.identity))
    assert not await hsm.opens(replace(key, material=other.material))
    assert not await hsm.opens(replace(key, material=replace(key.material, public_key=other.material.public_key)))
    assert not await hsm.opens(replace(key, identity=replace(key.identity, bound_to="audit")))
    assert not await hsm.opens(replace(key, material=replace(key.material, envelope="")))
    await hsm.abandon(key.identity.key_id)
    assert not await hsm.opens(key)


@pytest.mark.parametrize("bits", [128, 192, 256])
async def test_an_aes_key_of_each_size_encrypts_whatever_length(hsm: Hsm, bits: int) -> None:
    key = await new_key(hsm, key_spec(KeyType.AES, Purpose.ENCRYPTION, bits))
    assert len(key.material.public_key) == len("kcv:") + 6
    for size in (0, 1, 16, 1000, 100_000):
        sealed = await hsm.encrypt(key, bytes(size), b"aad")
        assert (len(sealed.nonce), len(sealed.body)) == (12, size + 16)
        assert await hsm.decrypt(key, sealed, b"aad") == bytes(size)


async def test_each_encryption_has_a_nonce_of_its_own(hsm: Hsm) -> None:
    key = await new_key(hsm, AES)
    assert len({(await hsm.encrypt(key, b"same", b"aad")).nonce for _ in range(50)}) == 50


@pytest.mark.parametrize("fault", ["nonce", "body", "tag", "aad", "short", "empty", "nonce length"])
async def test_an_altered_ciphertext_does_not_open(hsm: Hsm, fault: str) -> None:
    key = await new_key(hsm, AES)
    sealed = await hsm.encrypt(key, b"plaintext", b"aad")
    altered = {
        "nonce": Sealed(flipped(sealed.nonce), sealed.body),
        "body": Sealed(sealed.nonce, flipped(sealed.body, 0)),
        "tag": Sealed(sealed.nonce, flipped(sealed.body)),
        "aad": sealed,
        "short": Sealed(sealed.nonce, sealed.body[:-1]),
        "empty": Sealed(sealed.nonce, b""),
        "nonce length": Sealed(sealed.nonce[:-1], sealed.body),
    }[fault]
    with pytest.raises(KmsError) as caught:
        await hsm.decrypt(key, altered, b"other" if fault == "aad" else b"aad")
    assert caught.value.reason is Reason.CIPHERTEXT_INVALID
    assert await hsm.decrypt(key, sealed, b"aad") == b"plaintext"


async def test_a_ciphertext_opens_with_its_own_key_only(hsm: Hsm) -> None:
    key, other = await new_key(hsm, AES), await new_key(hsm, AES)
    sealed = await hsm.encrypt(key, b"plaintext", b"aad")
    with pytest.raises(KmsError) as caught:
        await hsm.decrypt(other, sealed, b"aad")
    assert caught.value.reason is Reason.CIPHERTEXT_INVALID


async def test_associated_data_is_never_empty(hsm: Hsm) -> None:
    key = await new_key(hsm, AES)
    for call in (hsm.encrypt(key, b"x", b""), hsm.decrypt(key, Sealed(bytes(12), bytes(20)), b"")):
        with pytest.raises(KmsError) as caught:
            await call
        assert caught.value.reason is Reason.MALFORMED


@pytest.mark.parametrize("fault", ["bit", "short", "long", "zero"])
async def test_an_altered_rsa_ciphertext_does_not_open(hsm: Hsm, fault: str) -> None:
    key = await new_key(hsm, RSA_ENCRYPTION)
    hash_ = min(hsm.oaep_hashes())
    body = oaep(key, hash_, b"plaintext")
    altered = {"bit": flipped(body, 100), "short": body[1:], "long": body + b"\0", "zero": bytes(len(body))}[fault]
    with pytest.raises(KmsError) as caught:
        await hsm.decrypt_rsa(key, hash_, altered)
    assert caught.value.reason is Reason.CIPHERTEXT_INVALID
    assert await hsm.decrypt_rsa(key, hash_, body) == b"plaintext"


async def test_an_oaep_hash_that_is_not_offered_is_unsupported_not_invalid(hsm: Hsm) -> None:
    key = await new_key(hsm, RSA_ENCRYPTION)
    with pytest.raises(KmsError) as caught:
        await hsm.decrypt_rsa(key, Hash.SHA_512, oaep(key, Hash.SHA_512, b"x"))
    assert caught.value.reason is Reason.HSM_MECHANISM_UNSUPPORTED


@pytest.mark.parametrize("scheme", [Scheme.RSA_PKCS1, Scheme.RSA_PSS])
async def test_an_rsa_key_signs_with_each_scheme_and_hash(hsm: Hsm, scheme: Scheme) -> None:
    key = await new_key(hsm, RSA_SIGNING)
    for hash_ in (Hash.SHA_256, Hash.SHA_384, Hash.SHA_512):
        await sign_and_verify(hsm, key, SignatureAlgorithm(scheme, hash_))


@pytest.mark.parametrize("spec", [SECP256K1, SECP256R1], ids=named)
async def test_ecdsa_signs_a_digest_of_each_hash(hsm: Hsm, spec: KeySpec) -> None:
    key = await new_key(hsm, spec)
    for hash_ in (Hash.SHA_256, Hash.SHA3_256, Hash.KECCAK_256):
        await sign_and_verify(hsm, key, SignatureAlgorithm(Scheme.ECDSA, hash_))


@pytest.mark.parametrize("message", [b"", b"x", b"m" * 10_000])
async def test_ed25519_signs_the_message_itself(hsm: Hsm, message: bytes) -> None:
    key = await new_key(hsm, ED25519)
    algorithm = SignatureAlgorithm(Scheme.ED25519, None)
    check_signature(key, algorithm, message, await hsm.sign(key, algorithm, message))


@pytest.mark.parametrize("spec", [SECP256K1, SECP256R1, RSA_SIGNING], ids=named)
@pytest.mark.parametrize("size", [0, 20, 31, 33, 64])
async def test_a_digest_of_another_length_is_refused(hsm: Hsm, spec: KeySpec, size: int) -> None:
    key = await new_key(hsm, spec)
    with pytest.raises(KmsError) as caught:
        await hsm.sign(key, signature_algorithm(spec.key_type, None, None), bytes(size))
    assert caught.value.reason is Reason.DIGEST_LENGTH


@pytest.mark.parametrize(
    ("spec", "scheme"),
    [
        (RSA_SIGNING, Scheme.ECDSA),
        (SECP256K1, Scheme.RSA_PKCS1),
        (SECP256R1, Scheme.ED25519),
        (ED25519, Scheme.ECDSA),
        (AES, Scheme.ECDSA),
        (RSA_ENCRYPTION, Scheme.RSA_PSS),
    ],
)
async def test_a_key_signs_only_as_its_type_and_purpose_allow(hsm: Hsm, spec: KeySpec, scheme: Scheme) -> None:
    key = await new_key(hsm, spec)
    algorithm = SignatureAlgorithm(scheme, None if scheme is Scheme.ED25519 else Hash.SHA_256)
    with pytest.raises(KmsError) as caught:
        await hsm.sign(key, algorithm, bytes(32))
    assert caught.value.reason is Reason.WRONG_PURPOSE


@pytest.mark.parametrize("spec", [SECP256K1, RSA_SIGNING], ids=named)
async def test_a_signing_key_neither_encrypts_nor_decrypts(hsm: Hsm, spec: KeySpec) -> None:
    key = await new_key(hsm, spec)
    sealed = Sealed(bytes(12), bytes(32))
    for call in (hsm.encrypt(key, b"x", b"aad"), hsm.decrypt(key, sealed, b"aad"), hsm.decrypt_rsa(key, Hash.SHA_1, bytes(256))):
        with pytest.raises(KmsError) as caught:
            await call
        assert caught.value.reason is Reason.WRONG_PURPOSE


@pytest.mark.parametrize("attribute", ["key_id", "owner_id", "bound_to", "origin", "spec", "public_key", "custody"])
async def test_an_envelope_is_bound_to_every_fixed_attribute_of_its_row(hsm: Hsm, attribute: str) -> None:
    key, other = await new_key(hsm, SECP256R1), await new_key(hsm, SECP256R1)
    edited = {
        "key_id": replace(key, identity=replace(key.identity, key_id=KeyId(uuid4()))),
        "owner_id": replace(key, identity=replace(key.identity, owner_id=UserId(uuid4()))),
        "bound_to": replace(key, identity=replace(key.identity, bound_to="audit")),
        "origin": replace(key, identity=replace(key.identity, origin=Origin.IMPORTED)),
        "spec": replace(key, identity=replace(key.identity, spec=SECP256K1)),
        "public_key": replace(key, material=replace(key.material, public_key=other.material.public_key)),
        "custody": replace(key, material=replace(key.material, custody=Custody.SEALED)),
    }[attribute]
    with pytest.raises(KmsError) as caught:
        await use(hsm, edited)
    assert caught.value.reason is Reason.ENVELOPE_INVALID
    await use(hsm, key)


@pytest.mark.parametrize("spec", [SECP256K1, ED25519, AES], ids=named)
async def test_a_row_copied_over_another_does_not_open(hsm: Hsm, spec: KeySpec) -> None:
    key, other = await new_key(hsm, spec), await new_key(hsm, spec)
    await use(hsm, key)  # loaded before the row changes: a cached handle must not be used for another row
    with pytest.raises(KmsError) as caught:
        await use(hsm, replace(key, material=other.material))
    assert caught.value.reason is Reason.ENVELOPE_INVALID


async def test_a_key_sealed_by_a_key_that_is_not_here_is_missing_not_invalid(hsm: Hsm) -> None:
    key = await new_key(hsm, AES)
    envelope = replace(parse_envelope(key.material.envelope), sealing_key_id=uuid4())
    with pytest.raises(KmsError) as caught:
        await use(hsm, replace(key, material=replace(key.material, envelope=envelope.encode())))
    assert caught.value.reason is Reason.HSM_KEK_MISSING


@pytest.mark.parametrize("size", [1, 12, 32, 65_536])
async def test_random_bytes_have_the_length_asked_for(hsm: Hsm, size: int) -> None:
    first, second = await hsm.random(size), await hsm.random(size)
    assert len(first) == len(second) == size
    assert size < 12 or first != second


@pytest.mark.parametrize("size", [-1, 0, 65_537])
async def test_a_length_out_of_range_is_refused(hsm: Hsm, size: int) -> None:
    with pytest.raises(KmsError) as caught:
        await hsm.random(size)
    assert caught.value.reason is Reason.MALFORMED


@pytest.mark.parametrize("size", [1, 64, 65, 100_000, 1024 * 1024])
async def test_a_mac_is_the_same_each_time_and_another_for_other_data(hsm: Hsm, size: int) -> None:
    data = bytes(size)
    mac = await hsm.mac(data)
    assert len(mac) == 32
    assert mac == await hsm.mac(data)
    assert mac not in (await hsm.mac(flipped(data)), await hsm.mac(flipped(data, 0)))
    assert mac not in (hashlib.sha256(data).digest(), hmac.digest(bytes(32), data, "sha256"))


@pytest.mark.parametrize("size", [0, 1024 * 1024 + 1])
async def test_data_of_no_length_or_too_much_has_no_mac(hsm: Hsm, size: int) -> None:
    with pytest.raises(KmsError) as caught:
        await hsm.mac(bytes(size))
    assert caught.value.reason is Reason.MALFORMED


@pytest.mark.parametrize("spec", ALL, ids=named)
def test_custody_is_resident_only_when_asked_for(hsm: Hsm, spec: KeySpec) -> None:
    assert hsm.custody_for(spec, None) is not Custody.RESIDENT
    assert hsm.custody_for(spec, Custody.RESIDENT) is Custody.RESIDENT
