"""The protocol of ACME, against a real server."""

from cryptography import x509

from tests.acme.client import AcmeClient
from tests.acme.conftest import AcmeServer
from tests.acme.stubs import serving_files


def proven(acme: AcmeServer, client: AcmeClient, *names: str) -> dict[str, object]:
    """Return an order whose names are proven over HTTP."""
    made = client.order(*names)
    assert made.status == 201, made.body
    for url in made.json["authorizations"]:
        challenge = client.challenge(url, "http-01")
        files = {f"/.well-known/acme-challenge/{challenge['token']}": f"{challenge['token']}.{client.thumbprint}".encode()}
        with serving_files(acme.http_port, files):
            assert client.post(challenge["url"], {}).status == 200
            assert client.waited(url, "pending")["status"] == "valid"
    return client.waited(made.headers["location"])


def test_a_name_is_proven_and_its_certificate_is_issued(acme: AcmeServer, client: AcmeClient) -> None:
    order = proven(acme, client, "www.example.test", "example.test")
    assert order["status"] == "ready"
    done = client.finalize(order, "www.example.test", "example.test").json
    assert done["status"] == "valid"
    chain = x509.load_pem_x509_certificates(client.post(done["certificate"]).body)
    names = chain[0].extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert set(names.get_values_for_type(x509.DNSName)) == {"www.example.test", "example.test"}
    chain[0].verify_directly_issued_by(chain[1])
