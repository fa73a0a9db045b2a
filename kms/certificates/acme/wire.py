"""The resources of ACME in JSON, and their addresses (RFC 8555 section 7.1)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from kms.certificates.acme.account import Account
from kms.certificates.acme.order import Authorization, ChallengeType, Order, Status
from kms.certificates.acme.problems import URN, Problem
from kms.certificates.acme.renewal import Window
from kms.certificates.names import NameKind


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where the resources of one authority are. *base* is `https://host[:port]`."""

    base: str
    authority: str

    def of(self, path: str) -> str:
        """Return the address of *path*."""
        return f"{self.base}/acme/{self.authority}/{path}"

    def account(self, account_id: UUID | str = "") -> str:
        """Return the address of an account; of none: what that of each begins with."""
        return self.of(f"account/{account_id}")

    def order(self, order: Order) -> str:
        """Return the address of an order."""
        return self.of(f"order/{order.order_id}")

    def authorization(self, order: Order, index: int) -> str:
        """Return the address of an authorization of an order."""
        return self.of(f"authz/{order.order_id}/{index}")

    def challenge(self, order: Order, index: int, challenge: ChallengeType) -> str:
        """Return the address of a challenge."""
        return self.of(f"chall/{order.order_id}/{index}/{challenge}")


def wire_directory(addresses: Addresses) -> dict[str, Any]:
    """Return the directory of an authority."""
    return {
        "newNonce": addresses.of("new-nonce"),
        "newAccount": addresses.of("new-account"),
        "newOrder": addresses.of("new-order"),
        "revokeCert": addresses.of("revoke-cert"),
        "keyChange": addresses.of("key-change"),
        "renewalInfo": addresses.of("renewal-info"),
        "meta": {"externalAccountRequired": True},
    }


def wire_account(account: Account, addresses: Addresses) -> dict[str, Any]:
    """Return an account as its client sees it."""
    return {
        "status": account.status.value,
        "contact": list(account.contacts),
        "orders": f"{addresses.account(account.account_id)}/orders",
    }


def wire_orders(orders: Sequence[Order], addresses: Addresses) -> dict[str, Any]:
    """Return the list of an account's orders."""
    return {"orders": [addresses.order(order) for order in orders]}


def wire_order(order: Order, addresses: Addresses, now: datetime) -> dict[str, Any]:
    """Return an order as its client sees it at *now*."""
    found: dict[str, Any] = {
        "status": order.status(now).value,
        "expires": wire_moment(order.expires_at),
        "identifiers": [_identifier(authorization, whole=True) for authorization in order.authorizations],
        "authorizations": [addresses.authorization(order, index) for index in range(len(order.authorizations))],
        "finalize": addresses.of(f"finalize/{order.order_id}"),
    }
    if order.error is not None:
        found["error"] = wire_problem(order.error)
    if order.certificate_id is not None:
        found["certificate"] = addresses.of(f"cert/{order.order_id}")
    if order.replaces:
        found["replaces"] = order.replaces
    return found


def wire_authorization(order: Order, index: int, addresses: Addresses, now: datetime) -> dict[str, Any]:
    """Return an authorization as its client sees it at *now*."""
    authorization = order.authorizations[index]
    found: dict[str, Any] = {
        "status": order.authorization_status(index, now).value,
        "expires": wire_moment(order.expires_at),
        "identifier": _identifier(authorization, whole=False),
        "challenges": [wire_challenge(order, index, each, addresses) for each in authorization.challenges],
    }
    if authorization.name.is_wildcard:
        found["wildcard"] = True
    return found


def wire_challenge(order: Order, index: int, challenge: ChallengeType, addresses: Addresses) -> dict[str, Any]:
    """Return a challenge as its client sees it."""
    authorization = order.authorizations[index]
    status = authorization.status if authorization.challenge is challenge else Status.PENDING
    found: dict[str, Any] = {
        "type": challenge.value,
        "url": addresses.challenge(order, index, challenge),
        "token": authorization.token,
        "status": (status if status in _OF_CHALLENGES else Status.INVALID).value,
    }
    if status is Status.VALID and authorization.changed_at is not None:
        found["validated"] = wire_moment(authorization.changed_at)
    if authorization.error is not None:
        found["error"] = wire_problem(authorization.error)
    return found


def wire_window(window: Window) -> dict[str, Any]:
    """Return renewal information."""
    return {"suggestedWindow": {"start": wire_moment(window.begins_at), "end": wire_moment(window.ends_at)}}


def wire_problem(problem: Problem) -> dict[str, Any]:
    """Return a problem document."""
    return {"type": URN + problem.type, "detail": problem.detail}


def wire_moment(moment: datetime) -> str:
    """Return a moment as RFC 3339 has it, in whole seconds of UTC."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


_OF_CHALLENGES = frozenset({Status.PENDING, Status.PROCESSING, Status.VALID, Status.INVALID})


def _identifier(authorization: Authorization, *, whole: bool) -> Mapping[str, str]:
    kind = "ip" if authorization.name.kind is NameKind.IP else "dns"
    return {"type": kind, "value": authorization.name.value if whole else authorization.identifier}
