"""What a worker began and left, since it was killed: the next look of the client takes it up, at any worker.

The row of that moment is written here, with the MAC that the service would have made: by the token.
"""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row

from kms.certificates.acme.order import ChallengeType, Order, Status, contents
from kms.v1 import certificates_pb2
from tests.acme.client import AcmeClient, csr
from tests.acme.conftest import AcmeServer
from tests.acme.orders import proven
from tests.acme.stubs import serving_files

LONG_AGO = datetime.now(UTC) - timedelta(minutes=2)


def order_of(row: dict[str, Any]) -> Order:
    """Return the order in a row."""
    columns = ("account_id", "created_at", "expires_at", "certificate_id", "version")
    return Order(order_id=row["id"], **{name: row[name] for name in columns}, **contents(row["content"]))


def leave(acme: AcmeServer, url: str, **changes: object) -> None:
    """Change an order as a worker does that is killed afterwards."""
    deployment = acme.running.deployment
    with psycopg.connect(deployment.database.admin_dsn, autocommit=True, row_factory=dict_row) as connection:
        row = connection.execute("SELECT * FROM cryptography.acme_orders WHERE id = %s", (url.rpartition("/")[2],)).fetchone()
        assert row is not None
        left = order_of(row).changed(**changes)
        connection.execute(
            "UPDATE cryptography.acme_orders SET content = %s, version = %s, record_mac = %s WHERE id = %s",
            (left.content(), left.version, deployment.macs.mac(left.authenticated_bytes()), left.order_id),
        )


@pytest.mark.parametrize("taken_at", [None, LONG_AGO])
def test_a_certificate_that_was_not_issued_is_issued(acme: AcmeServer, client: AcmeClient, taken_at: datetime | None) -> None:
    name = f"left-{'before' if taken_at is None else 'while'}.test"
    order = proven(acme, client, name)
    leave(acme, order["url"], csr=csr(name), taken_at=taken_at)
    found = client.post(order["url"]).json
    assert found["status"] == "valid"
    assert client.post(found["certificate"]).body.startswith(b"-----BEGIN CERTIFICATE")
    again = client.post(order["url"]).json
    assert again["certificate"] == found["certificate"]
    request = certificates_pb2.ListCertificatesRequest(authority=acme.platform.name, page_size=200)
    listed = acme.platform.issuer.certificates.ListCertificates(request).certificates
    assert sum(f"dns:{name}" in each.names for each in listed) == 1


def test_an_issue_that_another_worker_does_now_is_left_to_it(acme: AcmeServer, client: AcmeClient) -> None:
    order = proven(acme, client, "busy.test")
    leave(acme, order["url"], csr=csr("busy.test"), taken_at=datetime.now(UTC))
    reply = client.post(order["url"])
    assert (reply.json["status"], "retry-after" in reply.headers) == ("processing", True)


def test_a_challenge_that_was_not_asked_is_asked(acme: AcmeServer, client: AcmeClient) -> None:
    made = client.order("unasked.test")
    [url] = made.json["authorizations"]
    challenge = client.challenge(url, "http-01")
    with psycopg.connect(acme.running.deployment.database.admin_dsn, row_factory=dict_row) as connection:
        query = "SELECT * FROM cryptography.acme_orders WHERE id = %s"
        row = connection.execute(query, (made.headers["location"].rpartition("/")[2],)).fetchone()
    assert row is not None
    [asked] = order_of(row).authorizations
    asked = replace(asked, status=Status.PROCESSING, challenge=ChallengeType.HTTP, changed_at=LONG_AGO)
    leave(acme, made.headers["location"], authorizations=(asked,))
    text = f"{challenge['token']}.{client.thumbprint}".encode()
    with serving_files(acme.http_port, {f"/.well-known/acme-challenge/{challenge['token']}": text}):
        assert client.waited(url, "pending")["status"] == "valid"
