"""Orders: from the names that a client wants to the certificate.

newOrder ──► challenges, answered by the client and asked in the background ──► finalize ──► certificate

Each step is stored before it is acted on. Where a worker dies in between, the next look of the client takes the step up again
after a minute, at any worker. A certificate is issued once: its request id is that of the order.
"""

import hashlib
import json
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Final
from uuid import UUID

import structlog

from kms.app.ports import Call
from kms.certificates.acme.account import Account
from kms.certificates.acme.accounts import ClientAccounts, check_may_issue
from kms.certificates.acme.encoding import base64url, from_base64url
from kms.certificates.acme.jose import parse_key
from kms.certificates.acme.order import ORDER_LASTS, Authorization, ChallengeType, Order, Status
from kms.certificates.acme.ports import Orders, Probes
from kms.certificates.acme.problems import AcmeError, Problem, ProblemType, error_of, malformed, not_found
from kms.certificates.acme.renewal import Renewal
from kms.certificates.authority import AuthorityRef, check_active
from kms.certificates.issuing import CertificateWish, Issued, Issuing
from kms.certificates.names import Attribute, GeneralName, NameKind, certificate_invalid, parse_name
from kms.certificates.profiles import SERVER
from kms.certificates.x509.requests import CertificateRequest, parse_request
from kms.domain.errors import KmsError, Reason
from kms.keys.ledger.repeats import RepeatableRequest

FINALIZE: Final = "acme/finalize"
TOKEN_BYTES: Final = 32
_KINDS: Final = {"dns": NameKind.DNS, "ip": NameKind.IP}
# What the client, or whoever let it order, must change. All else may be otherwise a moment later.
_FINAL: Final = frozenset(
    {
        Reason.CERTIFICATE_INVALID,
        Reason.MALFORMED,
        Reason.PERMISSION_DENIED,
        Reason.CREDENTIALS_INVALID,
        Reason.AUTHORITY_INACTIVE,
        Reason.REQUEST_ID_REUSED,
    }
)
_LOG: Final = structlog.get_logger("kms.acme")

Background = Callable[[Coroutine[Any, Any, None]], None]
"""Begins work that nobody waits for."""


@dataclass(frozen=True, slots=True)
class Ordering:
    """newOrder, and what follows. *peer* is the address of the client."""

    orders: Orders
    accounts: ClientAccounts
    issuing: Issuing
    renewal: Renewal
    probes: Probes
    background: Background

    async def now(self) -> datetime:
        """Return the moment by the database's clock."""
        return await self.issuing.now()

    async def order(self, account: Account, wish: dict[str, Any], peer: str) -> Order:
        """Make an order of the names in *wish*. Raises a problem, PERMISSION_DENIED, AUTHORITY_INACTIVE, RATE_LIMITED."""
        names = parse_identifiers(wish.get("identifiers"))
        if wish.keys() & {"notBefore", "notAfter"}:
            raise malformed("notBefore, notAfter: the profile of the authority decides")
        call, now = await self.accounts.caller(account, peer), await self.now()
        authority = await self.issuing.require(AuthorityRef(name=account.authority))
        check_may_issue(call.user, authority)
        check_active(authority, now)
        replaces = await self._replaces(account, wish.get("replaces"))
        random = self.issuing.issuer.random
        authorizations = [Authorization(name, base64url(await random(TOKEN_BYTES))) for name in names]
        order = Order(
            order_id=UUID(bytes=await random(16), version=4),
            account_id=account.account_id,
            authorizations=tuple(authorizations),
            created_at=now,
            expires_at=now + ORDER_LASTS,
            replaces=replaces,
        )
        details = {"account": str(account.account_id), "authority": account.authority, "names": list(map(str, names))}
        await self.orders.add(order, details, peer)
        return order

    async def find(self, account: Account, order_id: UUID) -> Order:
        """Return an order of an account, as it goes on. Raises a problem with status 404."""
        order = await self._require(account, order_id)
        if order.is_left(await self.now()):
            return await self._issue(account, order)
        return order

    async def page(self, account: Account, limit: int) -> Sequence[Order]:
        """Return the newest orders of an account."""
        found = await self.orders.page(account.account_id, limit=limit)
        return [order for order in found if order.account_id == account.account_id]

    async def authorization(self, account: Account, order_id: UUID, index: int) -> Order:
        """Return the order with an authorization that a client looks at. A challenge that was left is asked again."""
        order = await self._require(account, order_id, index)
        challenge = order.authorizations[index].challenge
        if challenge is not None and order.authorizations[index].is_waiting(challenge, await self.now()):
            return await self.respond(account, order_id, index, challenge, "")
        return order

    async def respond(self, account: Account, order_id: UUID, index: int, challenge: ChallengeType, peer: str) -> Order:
        """Ask for a challenge that the client says it has prepared. Asked before, nothing changes. Raises a problem."""
        while True:
            order, now = await self._require(account, order_id, index), await self.now()
            authorization = order.authorizations[index]
            if challenge not in authorization.challenges:
                raise not_found()
            if order.status(now) is not Status.PENDING or not authorization.is_waiting(challenge, now):
                return order
            begun = replace(authorization, status=Status.PROCESSING, challenge=challenge, changed_at=now)
            changed = order.with_authorization(index, begun)
            # Another name of the order may be proven at this moment, which changes the same row.
            if await self.orders.change(changed, None, {}, peer):
                self.background(self._ask(account, order_id, index, begun, peer))
                return changed

    async def deactivate(self, account: Account, order_id: UUID, index: int, peer: str) -> Order:
        """Give an authorization up. What was issued with it stays valid. Raises a problem."""
        while True:
            order = await self._require(account, order_id, index)
            authorization = replace(order.authorizations[index], status=Status.DEACTIVATED)
            changed = order.with_authorization(index, authorization)
            if await self.orders.change(changed, "acme.authorization_deactivated", _details(authorization), peer):
                return changed

    async def finalize(self, account: Account, order_id: UUID, wish: dict[str, Any], peer: str) -> Order:
        """Issue the certificate for the key of a request. Raises orderNotReady, badCSR and other problems."""
        order, now = await self._require(account, order_id), await self.now()
        if order.status(now) is not Status.READY:
            raise AcmeError(ProblemType.ORDER_NOT_READY, f"the order is {order.status(now)}")
        csr = from_base64url(wish.get("csr"), field="csr")
        try:
            check_request(parse_request(csr), order, account)
        except KmsError as error:
            raise AcmeError(ProblemType.BAD_CSR, error.message) from None
        taken = order.changed(csr=csr)
        if not await self.orders.change(taken, None, {}, peer):
            raise _changed_meanwhile()
        return await self._issue(account, taken, peer)

    async def certificate(self, account: Account, order_id: UUID, peer: str) -> Issued:
        """Return the certificate of an order that is valid. Raises a problem with status 404."""
        order = await self._require(account, order_id)
        if order.certificate_id is None:
            raise not_found()
        call = await self.accounts.caller(account, peer)
        return await self.issuing.find(call.user, order.certificate_id)

    async def _require(self, account: Account, order_id: UUID, index: int = 0) -> Order:
        order = await self.orders.find(order_id)
        if order is None or order.account_id != account.account_id or index >= len(order.authorizations):
            raise not_found()
        return order

    async def _replaces(self, account: Account, replaces: object) -> str:
        if replaces is None:
            return ""
        certificate = await self.renewal.require(account.authority, replaces)
        orders = await self.orders.of_certificate(certificate.certificate_id)
        if not any(order.account_id == account.account_id for order in orders):
            raise malformed("replaces: expected a certificate of this account")
        if certificate.superseded_at is not None:
            raise AcmeError(ProblemType.ALREADY_REPLACED, "replaces: the certificate was replaced already")
        return str(replaces)

    async def _ask(self, account: Account, order_id: UUID, index: int, asked: Authorization, peer: str) -> None:
        """Ask for a challenge, and store how it ended."""
        problem = None
        try:
            await self._probe(account, asked)
        except AcmeError as error:
            problem = error.problem
        except Exception:  # noqa: BLE001 - a bug must not leave the client waiting
            _LOG.exception("bug in a challenge", order=str(order_id))
            problem = Problem(ProblemType.SERVER_INTERNAL, "internal error")
        status = Status.VALID if problem is None else Status.INVALID
        ended = replace(asked, status=status, changed_at=await self.now(), error=problem)
        # The other names of the order are proven at the same time, and change the same row.
        while (order := await self.orders.find(order_id)) is not None and order.authorizations[index] == asked:
            details = _details(ended) | {"account": str(account.account_id)}
            if await self.orders.change(order.with_authorization(index, ended), f"acme.authorization_{status}", details, peer):
                break

    async def _probe(self, account: Account, authorization: Authorization) -> None:
        key_authorization = f"{authorization.token}.{account.thumbprint}"
        if authorization.challenge is ChallengeType.HTTP:
            await self.probes.ask_http(authorization.name, authorization.token, key_authorization)
        else:
            digest = base64url(hashlib.sha256(key_authorization.encode()).digest())
            await self.probes.ask_dns(authorization.name, digest)

    async def _issue(self, account: Account, order: Order, peer: str = "") -> Order:
        """Issue the certificate of an order with a request. Where that cannot be done now, the order stays as it is."""
        taken = order.changed(taken_at=await self.now())
        if not await self.orders.change(taken, None, {}, peer):
            return await self._require(account, order.order_id)
        try:
            call = await self.accounts.caller(account, peer)
            wish = CertificateWish(AuthorityRef(name=account.authority), SERVER.name, taken.csr, None, names=taken.names)
            issued = await self.issuing.issue(call, wish, RepeatableRequest(FINALIZE, str(taken.order_id), taken.csr))
        except KmsError as error:
            if error.reason not in _FINAL:
                _LOG.warning("certificate not issued yet", order=str(order.order_id), reason=error.reason, message=error.message)
                return taken
            done = taken.changed(error=error_of(error).problem)
            await self.orders.change(done, "acme.order_failed", {"reason": error.reason}, peer)
            return done
        certificate = issued.certificate
        done = taken.changed(certificate_id=certificate.certificate_id, expires_at=certificate.not_after)
        details = {"certificate": str(certificate.certificate_id), "account": str(account.account_id)}
        if not await self.orders.change(done, "acme.order_completed", details, peer):
            return await self._require(account, order.order_id)
        if taken.replaces:
            await self._supersede(call, account, taken.replaces)
        return done

    async def _supersede(self, call: Call, account: Account, replaces: str) -> None:
        """List the certificate that was replaced as superseded from now on."""
        old = await self.renewal.require(account.authority, replaces)
        if old.superseded_at is None:
            await self.issuing.certificates.supersede(call, old.superseded(await self.now()))


def parse_identifiers(found: object) -> tuple[GeneralName, ...]:
    """Return the names of an order, each once, in the order of the request. Raises a problem."""
    if not isinstance(found, list) or not 0 < len(found) <= SERVER.names_max:
        raise malformed(f"identifiers: expected 1 to {SERVER.names_max}")
    names = dict.fromkeys(_parse_identifier(identifier) for identifier in found)
    return tuple(names)


def check_request(request: CertificateRequest, order: Order, account: Account) -> None:
    """Raise CERTIFICATE_INVALID unless *request* asks for the names of *order* and no more, with a key of its own."""
    request.check_extensions(SERVER)
    SERVER.check_key(request.key_type, request.key_bits)
    names = set(request.names)
    if any(attribute is not Attribute.COMMON_NAME for attribute, _ in request.subject.attributes):
        raise certificate_invalid("csr", "expected no subject but a CN: nobody has proven the rest")
    if (common_name := request.subject.common_name) is not None:
        is_address = any(name.kind is NameKind.IP and name.value == common_name for name in order.names)
        common = GeneralName(NameKind.IP, common_name) if is_address else parse_name(NameKind.DNS, common_name, field="csr")
        if common.value != common_name:
            raise certificate_invalid("csr", "expected a CN in lower case, and in ASCII")
        names.add(common)
    if names != set(order.names):
        raise certificate_invalid("csr", "expected the names of the order, all of them and no others")
    if request.public_key == parse_key(json.loads(account.jwk)).spki:
        raise certificate_invalid("csr", "expected another key than that of the account")


def _parse_identifier(found: object) -> GeneralName:
    if not isinstance(found, dict) or not isinstance(found.get("value"), str):
        raise malformed("identifiers: expected a type and a value of each")
    kind = _KINDS.get(found.get("type", "")) if isinstance(found.get("type"), str) else None
    if kind is None:
        raise AcmeError(ProblemType.UNSUPPORTED_IDENTIFIER, "identifiers: expected the type dns or ip")
    try:
        return parse_name(kind, found["value"], field="identifiers")
    except KmsError as error:
        raise AcmeError(ProblemType.REJECTED_IDENTIFIER, error.message) from None


def _details(authorization: Authorization) -> dict[str, object]:
    problem = authorization.error
    found: dict[str, object] = {"name": str(authorization.name), "challenge": authorization.challenge}
    return found if problem is None else {**found, "problem": problem.type.value}


def _changed_meanwhile() -> AcmeError:
    return AcmeError(ProblemType.SERVER_INTERNAL, "the order changed meanwhile: look at it again", status=503)
