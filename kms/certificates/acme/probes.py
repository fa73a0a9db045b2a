"""Challenges, asked from here: http-01 and dns-01 (RFC 8555 section 8).

A client chooses which hosts this service connects to. So a probe asks for one path on one port, follows nothing, reads little,
and repeats nothing of the answer. The address is looked up once, checked, and then connected to. Addresses that mean this host or
its link are refused, unless the operator has named their networks.
"""

import asyncio
import hmac
import ipaddress
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import aiohttp
import dns.asyncresolver
import dns.exception
import dns.nameserver
import dns.resolver
from aiohttp.abc import AbstractResolver, ResolveResult

from kms.certificates.acme.problems import AcmeError, ProblemType
from kms.certificates.names import WILDCARD, GeneralName, NameKind

PATH: Final = "/.well-known/acme-challenge/"
HTTP_PORT: Final = 80
SECONDS: Final = 10.0
ADDRESSES_MAX: Final = 8
_BODY_BYTES_MAX: Final = 1024
_RECORDS_MAX: Final = 100
_OK: Final = 200

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True, slots=True)
class NetworkProbes:
    """`Probes`. *resolvers* are (address, port) of DNS servers; none: those of this host. *networks* are asked in addition."""

    resolvers: Sequence[tuple[str, int]] = ()
    networks: Sequence[Network] = ()
    http_port: int = HTTP_PORT
    seconds: float = SECONDS
    at_once: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(32))

    async def ask_http(self, name: GeneralName, token: str, key_authorization: str) -> None:
        """See `Probes.ask_http`."""
        async with self.at_once:
            try:
                async with asyncio.timeout(self.seconds):
                    addresses = await self._addresses(name)
                    status, body = await self._get(name, addresses, PATH + token)
            except TimeoutError:
                raise _no_connection(name, "no answer in time") from None
            except (aiohttp.ClientError, OSError, ValueError):
                raise _no_connection(name, "no answer over HTTP") from None
        if status != _OK:
            raise AcmeError(ProblemType.INCORRECT_RESPONSE, f"{name.value}: expected status 200 at {PATH}…, not {status}")
        if not hmac.compare_digest(body.rstrip(), key_authorization.encode()):
            raise AcmeError(ProblemType.INCORRECT_RESPONSE, f"{name.value}: expected the key authorization at {PATH}…")

    async def ask_dns(self, name: GeneralName, digest: str) -> None:
        """See `Probes.ask_dns`."""
        domain = f"_acme-challenge.{name.value.removeprefix(WILDCARD)}"
        async with self.at_once:
            try:
                found = await self._resolver().resolve(f"{domain}.", "TXT", lifetime=self.seconds)
            except (dns.resolver.NXDOMAIN, dns.resolver.NoAnswer):
                raise AcmeError(ProblemType.DNS, f"{domain}: there is no TXT record") from None
            except (dns.exception.DNSException, OSError, ValueError):
                raise AcmeError(ProblemType.DNS, f"{domain}: the DNS does not answer") from None
        texts = [b"".join(record.strings) for record in list(found)[:_RECORDS_MAX]]
        if digest.encode() not in texts:
            raise AcmeError(ProblemType.UNAUTHORIZED, f"{domain}: none of {len(texts)} TXT records has the digest")

    async def _addresses(self, name: GeneralName) -> list[Address]:
        """Return the addresses of a host that may be asked. Raises a problem where there is none."""
        if name.kind is NameKind.IP:
            found = [name.value]
        else:
            found = await self._look_up(name.value)
        addresses = [address for each in found[:ADDRESSES_MAX] if self._may_ask(address := ipaddress.ip_address(each))]
        if not addresses:
            raise AcmeError(ProblemType.CONNECTION, f"{name.value}: it has no address that this service asks")
        return addresses

    async def _look_up(self, domain: str) -> list[str]:
        resolver, found = self._resolver(), list[str]()
        for kind in ("A", "AAAA"):
            try:
                found += [record.address for record in await resolver.resolve(f"{domain}.", kind, lifetime=self.seconds)]
            except (dns.resolver.NXDOMAIN, dns.resolver.NoAnswer):
                continue
            except (dns.exception.DNSException, OSError):
                raise AcmeError(ProblemType.DNS, f"{domain}: the DNS does not answer") from None
        return found

    async def _get(self, name: GeneralName, addresses: Sequence[Address], path: str) -> tuple[int, bytes]:
        """Return the status and the beginning of the body at *path* of a host that has *addresses*."""
        host = f"[{name.value}]" if ":" in name.value else name.value
        port = "" if self.http_port == HTTP_PORT else f":{self.http_port}"
        connector = aiohttp.TCPConnector(resolver=_Known(addresses), use_dns_cache=False, force_close=True)
        async with (
            aiohttp.ClientSession(
                connector=connector,
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                headers={"User-Agent": "neo-kms-acme", "Accept-Encoding": "identity"},
            ) as session,
            session.get(f"http://{host}{port}{path}", allow_redirects=False) as response,
        ):
            body = b""
            while len(body) <= _BODY_BYTES_MAX and (chunk := await response.content.read(_BODY_BYTES_MAX)):
                body += chunk
            return response.status, body

    def _may_ask(self, address: Address) -> bool:
        """Whether an address is a host like others, or lies in a network that the operator has named."""
        mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
        asked = mapped or address
        if any(asked in network for network in self.networks):
            return True
        is_near = asked.is_loopback or asked.is_link_local or asked.is_unspecified
        return not (is_near or asked.is_multicast or asked.is_reserved)

    def _resolver(self) -> dns.asyncresolver.Resolver:
        if not self.resolvers:
            return dns.asyncresolver.Resolver()
        resolver = dns.asyncresolver.Resolver(configure=False)
        resolver.nameservers = [dns.nameserver.Do53Nameserver(address, port) for address, port in self.resolvers]
        return resolver


class _Known(AbstractResolver):
    """Gives the addresses that were checked, so that no second look-up gives others."""

    def __init__(self, addresses: Sequence[Address]) -> None:
        self._addresses = addresses

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC) -> list[ResolveResult]:
        """Return the addresses."""
        return [
            ResolveResult(
                hostname=host,
                host=str(address),
                port=port,
                family=socket.AF_INET if address.version == 4 else socket.AF_INET6,
                proto=0,
                flags=socket.AI_NUMERICHOST,
            )
            for address in self._addresses
        ]

    async def close(self) -> None:
        """Keep nothing."""


def _no_connection(name: GeneralName, what: str) -> AcmeError:
    return AcmeError(ProblemType.CONNECTION, f"{name.value}: {what}")
