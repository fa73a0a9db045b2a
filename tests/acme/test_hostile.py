"""Accounts and orders that a superuser plants, bends or undoes: no certificate comes of it."""

import json
from collections.abc import Iterator
from typing import Any, LiteralString

import psycopg
import pytest
from psycopg.rows import dict_row

from tests.acme.client import AcmeClient
from tests.acme.conftest import AcmeServer
from tests.acme.orders import der_of, issued, proven


@pytest.fixture
def database(acme: AcmeServer) -> Iterator[psycopg.Connection[dict[str, Any]]]:
    """A connection of whoever owns the database."""
    with psycopg.connect(acme.running.deployment.database.admin_dsn, autocommit=True, row_factory=dict_row) as connection:
        yield connection


def row(database: psycopg.Connection[dict[str, Any]], table: LiteralString, row_id: str) -> dict[str, Any]:
    """Return a row."""
    found = database.execute(f"SELECT * FROM cryptography.{table} WHERE id = %s", (row_id,)).fetchone()
    assert found is not None
    return found


def write(database: psycopg.Connection[dict[str, Any]], table: LiteralString, values: dict[str, Any]) -> None:
    """Write a row over one with its id."""
    names = [name for name in values if name != "id"]
    changes = ", ".join(f"{name} = %({name})s" for name in names)
    database.execute(f"UPDATE cryptography.{table} SET {changes} WHERE id = %(id)s".encode(), values)


def id_in(url: str) -> str:
    """Return the id at the end of an address."""
    return url.rpartition("/")[2]


def made_valid(content: str) -> str:
    """Return the content of an order whose names are said to be proven."""
    found = json.loads(content)
    for authorization in found["authorizations"]:
        authorization |= {"status": "valid", "challenge": "http-01"}
    return json.dumps(found, sort_keys=True, separators=(",", ":"))


def test_an_order_is_not_ready_because_its_row_says_so(
    acme: AcmeServer, client: AcmeClient, database: psycopg.Connection[dict[str, Any]]
) -> None:
    order = client.order("planted.test")
    order_id = id_in(order.headers["location"])
    kept = row(database, "acme_orders", order_id)
    write(database, "acme_orders", {**kept, "content": made_valid(kept["content"])})
    assert client.finalize(order.json, "planted.test").status == 503
    other = row(database, "acme_orders", id_in(proven(acme, client, "proven.test")["url"]))
    write(database, "acme_orders", {**other, "id": order_id})
    assert client.finalize(order.json, "proven.test").status == 503
    assert client.post(order.headers["location"]).problem == "serverInternal"
    write(database, "acme_orders", kept)
    assert client.finalize(order.json, "planted.test").problem == "orderNotReady"


def test_an_order_is_that_of_the_account_that_made_it(
    acme: AcmeServer, client: AcmeClient, database: psycopg.Connection[dict[str, Any]]
) -> None:
    order = proven(acme, client, "taken.test")
    other = acme.client()
    kept = row(database, "acme_orders", id_in(order["url"]))
    write(database, "acme_orders", {**kept, "account_id": id_in(other.kid)})
    assert other.finalize(order, "taken.test").status == 503


def test_an_order_that_is_put_back_gives_the_same_certificate(
    acme: AcmeServer, client: AcmeClient, database: psycopg.Connection[dict[str, Any]]
) -> None:
    """The row of the moment before its certificate was issued has a right MAC. Another look issues nothing more."""
    order = proven(acme, client, "put-back.test")
    ready = row(database, "acme_orders", id_in(order["url"]))
    done = client.finalize(order, "put-back.test").json
    issued_row = row(database, "acme_orders", id_in(order["url"]))
    write(database, "acme_orders", ready)
    again = client.finalize(order, "put-back.test").json
    assert (done["status"], again["status"]) == ("valid", "invalid"), "the request was used for another certificate request"
    assert issued_row["certificate_id"] is not None


def test_an_account_is_taken_by_no_key_that_its_row_names(
    acme: AcmeServer, client: AcmeClient, database: psycopg.Connection[dict[str, Any]]
) -> None:
    attacker = AcmeClient(client.directory_url, client.ca_file, kid=client.kid)
    kept = row(database, "acme_accounts", id_in(client.kid))
    jwk = json.dumps(attacker.jwk, sort_keys=True, separators=(",", ":"))
    write(database, "acme_accounts", {**kept, "jwk": jwk, "thumbprint": attacker.thumbprint})
    assert attacker.order("attacked.test").status == 503
    write(database, "acme_accounts", {**kept, "thumbprint": attacker.thumbprint})
    attacker.kid = ""
    assert attacker.post(attacker.url("newAccount"), {}).status == 503
    write(database, "acme_accounts", kept)
    assert client.order("attacked.test").status == 201


@pytest.mark.parametrize("column", ["user_id", "authority", "status", "created_at", "bind_before", "contacts", "version"])
def test_an_account_is_as_it_was_made(acme: AcmeServer, database: psycopg.Connection[dict[str, Any]], column: str) -> None:
    values: dict[str, Any] = {
        "user_id": acme.platform.manager.user_id,
        "authority": "another",
        "status": "deactivated",
        "contacts": ["mailto:other@example.com"],
        "version": 7,
    }
    client = acme.client()
    kept = row(database, "acme_accounts", id_in(client.kid))
    value = values.get(column, kept["created_at"].replace(year=2001))
    write(database, "acme_accounts", {**kept, column: value})
    assert client.post(client.kid).status == 503
    write(database, "acme_accounts", kept)
    assert client.post(client.kid).status == 200


def test_an_account_that_ended_is_not_put_back(acme: AcmeServer, database: psycopg.Connection[dict[str, Any]]) -> None:
    """The journal, outside the database, has its last version."""
    client = acme.client()
    kept = row(database, "acme_accounts", id_in(client.kid))
    client.post(client.kid, {"status": "deactivated"})
    write(database, "acme_accounts", kept)
    assert client.order("again.test").status == 503


def test_a_certificate_is_revoked_by_no_account_that_a_row_names(
    acme: AcmeServer, client: AcmeClient, database: psycopg.Connection[dict[str, Any]]
) -> None:
    done, other = issued(acme, client, "kept.test"), acme.client()
    kept = row(database, "acme_orders", id_in(done["url"]))
    write(database, "acme_orders", {**kept, "account_id": id_in(other.kid)})
    assert other.post(other.url("revokeCert"), {"certificate": der_of(done["chain"])}).status == 503
    write(database, "acme_orders", kept)
    assert client.post(client.url("revokeCert"), {"certificate": der_of(done["chain"])}).status == 200
