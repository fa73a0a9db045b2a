"""The HTTPS server of ACME. Each authority has a directory of its own.

    GET  /acme/NAME/directory, /acme/NAME/renewal-info/CERTIFICATE
    HEAD and GET /acme/NAME/new-nonce
    POST /acme/NAME/new-account, new-order, key-change, revoke-cert
    POST /acme/NAME/account/ID[/orders], order/ID, authz/ID/N, chall/ID/N/TYPE, finalize/ID, cert/ID

Anybody may reach this address. So connections are few and short, and requests are small.
"""

import asyncio
import re
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

import structlog
from aiohttp import web

from kms.certificates.acme.account import Account
from kms.certificates.acme.accounts import ClientAccounts
from kms.certificates.acme.nonces import Nonces
from kms.certificates.acme.order import ChallengeType, Order, Status
from kms.certificates.acme.orders import Ordering
from kms.certificates.acme.problems import AcmeError, ProblemType, error_of, malformed, not_found
from kms.certificates.acme.renewal import LOOK_AGAIN, Renewal
from kms.certificates.acme.requests import Authentic, Authenticating
from kms.certificates.acme.revoking import ClientRevoking
from kms.certificates.acme.wire import (
    Addresses,
    wire_account,
    wire_authorization,
    wire_challenge,
    wire_directory,
    wire_order,
    wire_orders,
    wire_problem,
    wire_window,
)
from kms.certificates.authority import AuthorityRef
from kms.certificates.issuing import Issuing
from kms.certificates.publishing.bounded import BoundedServer, HttpLimits, listening
from kms.domain.errors import KmsError

REQUEST_BYTES_MAX: Final = 131_072
ORDERS_MAX: Final = 100
CHAIN_TYPE: Final = "application/pem-certificate-chain"
_JOSE: Final = "application/jose+json"
_PROBLEM: Final = "application/problem+json"
_PATH: Final = re.compile(r"/acme/([a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?)/([a-z-]+)(?:/(.+))?")
_UUID: Final = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_ACCOUNT: Final = re.compile(rf"({_UUID})(/orders)?")
_ORDER: Final = re.compile(rf"({_UUID})")
_AUTHORIZATION: Final = re.compile(rf"({_UUID})/([0-9]{{1,3}})")
_CHALLENGE: Final = re.compile(rf"({_UUID})/([0-9]{{1,3}})/({'|'.join(ChallengeType)})")
_RETRY_SECONDS: Final = 2
_LOG: Final = structlog.get_logger("kms.acme")


@dataclass(frozen=True, slots=True)
class Acme:
    """The use cases of ACME. *base* is the address of the server as its clients write it, `https://host[:port]`."""

    base: str
    nonces: Nonces
    authenticate: Authenticating
    accounts: ClientAccounts
    ordering: Ordering
    renewal: Renewal
    revoke: ClientRevoking
    issuing: Issuing


@asynccontextmanager
async def serving_acme(
    address: str, acme: Acme, limits: HttpLimits, tls: ssl.SSLContext, *, shares_port: bool = False
) -> AsyncIterator[int]:
    """Answer on *address* (`host:port`) within the block, and yield the port.

    *shares_port*: other workers listen there too. Raises MALFORMED where the process cannot listen there.
    """
    server = BoundedServer(_Answering(acme, limits).answer, limits, REQUEST_BYTES_MAX)
    async with listening(address, server, setting="acme.listen", shares_port=shares_port, tls=tls) as port:
        yield port


@dataclass(frozen=True, slots=True)
class _Sent:
    """What a request is answered with. None as *body*: nothing."""

    body: Mapping[str, Any] | str | None
    status: int = 200
    location: str = ""
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class _Post:
    """A POST that is authentic, and where it was sent."""

    request: Authentic
    addresses: Addresses
    rest: str
    peer: str

    @property
    def account(self) -> Account:
        """The account that has sent it. Raises a problem where there is none."""
        return self.request.require_account()


@dataclass(frozen=True, slots=True)
class _Answering:
    """Makes the response to each request."""

    acme: Acme
    limits: HttpLimits

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        """Return the response, with a nonce. Refusals are problem documents, and so is 500 for a bug, which the log has."""
        index = ""
        try:
            async with asyncio.timeout(self.limits.answer_seconds):
                found = _PATH.fullmatch(request.rel_url.raw_path)
                if found is None or request.rel_url.raw_query_string:
                    raise not_found()
                addresses = Addresses(self.acme.base, found[1])
                index = addresses.of("directory")
                return self._response(await self._answer(request, addresses, found[2], found[3] or ""), index)
        except web.HTTPException as error:
            return self._refused(AcmeError(ProblemType.MALFORMED, error.reason, status=error.status), index)
        except AcmeError as error:
            return self._refused(error, index)
        except KmsError as error:
            refusal = error_of(error)
            if refusal.status >= 500:
                _LOG.warning("not served", path=request.path, reason=error.reason, message=error.message)
            return self._refused(refusal, index)
        except TimeoutError:
            return self._refused(AcmeError(ProblemType.SERVER_INTERNAL, "this takes too long", status=503), index)
        except Exception:  # noqa: BLE001 - a bug here is told to the log, and to whoever asks as 500
            _LOG.exception("bug", path=request.path)
            return self._refused(AcmeError(ProblemType.SERVER_INTERNAL, "internal error"), index)

    async def _answer(self, request: web.BaseRequest, addresses: Addresses, resource: str, rest: str) -> _Sent:
        if (look := _LOOKS.get(resource)) is not None:
            if request.method not in ("GET", "HEAD"):
                raise AcmeError(ProblemType.MALFORMED, "expected GET", status=405)
            return await look(self, request, addresses, rest)
        post = _POSTS.get(resource)
        if post is None or bool(rest) is (resource in _WITHOUT_REST):
            raise not_found()
        if request.method != "POST":
            raise AcmeError(ProblemType.MALFORMED, "expected POST", status=405)
        if request.content_type != _JOSE:
            raise AcmeError(ProblemType.MALFORMED, f"expected the content type {_JOSE}", status=415)
        body, url = await request.read(), f"{self.acme.base}{request.rel_url.raw_path}"
        authentic = await self.acme.authenticate(body, url, addresses.authority, addresses.account())
        return await post(self, _Post(authentic, addresses, rest, request.remote or ""))

    async def directory(self, _: web.BaseRequest, addresses: Addresses, rest: str) -> _Sent:
        await self.acme.issuing.require(AuthorityRef(name=addresses.authority))
        if rest:
            raise not_found()
        return _Sent(wire_directory(addresses))

    async def new_nonce(self, request: web.BaseRequest, _: Addresses, rest: str) -> _Sent:
        if rest:
            raise not_found()
        return _Sent(None, status=200 if request.method == "HEAD" else 204)

    async def renewal_info(self, _: web.BaseRequest, addresses: Addresses, rest: str) -> _Sent:
        window = await self.acme.renewal.window(addresses.authority, rest)
        return _Sent(wire_window(window), headers=(("Retry-After", str(int(LOOK_AGAIN.total_seconds()))),))

    async def new_account(self, post: _Post) -> _Sent:
        if post.request.account is not None:
            raise malformed("protected: expected jwk, the key of the account")
        authority, key, wish = post.addresses.authority, post.request.key, post.request.object()
        await self.acme.issuing.require(AuthorityRef(name=authority))
        account, status = await self.acme.accounts.find_by_key(authority, key), 200
        if account is None:
            if wish.get("onlyReturnExisting") is True:
                raise AcmeError(ProblemType.ACCOUNT_DOES_NOT_EXIST, "no account has this key")
            url = post.addresses.of("new-account")
            account, status = await self.acme.accounts.bind(authority, key, wish, url, post.peer), 201
        return _Sent(wire_account(account, post.addresses), status, post.addresses.account(account.account_id))

    async def account(self, post: _Post) -> _Sent:
        found, account = _ACCOUNT.fullmatch(post.rest), post.account
        if found is None or found[1] != str(account.account_id):
            raise AcmeError(ProblemType.UNAUTHORIZED, "expected the address of the account that asks")
        if found[2]:
            post.request.check_look()
            return _Sent(wire_orders(await self.acme.ordering.page(account, ORDERS_MAX), post.addresses))
        if not post.request.is_look:
            account = await self.acme.accounts.update(account, post.request.object(), post.peer)
        return _Sent(wire_account(account, post.addresses))

    async def key_change(self, post: _Post) -> _Sent:
        account_url, url = post.addresses.account(post.account.account_id), post.addresses.of("key-change")
        account = await self.acme.accounts.change_key(post.account, post.request.object(), account_url, url, post.peer)
        return _Sent(wire_account(account, post.addresses), location=account_url)

    async def new_order(self, post: _Post) -> _Sent:
        order = await self.acme.ordering.order(post.account, post.request.object(), post.peer)
        return await self._order(order, post.addresses, status=201)

    async def order(self, post: _Post) -> _Sent:
        post.request.check_look()
        order = await self.acme.ordering.find(post.account, UUID(_parsed(_ORDER, post.rest)[1]))
        return await self._order(order, post.addresses)

    async def authorization(self, post: _Post) -> _Sent:
        found = _parsed(_AUTHORIZATION, post.rest)
        order_id, index = UUID(found[1]), int(found[2])
        if post.request.is_look:
            order = await self.acme.ordering.authorization(post.account, order_id, index)
        elif post.request.object() == {"status": Status.DEACTIVATED}:
            order = await self.acme.ordering.deactivate(post.account, order_id, index, post.peer)
        else:
            raise malformed("payload: expected an empty one, or the status deactivated")
        body = wire_authorization(order, index, post.addresses, await self.acme.ordering.now())
        return _Sent(body, headers=_wait(order.authorizations[index].status))

    async def challenge(self, post: _Post) -> _Sent:
        found = _parsed(_CHALLENGE, post.rest)
        order_id, index, challenge = UUID(found[1]), int(found[2]), ChallengeType(found[3])
        if post.request.is_look:
            order = await self.acme.ordering.authorization(post.account, order_id, index)
        else:
            post.request.object()
            order = await self.acme.ordering.respond(post.account, order_id, index, challenge, post.peer)
        up = f'<{post.addresses.authorization(order, index)}>;rel="up"'
        body = wire_challenge(order, index, challenge, post.addresses)
        return _Sent(body, headers=(("Link", up), *_wait(order.authorizations[index].status)))

    async def finalize(self, post: _Post) -> _Sent:
        order_id = UUID(_parsed(_ORDER, post.rest)[1])
        order = await self.acme.ordering.finalize(post.account, order_id, post.request.object(), post.peer)
        return await self._order(order, post.addresses)

    async def certificate(self, post: _Post) -> _Sent:
        post.request.check_look()
        issued = await self.acme.ordering.certificate(post.account, UUID(_parsed(_ORDER, post.rest)[1]), post.peer)
        return _Sent("".join(map(ssl.DER_cert_to_PEM_cert, (issued.certificate.der, *issued.chain))))

    async def revoke_certificate(self, post: _Post) -> _Sent:
        signer = post.request.account or post.request.key
        await self.acme.revoke(post.addresses.authority, signer, post.request.object(), post.peer)
        return _Sent(None)

    async def _order(self, order: Order, addresses: Addresses, status: int = 200) -> _Sent:
        now = await self.acme.ordering.now()
        return _Sent(wire_order(order, addresses, now), status, addresses.order(order), _wait(order.status(now)))

    def _response(self, sent: _Sent, index: str) -> web.Response:
        response = web.Response(status=sent.status)
        match sent.body:
            case None:
                pass
            case str():
                response = web.Response(status=sent.status, body=sent.body.encode(), content_type=CHAIN_TYPE)
            case _:
                response = web.json_response(dict(sent.body), status=sent.status)
        for name, value in sent.headers:
            response.headers.add(name, value)
        return self._completed(response, index, sent.location)

    def _refused(self, error: AcmeError, index: str) -> web.Response:
        body = {**wire_problem(error.problem), "status": error.status}
        response = web.json_response(body, status=error.status, content_type=_PROBLEM)
        if error.status in (429, 503):
            response.headers["Retry-After"] = str(_RETRY_SECONDS)
        return self._completed(response, index, error.location)

    def _completed(self, response: web.Response, index: str, location: str) -> web.Response:
        """Add what each response has: a nonce, where the directory is, and that nobody keeps it."""
        response.headers["Replay-Nonce"] = self.acme.nonces.new()
        response.headers["Cache-Control"] = "no-store"
        response.headers["X-Content-Type-Options"] = "nosniff"
        if index:
            response.headers.add("Link", f'<{index}>;rel="index"')
        if location:
            response.headers["Location"] = location
        return response


_LOOKS: Final[Mapping[str, Callable[[_Answering, web.BaseRequest, Addresses, str], Awaitable[_Sent]]]] = {
    "directory": _Answering.directory,
    "new-nonce": _Answering.new_nonce,
    "renewal-info": _Answering.renewal_info,
}
_POSTS: Final[Mapping[str, Callable[[_Answering, _Post], Awaitable[_Sent]]]] = {
    "new-account": _Answering.new_account,
    "new-order": _Answering.new_order,
    "key-change": _Answering.key_change,
    "revoke-cert": _Answering.revoke_certificate,
    "account": _Answering.account,
    "order": _Answering.order,
    "authz": _Answering.authorization,
    "chall": _Answering.challenge,
    "finalize": _Answering.finalize,
    "cert": _Answering.certificate,
}
_WITHOUT_REST: Final = frozenset({"new-account", "new-order", "key-change", "revoke-cert"})


def _parsed(pattern: re.Pattern[str], rest: str) -> re.Match[str]:
    found = pattern.fullmatch(rest)
    if found is None:
        raise not_found()
    return found


def _wait(status: Status) -> tuple[tuple[str, str], ...]:
    return (("Retry-After", str(_RETRY_SECONDS)),) if status is Status.PROCESSING else ()
