"""The HTTP server of what is published. It asks nobody who they are, and everything that it sends is public.

    GET  /ca/NAME/GENERATION.crt            the certificate of an authority
    GET  /crl/NAME/GENERATION[/SHARD].crl   its CRL
    POST /ocsp/NAME/GENERATION              an OCSP request in the body
    GET  /ocsp/NAME/GENERATION/BASE64       an OCSP request in the path (RFC 6960 appendix A.1)

Anybody may reach this address. So connections are few and short, and requests are small.
"""

import asyncio
import logging
import re
from base64 import b64decode
from binascii import Error as Base64Error
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import format_datetime
from hashlib import sha256
from typing import Final
from urllib.parse import unquote_to_bytes

import structlog
from aiohttp import web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http_parser import RawRequestMessage
from aiohttp.streams import StreamReader
from aiohttp.web_protocol import RequestHandler

from kms.certificates.publishing.documents import Document, Publications, parse_issuer
from kms.domain.errors import KmsError, Reason, malformed

REQUEST_BYTES_MAX: Final = 4096
_CERTIFICATE_TYPE: Final = "application/pkix-cert"
_CRL_TYPE: Final = "application/pkix-crl"
_REQUEST_TYPE: Final = "application/ocsp-request"
_ANSWER_TYPE: Final = "application/ocsp-response"
_NUMBER: Final = r"[1-9][0-9]{0,5}"
_CERTIFICATE: Final = re.compile(rf"/ca/([^/]+)/({_NUMBER})\.crt")
_CRL: Final = re.compile(rf"/crl/([^/]+)/({_NUMBER})(?:/({_NUMBER}))?\.crl")
_OCSP: Final = re.compile(rf"/ocsp/([^/]+)/({_NUMBER})(?:/(.+))?")
_RETRY_SECONDS: Final = 5
_LOG = structlog.get_logger("kms.publishing")
# aiohttp logs each request that it cannot read, with a traceback. Our own bugs are logged here.
_UNHEARD: Final = logging.getLogger("kms.publishing.aiohttp")
_UNHEARD.disabled = True


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """How many connections may be open at a time, and how long each of them and each answer may take."""

    connections_max: int = 256
    connection_seconds: float = 30.0
    answer_seconds: float = 10.0


@asynccontextmanager
async def published(
    address: str, publications: Publications, limits: HttpLimits, clock: Callable[[], datetime], *, shares_port: bool = False
) -> AsyncIterator[int]:
    """Answer on *address* (`host:port`) within the block, and yield the port.

    *shares_port*: other workers listen there too. Raises MALFORMED where the process cannot listen there.
    """
    host, _, port = address.rpartition(":")
    runner = web.ServerRunner(_BoundedServer(_Answering(publications, limits, clock), limits), shutdown_timeout=1.0)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host.strip("[]"), int(port), reuse_port=shares_port).start()
        except OSError as error:
            raise malformed("publishing.listen", f"cannot listen on {address}: {error.strerror or error}") from None
        yield int(runner.addresses[0][1])
    finally:
        await runner.cleanup()


class _BoundedServer(web.Server):
    """Answers so many connections at a time, each for so long, whatever its client does."""

    def __init__(self, answering: "_Answering", limits: HttpLimits) -> None:
        super().__init__(
            answering.answer,
            request_factory=self._bounded_request,
            keepalive_timeout=5.0,
            max_headers=64,
            max_field_size=4096,
            lingering_time=0.0,
            auto_decompress=False,
            access_log=None,
            logger=_UNHEARD,
        )
        self._limits = limits
        self._ends: dict[RequestHandler, asyncio.TimerHandle] = {}

    def connection_made(self, handler: RequestHandler, transport: asyncio.Transport) -> None:
        """Count a connection. One too many is cut at once."""
        super().connection_made(handler, transport)
        if len(self._ends) >= self._limits.connections_max:
            transport.abort()
            return
        loop = asyncio.get_running_loop()
        self._ends[handler] = loop.call_later(self._limits.connection_seconds, transport.abort)

    def connection_lost(self, handler: RequestHandler, exc: BaseException | None = None) -> None:
        """Forget a connection."""
        if (end := self._ends.pop(handler, None)) is not None:
            end.cancel()
        super().connection_lost(handler, exc)

    def _bounded_request(
        self,
        message: RawRequestMessage,
        payload: StreamReader,
        protocol: RequestHandler,
        writer: AbstractStreamWriter,
        task: "asyncio.Task[None]",
    ) -> web.BaseRequest:
        loop = asyncio.get_running_loop()
        return web.BaseRequest(message, payload, protocol, writer, task, loop, client_max_size=REQUEST_BYTES_MAX)


@dataclass(frozen=True, slots=True)
class _Answering:
    """Makes the response to each request."""

    publications: Publications
    limits: HttpLimits
    clock: Callable[[], datetime]

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        """Return the response: 503 where the document is not to be had now, and 500 for a bug, which the log has."""
        try:
            async with asyncio.timeout(self.limits.answer_seconds):
                return await self._answer(request)
        except web.HTTPException:
            raise
        except TimeoutError:
            return _refused(503, "this takes too long", retry=True)
        except KmsError as error:
            if error.reason is Reason.MALFORMED:
                return _refused(400, error.message)
            if error.reason is Reason.AUTHORITY_NOT_FOUND:
                return _refused(404, error.message)
            _LOG.warning("not published", path=request.path, reason=error.reason, message=error.message)
            return _refused(503, "not available now", retry=True)
        except Exception:  # noqa: BLE001 - a bug here is told to the log, and to whoever asks as 500
            _LOG.exception("bug", path=request.path)
            return _refused(500, "internal error")

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        path = request.rel_url.raw_path
        if found := _CERTIFICATE.fullmatch(path):
            _check_method(request, "GET", "HEAD")
            document = await self.publications.certificate(parse_issuer(found[1], found[2]))
            return self._sent(request, document, _CERTIFICATE_TYPE)
        if found := _CRL.fullmatch(path):
            _check_method(request, "GET", "HEAD")
            document = await self.publications.crl(parse_issuer(found[1], found[2]), int(found[3] or 0))
            return self._sent(request, document, _CRL_TYPE)
        if found := _OCSP.fullmatch(path):
            content = await _ocsp_request(request, found[3])
            document = await self.publications.ocsp(parse_issuer(found[1], found[2]), content)
            return self._sent(request, document, _ANSWER_TYPE)
        return _refused(404, "there are /ca, /crl and /ocsp")

    def _sent(self, request: web.BaseRequest, document: Document, content_type: str) -> web.StreamResponse:
        """Return *document* with what caches need to know (RFC 5019 section 6.2)."""
        headers = {"Content-Type": content_type, "X-Content-Type-Options": "nosniff"}
        if document.next_update is None:
            return web.Response(body=document.content, headers={**headers, "Cache-Control": "no-store"})
        tag = f'"{sha256(document.content).hexdigest()}"'
        seconds = max(0, int((document.next_update - self.clock()).total_seconds()))
        headers |= {
            "ETag": tag,
            "Last-Modified": _http_date(document.this_update),
            "Expires": _http_date(document.next_update),
            "Cache-Control": f"max-age={seconds}, public, no-transform, must-revalidate",
        }
        if request.method != "POST" and request.headers.get("If-None-Match") == tag:
            return web.Response(status=304, headers=headers)
        return web.Response(body=document.content, headers=headers)


async def _ocsp_request(request: web.BaseRequest, encoded: str | None) -> bytes:
    """Return the OCSP request in the path or in the body. Raises MALFORMED, and an HTTPException for a wrong method or type."""
    if encoded is None:
        _check_method(request, "POST")
        if request.content_type != _REQUEST_TYPE:
            raise web.HTTPUnsupportedMediaType(text=f"expected {_REQUEST_TYPE}\n")
        return await request.read()
    _check_method(request, "GET", "HEAD")
    try:
        content = b64decode(unquote_to_bytes(encoded), validate=True)
    except (Base64Error, ValueError):
        raise malformed("path", "expected an OCSP request in base64") from None
    if len(content) > REQUEST_BYTES_MAX:
        raise malformed("path", f"expected an OCSP request of at most {REQUEST_BYTES_MAX} bytes")
    return content


def _check_method(request: web.BaseRequest, *methods: str) -> None:
    if request.method not in methods:
        raise web.HTTPMethodNotAllowed(request.method, methods)


def _refused(status: int, text: str, *, retry: bool = False) -> web.Response:
    headers = {"Cache-Control": "no-store", **({"Retry-After": str(_RETRY_SECONDS)} if retry else {})}
    return web.Response(status=status, text=f"{text}\n", headers=headers)


def _http_date(moment: datetime) -> str:
    return format_datetime(moment.astimezone(UTC), usegmt=True)
