"""What pyca writes is what the token signs, and a signature by another key never makes a certificate."""

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from kms.certificates.names import parse_names, parse_subject_text
from kms.certificates.profiles import SERVER, PublicKeyType
from kms.certificates.x509.certificates import build_certificate, build_request
from kms.certificates.x509.signing import load_public_key, spki_of_pem
from kms.domain.algorithms import Hash, Scheme, SignatureAlgorithm
from kms.domain.errors import KmsError, Reason
from tests.certificates.making import root
from tests.certificates.softkeys import soft_key

SIGNERS = [PublicKeyType.P256, PublicKeyType.SECP256K1, PublicKeyType.ED25519, PublicKeyType.RSA]


@pytest.mark.parametrize("signer", SIGNERS)
def test_the_draft_differs_from_the_certificate_in_its_signature_only(signer: PublicKeyType) -> None:
    authority = root(soft_key(signer))
    to_certify = authority.to_certify(SERVER, soft_key(PublicKeyType.P256, 1), names=parse_names(["dns:a.example"]))
    unsigned = build_certificate(to_certify, authority.key.spki)
    draft = x509.load_der_x509_certificate(unsigned.draft)
    signed = x509.load_der_x509_certificate(authority.key.sign(unsigned))
    assert draft.tbs_certificate_bytes == signed.tbs_certificate_bytes == unsigned.to_sign
    assert draft.signature != signed.signature
    signed.verify_directly_issued_by(x509.load_der_x509_certificate(authority.chain[0]))


@pytest.mark.parametrize("signer", SIGNERS)
def test_a_signature_by_another_key_makes_no_certificate(signer: PublicKeyType) -> None:
    unsigned = build_request(parse_subject_text("CN=a"), (), soft_key(signer).spki)
    with pytest.raises(KmsError) as refusal:
        soft_key(signer, 9).sign(unsigned)
    assert refusal.value.reason is Reason.RECORD_INVALID
    for garbage in (b"", b"\0" * 64):
        with pytest.raises(KmsError) as refusal:
            unsigned.signed(garbage)
        assert refusal.value.reason is Reason.RECORD_INVALID


@pytest.mark.parametrize(
    ("key_type", "bits", "scheme", "hash_"),
    [
        (PublicKeyType.P256, 256, Scheme.ECDSA, Hash.SHA_256),
        (PublicKeyType.SECP256K1, 256, Scheme.ECDSA, Hash.SHA_256),
        (PublicKeyType.ED25519, 256, Scheme.ED25519, None),
        (PublicKeyType.RSA, 2048, Scheme.RSA_PKCS1, Hash.SHA_256),
        (PublicKeyType.RSA, 3072, Scheme.RSA_PKCS1, Hash.SHA_384),
    ],
)
def test_the_hash_fits_the_key(key_type: PublicKeyType, bits: int, scheme: Scheme, hash_: Hash | None) -> None:
    key = soft_key(key_type, bits=bits)
    unsigned = build_request(parse_subject_text("CN=a"), (), key.spki)
    assert unsigned.algorithm == SignatureAlgorithm(scheme, hash_)
    assert x509.load_der_x509_csr(key.sign(unsigned)).is_signature_valid


def test_a_public_key_of_a_record_is_read_and_one_of_another_kind_refused() -> None:
    key = soft_key(PublicKeyType.ED25519)
    pem = key.private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    assert spki_of_pem(pem.decode()) == key.spki
    for spki in (b"", key.spki[:-1], bytes.fromhex("302a300506032b656e032100") + bytes(32)):  # the last is of X25519
        with pytest.raises(KmsError) as refusal:
            load_public_key(spki)
        assert refusal.value.reason is Reason.CERTIFICATE_INVALID
