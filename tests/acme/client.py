"""An ACME client for tests: it sends what a test wants, right or wrong."""

import base64
import hashlib
import hmac
import json
import ssl
import time
from contextlib import closing
from dataclasses import dataclass, field
from http.client import HTTPSConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding

_WAIT_SECONDS = 60.0


def b64(data: bytes) -> str:
    """Return *data* in base64url without padding."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer of the server."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:  # noqa: ANN401
        """The body, of JSON."""
        return json.loads(self.body)

    @property
    def problem(self) -> str:
        """The type of problem."""
        assert self.headers["content-type"].startswith("application/problem+json"), (self.status, self.body)
        return str(self.json["type"]).removeprefix("urn:ietf:params:acme:error:")


@dataclass(slots=True)
class AcmeClient:
    """A client with a key of P-256. `kid` is the address of its account once it has one."""

    directory_url: str
    ca_file: Path
    key: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))
    kid: str = ""
    nonce: str = ""
    _directory: dict[str, Any] = field(default_factory=dict)

    @property
    def jwk(self) -> dict[str, str]:
        """The public key."""
        return jwk_of(self.key)

    @property
    def thumbprint(self) -> str:
        """The thumbprint of the key."""
        text = json.dumps(self.jwk, sort_keys=True, separators=(",", ":"))
        return b64(hashlib.sha256(text.encode()).digest())

    def url(self, name: str) -> str:
        """Return an address of the directory."""
        if not self._directory:
            self._directory = self.send("GET", self.directory_url).json
        return str(self._directory[name])

    def send(self, method: str, url: str, body: bytes | None = None, content_type: str = "application/jose+json") -> Reply:
        """Send a request, and keep the nonce of the answer."""
        parts = urlsplit(url)
        context = ssl.create_default_context(cafile=str(self.ca_file))
        connection = HTTPSConnection(parts.hostname or "", parts.port, timeout=60, context=context)
        with closing(connection):
            connection.request(method, parts.path, body, {"Content-Type": content_type} if body is not None else {})
            answer = connection.getresponse()
            headers = {name.lower(): value for name, value in answer.getheaders()}
            self.nonce = headers.get("replay-nonce", "")
            return Reply(answer.status, headers, answer.read())

    def new_nonce(self) -> str:
        """Return a nonce that was not used."""
        if not self.nonce:
            self.send("HEAD", self.url("newNonce"))
        nonce, self.nonce = self.nonce, ""
        return nonce

    def post(self, url: str, payload: object = None, *, sent_to: str = "", **header: object) -> Reply:
        """Send a signed request; None as *payload*: POST-as-GET. *header* replaces members of the header; None removes one."""
        who = {"kid": self.kid} if self.kid else {"jwk": self.jwk}
        protected = {"alg": "ES256", "nonce": header.get("nonce") or self.new_nonce(), "url": url, **who, **header}
        signed = self.signed({name: value for name, value in protected.items() if value is not None}, payload)
        return self.send("POST", sent_to or url, json.dumps(signed).encode())

    def signed(self, header: dict[str, Any], payload: object) -> dict[str, str]:
        """Return a JWS."""
        content = b"" if payload is None else json.dumps(payload).encode()
        text = f"{b64(json.dumps(header).encode())}.{b64(content)}"
        return {"protected": text.partition(".")[0], "payload": b64(content), "signature": b64(self.sign(text.encode()))}

    def sign(self, data: bytes) -> bytes:
        """Return a signature as JOSE has it."""
        r, s = decode_dss_signature(self.key.sign(data, ec.ECDSA(hashes.SHA256())))
        return r.to_bytes(32) + s.to_bytes(32)

    def binding(self, key_id: str, secret: bytes, **header: object) -> dict[str, str]:
        """Return an external account binding."""
        protected = json.dumps({"alg": "HS256", "kid": key_id, "url": self.url("newAccount"), **header}).encode()
        text = f"{b64(protected)}.{b64(json.dumps(self.jwk).encode())}"
        first, _, second = text.partition(".")
        return {"protected": first, "payload": second, "signature": b64(hmac.digest(secret, text.encode(), "sha256"))}

    def register(self, key_id: str, secret: bytes, **wish: object) -> Reply:
        """Take an account."""
        payload = {"termsOfServiceAgreed": True, "externalAccountBinding": self.binding(key_id, secret), **wish}
        reply = self.post(self.url("newAccount"), payload)
        self.kid = reply.headers.get("location", "")
        return reply

    def order(self, *names: str, **wish: object) -> Reply:
        """Order a certificate for DNS names."""
        identifiers = [{"type": "dns", "value": name} for name in names]
        return self.post(self.url("newOrder"), {"identifiers": identifiers, **wish})

    def challenge(self, authorization_url: str, kind: str) -> dict[str, Any]:
        """Return a challenge of an authorization."""
        found = self.post(authorization_url).json
        return next(each for each in found["challenges"] if each["type"] == kind)

    def waited(self, url: str, *statuses: str) -> dict[str, Any]:
        """Return a resource once its status is none of *statuses*."""
        ends_at = time.monotonic() + _WAIT_SECONDS
        while (found := self.post(url).json)["status"] in statuses and time.monotonic() < ends_at:
            time.sleep(0.02)
        return dict(found)

    def finalize(self, order: dict[str, Any], *names: str, **wish: Any) -> Reply:  # noqa: ANN401
        """Ask for the certificate of an order."""
        return self.post(order["finalize"], {"csr": b64(csr(*names, **wish))})


def jwk_of(key: ec.EllipticCurvePrivateKey) -> dict[str, str]:
    """Return a public key of P-256 as a JWK."""
    numbers = key.public_key().public_numbers()
    return {"crv": "P-256", "kty": "EC", "x": b64(numbers.x.to_bytes(32)), "y": b64(numbers.y.to_bytes(32))}


def csr(*names: str, key: ec.EllipticCurvePrivateKey | None = None, subject: x509.Name | None = None) -> bytes:
    """Return a request (DER) for DNS names."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject or x509.Name([]))
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(name) for name in names]), critical=False)
    return builder.sign(key or ec.generate_private_key(ec.SECP256R1()), hashes.SHA256()).public_bytes(Encoding.DER)
