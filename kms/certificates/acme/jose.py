"""Requests as JSON Web Signatures (RFC 7515), as ACME narrows them (RFC 8555 section 6.2).

What is signed names the algorithm, the address, a nonce, and the key or the account. The algorithm must be that of the key:
nothing in a request chooses another.
"""

import json
from dataclasses import dataclass
from typing import Any, Final

from josepy.errors import Error as JoseError
from josepy.jwa import ES256, ES384, HS256, RS256, JWASignature
from josepy.jwk import JWKEC, JWKRSA

from kms.certificates.acme.encoding import from_base64url, parse_object
from kms.certificates.acme.problems import AcmeError, ProblemType, malformed
from kms.certificates.x509.signing import public_key_of, spki_of

RSA_BITS_MIN: Final = 2048
RSA_BITS_MAX: Final = 4096
_RSA_EXPONENT_MIN: Final = 65_537
_RSA_EXPONENT_MAX: Final = 2**32
_MEMBERS: Final = {"RSA": ("e", "n"), "EC": ("x", "y")}
_KINDS: Final = {"RSA": JWKRSA, "EC": JWKEC}
_CURVES: Final = {"P-256": ES256, "P-384": ES384}
_ENVELOPE: Final = frozenset({"protected", "payload", "signature"})
_BAD_KEY: Final = f"expected a public key: RSA of {RSA_BITS_MIN} to {RSA_BITS_MAX} bits, P-256 or P-384"


@dataclass(frozen=True, slots=True)
class PublicKey:
    """The public key of a client. `text` is its one spelling (RFC 7638)."""

    text: str
    algorithm: JWASignature
    jwk: JWKRSA | JWKEC

    @property
    def spki(self) -> bytes:
        """The key as certificates hold it, in DER."""
        return spki_of(public_key_of(self.jwk.key._wrapped))  # josepy wraps the key, to compare it


@dataclass(frozen=True, slots=True)
class Signed:
    """A request that is read, and not yet believed: nobody has verified its signature."""

    header: dict[str, Any]
    payload: bytes
    signing_input: bytes
    signature: bytes

    @property
    def algorithm(self) -> object:
        """The algorithm that the header names."""
        return self.header.get("alg")

    def verify(self, key: PublicKey) -> None:
        """Raise a problem unless *key* has signed the request."""
        if self.algorithm != key.algorithm.name:
            raise AcmeError(ProblemType.BAD_SIGNATURE_ALGORITHM, f"alg: expected {key.algorithm.name} with this key")
        if not key.algorithm.verify(key.jwk.key, self.signing_input, self.signature):
            raise _bad_signature()

    def verify_mac(self, secret: bytes) -> None:
        """Raise a problem unless it was made with *secret*, by HMAC-SHA-256."""
        if self.algorithm != HS256.name:
            raise AcmeError(ProblemType.BAD_SIGNATURE_ALGORITHM, "alg: expected HS256 in externalAccountBinding")
        if not HS256.verify(secret, self.signing_input, self.signature):
            raise _bad_signature()

    def object(self) -> dict[str, Any]:
        """Return the payload as a JSON object, or raise a problem."""
        return parse_object(self.payload, field="payload")


def parse_signed(found: object) -> Signed:
    """Return a JWS in its flattened form, with a protected header alone. Raises a problem."""
    if not isinstance(found, dict) or found.keys() != _ENVELOPE:
        raise malformed("expected a JWS with protected, payload and signature, and nothing else")
    protected, payload = found["protected"], found["payload"]
    header = parse_object(from_base64url(protected, field="protected"), field="protected")
    if "crit" in header or "b64" in header:
        raise malformed("protected: expected neither crit nor b64")
    content = from_base64url(payload, field="payload")
    signature = from_base64url(found["signature"], field="signature")
    return Signed(header, content, f"{protected}.{payload}".encode(), signature)


def parse_key(found: object) -> PublicKey:
    """Return the public key in a JWK. Raises a problem for a private, weak or unknown one."""
    if not isinstance(found, dict) or "d" in found or "k" in found:
        raise _bad_key()
    members = _MEMBERS.get(found.get("kty", "")) if isinstance(found.get("kty"), str) else None
    if members is None or not all(isinstance(found.get(name), str) for name in members):
        raise _bad_key()
    for name in members:
        from_base64url(found[name], field="jwk")
    try:
        wanted = {name: found[name] for name in ("kty", "crv", *members) if name in found}
        jwk: JWKRSA | JWKEC = _KINDS[found["kty"]].fields_from_json(wanted)
        spelt = {name: value for name, value in jwk.to_json().items() if name in jwk.required}
    except (JoseError, ValueError, KeyError, TypeError, OverflowError):
        raise _bad_key() from None
    return PublicKey(json.dumps(spelt, sort_keys=True, separators=(",", ":")), _algorithm(found, jwk), jwk)


def _algorithm(found: dict[str, Any], jwk: JWKRSA | JWKEC) -> JWASignature:
    if found["kty"] == "EC":
        algorithm = _CURVES.get(found.get("crv", ""))
        if algorithm is None:
            raise _bad_key()
        return algorithm
    exponent = jwk.key.public_numbers().e
    is_strong = RSA_BITS_MIN <= jwk.key.key_size <= RSA_BITS_MAX
    if not is_strong or exponent % 2 == 0 or not _RSA_EXPONENT_MIN <= exponent <= _RSA_EXPONENT_MAX:
        raise _bad_key()
    return RS256


def _bad_key() -> AcmeError:
    return AcmeError(ProblemType.BAD_PUBLIC_KEY, f"jwk: {_BAD_KEY}")


def _bad_signature() -> AcmeError:
    return AcmeError(ProblemType.MALFORMED, "signature: it does not verify", status=401)
