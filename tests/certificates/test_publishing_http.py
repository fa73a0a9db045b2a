"""The HTTP server of what is published: its paths, its headers and its bounds."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from urllib.parse import quote

import pytest
from aiohttp import ClientResponse, ClientSession
from yarl import URL

from kms.certificates.publishing.bounded import HttpLimits
from kms.certificates.publishing.documents import Document, IssuerPath
from kms.certificates.publishing.http import published
from kms.domain.errors import KmsError, Reason
from tests.certificates.memory_authority import NOW

_LIMITS = HttpLimits(connections_max=4, connection_seconds=20, answer_seconds=20)


@dataclass
class _Publications:
    """Says in each document which one it is. Of the authority `broken` nothing is to be had, and of `missing` there is none."""

    keeps: timedelta | None = timedelta(hours=1)
    asked: asyncio.Event = field(default_factory=asyncio.Event)
    goes_on: asyncio.Event = field(default_factory=asyncio.Event)

    async def certificate(self, issuer: IssuerPath) -> Document:
        return await self._document("certificate", issuer)

    async def crl(self, issuer: IssuerPath, shard: int) -> Document:
        return await self._document(f"crl {shard}", issuer)

    async def ocsp(self, issuer: IssuerPath, request: bytes) -> Document:
        return await self._document(f"ocsp {request.hex()}", issuer)

    async def _document(self, kind: str, issuer: IssuerPath) -> Document:
        match issuer.name:
            case "missing":
                raise KmsError(Reason.AUTHORITY_NOT_FOUND, "there is no such authority")
            case "broken":
                raise KmsError(Reason.HSM_UNAVAILABLE, "the token says: secret")
            case "bug":
                raise ZeroDivisionError("secret")
            case "slow":
                self.asked.set()
                await self.goes_on.wait()
        return Document(f"{kind} of {issuer}".encode(), NOW, None if self.keeps is None else NOW + self.keeps)


def _now() -> datetime:
    return NOW + timedelta(minutes=1)


@asynccontextmanager
async def _serving(publications: _Publications | None = None, limits: HttpLimits = _LIMITS) -> AsyncIterator[tuple[str, int]]:
    async with published("127.0.0.1:0", publications or _Publications(), limits, _now) as port:
        yield f"http://127.0.0.1:{port}", port


async def _get(url: str, path: str, **options: object) -> tuple[ClientResponse, bytes]:
    async with ClientSession() as session, session.get(URL(url + path, encoded=True), **options) as answer:  # type: ignore[arg-type]
        return answer, await answer.read()


@pytest.mark.parametrize(
    ("path", "content", "content_type"),
    [
        ("/ca/root/1.crt", b"certificate of root/1", "application/pkix-cert"),
        ("/crl/root/12.crl", b"crl 0 of root/12", "application/pkix-crl"),
        ("/crl/root/12/7.crl", b"crl 7 of root/12", "application/pkix-crl"),
        ("/ocsp/root/1/" + quote("//4//w==", safe=""), b"ocsp fffe3fff of root/1", "application/ocsp-response"),
        ("/ocsp/root/1//+//", b"ocsp ffefff of root/1", "application/ocsp-response"),
    ],
)
async def test_each_document_has_a_path_and_a_content_type(path: str, content: bytes, content_type: str) -> None:
    async with _serving() as (url, _):
        answer, body = await _get(url, path)
    assert (answer.status, body, answer.headers["Content-Type"]) == (200, content, content_type)


async def test_an_ocsp_request_may_be_posted() -> None:
    async with _serving() as (url, _), ClientSession() as session:
        headers = {"Content-Type": "application/ocsp-request"}
        async with session.post(f"{url}/ocsp/root/1", data=b"\x30\x00", headers=headers) as answer:
            assert (answer.status, await answer.read()) == (200, b"ocsp 3000 of root/1")
        async with session.post(f"{url}/ocsp/root/1", data=b"\x30\x00") as answer:
            assert answer.status == 415


async def test_caches_may_keep_a_document_until_the_next_update() -> None:
    async with _serving() as (url, _):
        answer, _ = await _get(url, "/crl/root/1.crl")
        assert answer.headers["Cache-Control"] == "max-age=3540, public, no-transform, must-revalidate"
        assert answer.headers["Last-Modified"] == "Mon, 01 Jun 2026 12:00:00 GMT"
        assert answer.headers["Expires"] == "Mon, 01 Jun 2026 13:00:00 GMT"
        again, body = await _get(url, "/crl/root/1.crl", headers={"If-None-Match": answer.headers["ETag"]})
        assert (again.status, body) == (304, b"")


async def test_a_document_that_is_not_kept_says_so() -> None:
    async with _serving(_Publications(keeps=None)) as (url, _):
        answer, _ = await _get(url, "/ocsp/root/1/MAA=")
    assert answer.headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/", 404),
        ("/crl/root/0.crl", 404),
        ("/crl/root/1/2/3.crl", 404),
        ("/crl/..%2Froot/1.crl", 400),
        ("/crl/ROOT/1.crl", 400),
        ("/ca/missing/1.crt", 404),
        ("/ca/root/1.crt/", 404),
        ("/ocsp/root/1", 405),
        ("/ocsp/root/1/not-base64", 400),
        ("/ocsp/root/1/" + "A" * 5600, 400),
        ("/ca/" + "a" * 9000 + "/1.crt", 400),
        ("/ca/broken/1.crt", 503),
        ("/ca/bug/1.crt", 500),
    ],
)
async def test_what_is_not_published_is_refused_and_tells_nothing(path: str, status: int) -> None:
    async with _serving() as (url, _):
        answer, body = await _get(url, path)
    assert answer.status == status
    assert b"secret" not in body
    assert (answer.headers.get("Retry-After") is not None) == (status == 503)


async def test_a_body_over_4_kib_is_refused() -> None:
    async with _serving() as (url, _), ClientSession() as session:
        headers = {"Content-Type": "application/ocsp-request"}
        async with session.post(f"{url}/ocsp/root/1", data=b"x" * 4097, headers=headers) as answer:
            assert answer.status == 413


async def test_one_connection_too_many_is_cut_and_the_others_go_on() -> None:
    async with _serving(limits=HttpLimits(connections_max=2, connection_seconds=20)) as (_, port):
        taken = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        await _asked(*taken[0])  # both are counted: connections are accepted in their order
        await _asked(*taken[1])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        assert await _rest(reader) == b""
        writer.close()
        assert b"200 OK" in await _asked(*taken[0])
        for _, each in taken:
            each.close()


async def test_a_connection_that_says_nothing_is_cut() -> None:
    async with _serving(limits=HttpLimits(connection_seconds=0.05)) as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        assert await _rest(reader) == b""
        writer.close()


@pytest.mark.parametrize(
    "begin",
    [
        b"GET /ca/root/1.crt HTTP/1.1\r\nX: ",
        b"POST /ocsp/root/1 HTTP/1.1\r\nHost: x\r\nContent-Type: application/ocsp-request\r\nContent-Length: 4000\r\n\r\n",
    ],
)
async def test_a_request_that_comes_byte_by_byte_is_cut_without_an_answer(begin: bytes) -> None:
    async with _serving(limits=HttpLimits(connection_seconds=0.2, answer_seconds=1000)) as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(begin)
        rest = asyncio.create_task(_rest(reader))
        while not rest.done():
            writer.write(b"G")
            await asyncio.sleep(0.01)
        assert rest.result() == b""
        writer.close()


async def test_what_is_no_request_is_answered_and_leaves_nothing_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async with _serving() as (_, port):
        for content in (b"\0\0\0\r\n\r\n", b"GET /ca/root/1.crt HTTP/1.1\r\n\r\n"):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(content)
            assert b" 400 " in await _rest(reader)
            writer.close()
    assert caplog.records == [], "anybody could fill the log"


async def test_an_answer_that_takes_too_long_is_given_up() -> None:
    publications = _Publications()
    async with _serving(publications, HttpLimits(answer_seconds=0.05)) as (url, _):
        answer, _ = await _get(url, "/ca/slow/1.crt")
    assert answer.status == 503
    assert publications.asked.is_set()


async def test_a_port_that_is_taken_is_told() -> None:
    async with _serving() as (_, port):
        with pytest.raises(KmsError) as caught:
            async with published(f"127.0.0.1:{port}", _Publications(), _LIMITS, _now):
                pass
    assert caught.value.metadata["field"] == "publishing.listen"


async def test_workers_share_a_port() -> None:
    publications = _Publications()
    async with (
        published("127.0.0.1:0", publications, _LIMITS, _now, shares_port=True) as port,
        published(f"127.0.0.1:{port}", publications, _LIMITS, _now, shares_port=True) as same,
    ):
        assert same == port


async def _asked(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    writer.write(b"GET /ca/root/1.crt HTTP/1.1\r\nHost: x\r\n\r\n")
    head = await reader.readuntil(b"\r\n\r\n")
    return head + await reader.readexactly(len(b"certificate of root/1"))


async def _rest(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.read()
    except ConnectionResetError:
        return b""
