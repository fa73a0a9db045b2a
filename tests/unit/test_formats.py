"""Envelopes and ciphertexts: golden vectors, round trips, and whatever does not fit refused."""

import base64
import hashlib
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kms.domain.algorithms import Hash, KeyType, Purpose, key_spec
from kms.domain.ciphertext import AesCiphertext, RsaCiphertext, ciphertext_aad, parse_ciphertext
from kms.domain.envelope import Envelope, associated_data, lengths_prefixed, parse_envelope
from kms.domain.errors import KmsError, Reason
from kms.domain.ids import KeyId, UserId
from kms.domain.keys import Custody, KeyIdentity

_KEY = KeyId(UUID("00112233-4455-6677-8899-aabbccddeeff"))
_OWNER = UserId(UUID("ffeeddcc-bbaa-9988-7766-554433221100"))
_KEK = UUID(int=1)
_SEALING = UUID(int=2)
_GOLDEN = Envelope(Custody.WRAPPED, _KEK, _SEALING, bytes(range(12)), b"\xaa" * 40)


def test_the_envelope_of_the_formats_page() -> None:
    expected = "01" + "02" + "00" * 15 + "01" + "00" * 15 + "02" + "000102030405060708090a0b" + "aa" * 40
    assert base64.b64decode(_GOLDEN.encode()).hex() == expected
    assert parse_envelope(_GOLDEN.encode()) == _GOLDEN


def test_the_associated_data_of_the_formats_page() -> None:
    identity = KeyIdentity(_KEY, _OWNER, key_spec(KeyType.SECP256K1, Purpose.SIGNING, None))
    data = associated_data(identity, custody=Custody.WRAPPED, public_key="PEM", sealing_key_id=_SEALING, kek_id=_KEK)
    expected = (
        "00000003" + b"key".hex() + "0000000101"
        "00000010" + "00112233445566778899aabbccddeeff" + "00000010" + "ffeeddccbbaa99887766554433221100"
        "00000009" + b"secp256k1".hex() + "00000009" + b"secp256k1".hex() + "00000003" + b"256".hex()
        + "00000007" + b"signing".hex() + "00000000" + "00000007" + b"WRAPPED".hex() + "00000009" + b"GENERATED".hex()
        + "00000010" + "00" * 15 + "01" + "00000010" + "00" * 15 + "02"
        + "00000020" + hashlib.sha256(b"PEM").hexdigest()
    )  # fmt: skip
    assert data.hex() == expected


def test_every_bound_attribute_changes_the_associated_data() -> None:
    values = {
        "key": _KEY, "owner": _OWNER, "type": KeyType.RSA, "purpose": Purpose.SIGNING, "bits": 2048, "bound_to": "",
        "custody": Custody.WRAPPED, "pem": "PEM", "kek": _KEK, "sealing": _SEALING,
    }  # fmt: skip

    def bound(**changes: object) -> bytes:
        row = {name: str(value) for name, value in (values | changes).items()}
        spec = key_spec(KeyType(row["type"]), Purpose(row["purpose"]), int(row["bits"]))
        identity = KeyIdentity(KeyId(UUID(row["key"])), UserId(UUID(row["owner"])), spec, row["bound_to"])
        return associated_data(
            identity,
            custody=Custody(row["custody"]),
            public_key=row["pem"],
            sealing_key_id=UUID(row["sealing"]),
            kek_id=UUID(row["kek"]),
        )

    changed = [
        bound(),
        bound(key=_OWNER),
        bound(owner=_KEY),
        bound(purpose=Purpose.ENCRYPTION),
        bound(bits=4096),
        bound(type=KeyType.AES, purpose=Purpose.ENCRYPTION, bits=256),
        bound(bound_to="ca"),
        bound(custody=Custody.SEALED),
        bound(pem="PEM2"),
        bound(kek=_SEALING),
        bound(sealing=_KEK),
    ]
    assert len(set(changed)) == len(changed)


@given(st.text(max_size=200))
def test_any_text_is_an_envelope_or_invalid(text: str) -> None:
    try:
        assert parse_envelope(text).encode() == text
    except KmsError as error:
        assert error.reason is Reason.ENVELOPE_INVALID


def test_an_envelope_cut_anywhere_never_raises_anything_else() -> None:
    text = _GOLDEN.encode()
    for length in range(len(text)):
        try:
            assert parse_envelope(text[:length]) != _GOLDEN
        except KmsError as error:
            assert error.reason is Reason.ENVELOPE_INVALID


@given(st.lists(st.binary(max_size=8), max_size=5), st.lists(st.binary(max_size=8), max_size=5))
def test_two_lists_of_parts_never_give_the_same_bytes(one: list[bytes], other: list[bytes]) -> None:
    assert (lengths_prefixed(*one) == lengths_prefixed(*other)) == (one == other)


def test_the_ciphertexts_of_the_formats_page() -> None:
    aes = AesCiphertext(_KEY, bytes(12), b"\xbb" * 20)
    assert aes.encode().hex() == "01" + "00112233445566778899aabbccddeeff" + "00" * 12 + "bb" * 20
    rsa = RsaCiphertext(_KEY, Hash.SHA_1, b"\xcc" * 256)
    assert rsa.encode().hex() == "02" + "00112233445566778899aabbccddeeff" + "01" + "cc" * 256
    assert (
        ciphertext_aad(_KEY, b"xy").hex() == "0000000101" + "00000010" + "00112233445566778899aabbccddeeff" + "00000002" + "7879"
    )


@given(st.binary(max_size=80))
def test_any_bytes_are_a_ciphertext_or_invalid(data: bytes) -> None:
    try:
        assert parse_ciphertext(data).encode() == data
    except KmsError as error:
        assert error.reason is Reason.CIPHERTEXT_INVALID


@pytest.mark.parametrize("hash_", [Hash.SHA_1, Hash.SHA_256, Hash.SHA_384, Hash.SHA_512])
def test_an_oaep_ciphertext_names_its_hash(hash_: Hash) -> None:
    made = RsaCiphertext(_KEY, hash_, b"\x01" * 256)
    assert parse_ciphertext(made.encode()) == made


def test_an_envelope_has_one_spelling() -> None:
    text = _GOLDEN.encode()  # 86 bytes: two spare bits in front of the padding
    other = text[:-2] + chr(ord(text[-2]) + 1) + "="
    assert base64.b64decode(other) == base64.b64decode(text)
    with pytest.raises(KmsError):
        parse_envelope(other)
