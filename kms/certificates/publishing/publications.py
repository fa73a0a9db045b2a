"""The port `Publications`: authorities, CRLs and OCSP answers, remembered for when database or token do not answer."""

import asyncio
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final

from kms.certificates.authority import Authority, AuthorityRef, authority_not_found
from kms.certificates.crls import CrlPublishing, SignedCrl
from kms.certificates.ocsp import OcspAnswering
from kms.certificates.ports import Authorities
from kms.certificates.publishing.documents import Document, IssuerPath
from kms.domain.errors import KmsError, Reason

AT_ONCE: Final = 4
_LOOK_AGAIN_SECONDS: Final = 1.0
_UNKNOWN_MAX: Final = 1_000
_CERTIFICATE_KEPT: Final = timedelta(days=1)
_AWAY: Final = frozenset({Reason.STORE_UNAVAILABLE, Reason.HSM_UNAVAILABLE})


@dataclass(slots=True)
class _Known:
    """An authority that was proven, and when it was looked at, in seconds of a clock that only goes on."""

    authority: Authority
    looked_at: float
    crls_looked_at: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RememberedPublications:
    """`Publications`. *now* is the host's clock: it answers also where the database does not.

    Strangers ask. Names that nobody has are remembered for a second, and of the pool's connections they hold a few at a time.
    """

    authorities: Authorities
    publishing: CrlPublishing
    answering: OcspAnswering
    now: Callable[[], datetime]
    monotonic: Callable[[], float]
    _known: MutableMapping[IssuerPath, _Known] = field(default_factory=dict, repr=False)
    _unknown: MutableMapping[IssuerPath, float] = field(default_factory=dict, repr=False)
    _room: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(AT_ONCE), repr=False)

    async def certificate(self, issuer: IssuerPath) -> Document:
        """See `Publications.certificate`."""
        authority = (await self._find(issuer)).authority
        if authority.certificate is None:
            raise authority_not_found()
        return Document(authority.certificate, authority.created_at, self.now() + _CERTIFICATE_KEPT)

    async def crl(self, issuer: IssuerPath, shard: int) -> Document:
        """See `Publications.crl`."""
        known = await self._find(issuer)
        if known.authority.certificate is None or shard > known.authority.crl_shards:
            raise authority_not_found()
        newest = await self._crl(known, shard)
        return Document(newest.der, newest.crl.this_update, newest.crl.next_update)

    async def ocsp(self, issuer: IssuerPath, request: bytes) -> Document:
        """See `Publications.ocsp`."""
        authority = (await self._find(issuer)).authority
        async with self._room:
            return await self.answering.answer(authority, request)

    async def _find(self, issuer: IssuerPath) -> _Known:
        """Return an authority as it was proven a second ago at most, or before database or token went away."""
        known, now = self._known.get(issuer), self.monotonic()
        if known is not None and now - known.looked_at < _LOOK_AGAIN_SECONDS:
            return known
        if now - self._unknown.get(issuer, -_LOOK_AGAIN_SECONDS) < _LOOK_AGAIN_SECONDS:
            raise authority_not_found()
        try:
            async with self._room:
                authority = await self.authorities.find(AuthorityRef(name=issuer.name, generation=issuer.generation))
        except KmsError as error:
            if known is None or error.reason not in _AWAY:
                raise
            return known
        if authority is None:
            if len(self._unknown) >= _UNKNOWN_MAX:
                self._unknown.clear()
            self._unknown[issuer] = now
            raise authority_not_found()
        if known is None:
            known = self._known[issuer] = _Known(authority, now)
        known.authority, known.looked_at = authority, now
        return known

    async def _crl(self, known: _Known, shard: int) -> SignedCrl:
        authority, now = known.authority, self.monotonic()
        newest = self.publishing.remembered(authority, shard)
        if newest is not None and now - known.crls_looked_at.get(shard, -_LOOK_AGAIN_SECONDS) < _LOOK_AGAIN_SECONDS:
            return newest
        try:
            newest = await self.publishing.current(authority, shard) or await self.publishing.publish(authority, shard)
        except KmsError as error:
            if newest is None or error.reason not in _AWAY:
                raise
        known.crls_looked_at[shard] = now
        return newest
