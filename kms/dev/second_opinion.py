"""Other people's code that checks what the service made: the `openssl` program, or pyca/cryptography where there is none."""

import functools
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from coincurve import PublicKey
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa

from kms.domain.algorithms import Scheme

_SECONDS: Final = 20.0
_PSS: Final = ("-sigopt", "rsa_padding_mode:pss", "-sigopt", "rsa_pss_saltlen:digest", "-sigopt", "rsa_mgf1_md:sha256")
_OAEP: Final = ("-pkeyopt", "rsa_padding_mode:oaep", "-pkeyopt", "rsa_oaep_md:sha1", "-pkeyopt", "rsa_mgf1_md:sha1")


def checker() -> str:
    """Return the name of whoever checks."""
    return "openssl" if _program() else "pyca/cryptography"


def accepts(public_key_pem: str, scheme: Scheme, message: bytes, signature: bytes) -> bool:
    """Whether the checker takes *signature* for one of *message*: SHA-256, ECDSA in DER, PSS with a salt of 32 bytes."""
    program = _program()
    if program is None:
        return _pyca_accepts(public_key_pem, scheme, message, signature)
    with tempfile.TemporaryDirectory(prefix="kms-openssl-") as name:
        key, sealed, signed = (Path(name) / file for file in ("key.pem", "signature", "message"))
        key.write_text(public_key_pem)
        sealed.write_bytes(signature)
        signed.write_bytes(message)
        if scheme is Scheme.ED25519:
            files = ["-pubin", "-inkey", str(key), "-rawin", "-in", str(signed), "-sigfile", str(sealed)]
            return _run([program, "pkeyutl", "-verify", *files]).returncode == 0
        options = _PSS if scheme is Scheme.RSA_PSS else ()
        files = ["-verify", str(key), "-signature", str(sealed), str(signed)]
        return _run([program, "dgst", "-sha256", *options, *files]).returncode == 0


def encrypt_oaep_sha1(public_key_pem: str, plaintext: bytes) -> bytes:
    """Return RSA-OAEP with SHA-1 of *plaintext*, made without the service from the public key alone."""
    program = _program()
    if program is None:
        key = serialization.load_pem_public_key(public_key_pem.encode())
        assert isinstance(key, rsa.RSAPublicKey)  # noqa: S101 - the caller made an RSA key
        oaep = padding.OAEP(padding.MGF1(hashes.SHA1()), hashes.SHA1(), None)  # noqa: S303 - what SoftHSM can decrypt
        return key.encrypt(plaintext, oaep)
    with tempfile.TemporaryDirectory(prefix="kms-openssl-") as name:
        key_file, clear = Path(name) / "key.pem", Path(name) / "clear"
        key_file.write_text(public_key_pem)
        clear.write_bytes(plaintext)
        command = [program, "pkeyutl", "-encrypt", "-pubin", "-inkey", str(key_file), "-in", str(clear), *_OAEP]
        return _run(command, check=True).stdout


def recovers(public_key_pem: str, digest: bytes, signature: bytes) -> bool:
    """Whether libsecp256k1 recovers this very key from r‖s‖v over *digest*."""
    key = serialization.load_pem_public_key(public_key_pem.encode())
    assert isinstance(key, ec.EllipticCurvePublicKey)  # noqa: S101 - the caller made a secp256k1 key
    point = key.public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)
    try:
        return PublicKey.from_signature_and_message(signature, digest, hasher=None).format(compressed=False) == point
    except ValueError:
        return False


def openssl(*arguments: str, directory: Path | None = None) -> subprocess.CompletedProcess[bytes]:
    """Run the `openssl` program, which must be there, in *directory*."""
    program = _program()
    assert program is not None  # noqa: S101  # the caller asked `has_openssl`
    return _run([program, *arguments], directory=directory)


def has_openssl() -> bool:
    """Whether there is an `openssl` program that knows what we ask of it."""
    return _program() is not None


@functools.cache
def _program() -> str | None:
    """Return the path of an openssl that knows Ed25519 messages: not before 3.0, and LibreSSL does not."""
    found = shutil.which("openssl")
    version = _run([found, "version"]).stdout.split() if found else []
    return found if version[:1] == [b"OpenSSL"] and int(version[1].split(b".")[0]) >= 3 else None


def _pyca_accepts(public_key_pem: str, scheme: Scheme, message: bytes, signature: bytes) -> bool:
    key = serialization.load_pem_public_key(public_key_pem.encode())
    sha256 = hashes.SHA256()
    try:
        if isinstance(key, ed25519.Ed25519PublicKey):
            key.verify(signature, message)
        elif isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(signature, message, ec.ECDSA(sha256))
        elif isinstance(key, rsa.RSAPublicKey):
            pss = padding.PSS(padding.MGF1(sha256), sha256.digest_size)
            key.verify(signature, message, pss if scheme is Scheme.RSA_PSS else padding.PKCS1v15(), sha256)
        else:
            return False
    except InvalidSignature:
        return False
    return True


def _run(command: Sequence[str], *, check: bool = False, directory: Path | None = None) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(command, capture_output=True, timeout=_SECONDS, check=check, cwd=directory)  # noqa: S603 - no text of a caller
