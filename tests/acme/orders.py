"""Orders that are proven over HTTP, as the tests of ACME begin."""

from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from tests.acme.client import AcmeClient, b64
from tests.acme.conftest import AcmeServer
from tests.acme.stubs import serving_files


def answered(acme: AcmeServer, client: AcmeClient, url: str, **stub: Any) -> dict[str, Any]:  # noqa: ANN401
    """Return an authorization after its challenge over HTTP was answered by a web server, which *stub* may bend."""
    challenge = client.challenge(url, "http-01")
    path, text = f"/.well-known/acme-challenge/{challenge['token']}", f"{challenge['token']}.{client.thumbprint}"
    files = {path: stub.pop("content", text.encode())}
    with serving_files(acme.http_port, files, **stub):
        assert client.post(challenge["url"], {}).status == 200
        return client.waited(url, "pending")


def proven(acme: AcmeServer, client: AcmeClient, *names: str, **wish: object) -> dict[str, Any]:
    """Return an order that is ready."""
    made = client.order(*names, **wish)
    assert made.status == 201, made.body
    for url in made.json["authorizations"]:
        assert answered(acme, client, url)["status"] == "valid"
    return {**client.waited(made.headers["location"]), "url": made.headers["location"]}


def issued(acme: AcmeServer, client: AcmeClient, *names: str, **wish: object) -> dict[str, Any]:
    """Return an order whose certificate is issued, with its chain in PEM as `chain`."""
    order = proven(acme, client, *names, **wish)
    done = client.finalize(order, *names)
    assert done.json["status"] == "valid", done.body
    return {**done.json, "url": order["url"], "chain": client.post(done.json["certificate"]).body}


def der_of(pem: bytes) -> str:
    """Return the first certificate as revokeCert takes it."""
    return b64(x509.load_pem_x509_certificates(pem)[0].public_bytes(Encoding.DER))
