"""The CRLs of authorities: made when something was revoked and at intervals, signed by the token, checked before they are shown.

A row of the database proves nothing. A CRL is believed with the authority's signature, if it is no older than one that this
process has seen, and if it lists what the journal knows to be revoked. The next CRL is made of the one before. So what is on the
list stays there, whatever a row of the database says.
"""

from collections.abc import Callable, Mapping, MutableMapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final, Protocol
from uuid import UUID

import structlog

from kms.certificates.authority import Authority, AuthorityRef, check_signs
from kms.certificates.certificate import Revocation
from kms.certificates.crl import Crl, is_due, next_crl
from kms.certificates.ports import Authorities, Certificates
from kms.certificates.revocation_ports import Crls, JournaledRevocations, Signer, StoredCrl
from kms.certificates.x509.aside import aside
from kms.certificates.x509.crls import build_crl, parse_crl
from kms.domain.errors import KmsError, Reason

_ATTEMPTS: Final = 5
_LOOKED_AT_MAX: Final = 1_000
_BYTES_PER_ENTRY: Final = 40
_CLOCKS_APART_MAX: Final = timedelta(minutes=1)
_LOG = structlog.get_logger("kms.certificates")

Shard = tuple[UUID, int]


class Locks(Protocol):
    """One lock for each shard."""

    def __call__(self, shard: Shard, /) -> AbstractAsyncContextManager[object]:
        """Return the lock of a shard."""
        ...


@dataclass(frozen=True, slots=True)
class SignedCrl:
    """A CRL that was believed, and what it says."""

    der: bytes = field(repr=False)
    crl: Crl = field(repr=False)


@dataclass(frozen=True, slots=True)
class CrlPublishing:
    """Makes and reads CRLs. *clock* is the host's.

    `_newest` remembers, by shard, the CRL with the highest number that this process has seen.
    `_complete` remembers the number of a CRL, and how many of the journal's revocations it was seen to list.
    """

    authorities: Authorities
    certificates: Certificates
    crls: Crls
    signer: Signer
    journaled: JournaledRevocations
    locks: Locks
    clock: Callable[[], datetime]
    _newest: MutableMapping[Shard, SignedCrl] = field(default_factory=dict, repr=False)
    _complete: MutableMapping[Shard, tuple[int, int]] = field(default_factory=dict, repr=False)

    async def current(self, authority: Authority, shard: int) -> SignedCrl | None:
        """Return the newest CRL of a shard that may be shown, or None.

        Raises STORE_UNAVAILABLE; a caller may go on with `remembered` then.
        """
        await self._read(authority, shard)
        return self.remembered(authority, shard)

    def remembered(self, authority: Authority, shard: int) -> SignedCrl | None:
        """Return the newest CRL of a shard that this process has seen, or None: also where it lacks what the journal has."""
        newest = self._newest.get((authority.authority_id, shard))
        if newest is None or self._missing(authority, shard, newest.crl):
            return None
        return newest

    async def publish(self, authority: Authority, shard: int, *, even_unchanged: bool = False) -> SignedCrl:
        """Make the next CRL of a shard if it is due or if something was revoked, and return the newest.

        Raises AUTHORITY_INACTIVE for an authority without a certificate that is valid, HSM_UNAVAILABLE, STORE_UNAVAILABLE.
        """
        async with self.locks((authority.authority_id, shard)):
            for _ in range(_ATTEMPTS):
                now = await self.authorities.now()
                check_signs(authority, now)
                row = await self._read(authority, shard)
                newest = self._newest.get((authority.authority_id, shard))
                added, expired = await self._changes(authority, shard, newest)
                if newest is not None and not added and not even_unchanged and not is_due(newest.crl, now):
                    return newest
                made = await self._made(authority, shard, newest, added, expired, now)
                if await self.crls.store(authority.authority_id, shard, 0 if row is None else row.number, made.crl, made.der):
                    self._newest[authority.authority_id, shard] = made
                    return made
            raise KmsError(Reason.STALE, "other workers make CRLs of the authority all the time")

    async def publish_due(self) -> None:
        """Make each CRL that is due. What fails for one authority is logged, and holds up no other."""
        failure: KmsError | None = None
        for issuer_id, shard in await self.crls.to_look_at(_LOOKED_AT_MAX):
            try:
                authority = await self.authorities.find(AuthorityRef(authority_id=issuer_id))
                if authority is not None:
                    await self.publish(authority, shard)
            except KmsError as error:
                _LOG.error("CRL not published", authority=str(issuer_id), shard=shard, reason=error.reason, message=error.message)
                failure = error
        if failure is not None:
            raise failure

    async def _read(self, authority: Authority, shard: int) -> StoredCrl | None:
        """Look at the row of the database, and remember its CRL if it is a later one. Return the row."""
        row = await self.crls.find(authority.authority_id, shard)
        newest = self._newest.get((authority.authority_id, shard))
        if row is None or authority.certificate is None or (newest is not None and row.crl == newest.der):
            return row
        try:
            crl = await aside(len(row.crl) // _BYTES_PER_ENTRY, parse_crl, row.crl, authority.certificate)
        except KmsError as error:
            _LOG.error("stored CRL refused", authority=str(authority.authority_id), shard=shard, message=error.message)
            return row
        if newest is not None and crl.number <= newest.crl.number:
            _LOG.error("stored CRL refused: an older one", authority=str(authority.authority_id), shard=shard, number=crl.number)
        elif crl.distribution_point not in _points(authority, shard):
            _LOG.error("stored CRL refused: of another shard", authority=str(authority.authority_id), shard=shard)
        elif crl.this_update > self.clock() + _CLOCKS_APART_MAX:
            _LOG.error("stored CRL refused: of the future", authority=str(authority.authority_id), shard=shard, number=crl.number)
        else:
            self._newest[authority.authority_id, shard] = SignedCrl(row.crl, crl)
        return row

    async def _changes(
        self, authority: Authority, shard: int, newest: SignedCrl | None
    ) -> tuple[Mapping[int, Revocation], set[int]]:
        """Return what the next CRL adds, each proven by its record or by the journal, and what it leaves out."""
        listed: Mapping[int, Revocation] = {} if newest is None else newest.crl.entries
        since = None if newest is None else newest.crl.this_update
        revoked = await self.crls.revoked(authority.authority_id, shard, since)
        records = await self.crls.proven([each for serial, each in revoked.items() if serial not in listed])
        added = dict(self._missing(authority, shard, None if newest is None else newest.crl))
        for record in records:
            is_of_shard = record.issuer_id == authority.authority_id and record.crl_shard == shard
            if is_of_shard and record.revocation is not None:
                added[record.serial_number] = record.revocation
        gone = listed.keys() - revoked.keys()
        return added, {serial for serial in gone if since is not None and await self._had_ended(authority, serial, since)}

    async def _had_ended(self, authority: Authority, serial_number: int, moment: datetime) -> bool:
        """Whether the proven record of a certificate says that it had ended at *moment*."""
        try:
            certificate = await self.certificates.find_by_serial(authority.authority_id, serial_number)
        except KmsError as error:
            if error.reason is not Reason.RECORD_INVALID:
                raise
            return False
        return certificate is not None and certificate.not_after < moment

    def _missing(self, authority: Authority, shard: int, crl: Crl | None) -> Mapping[int, Revocation]:
        """Return what the journal knows to be revoked and *crl* lacks. What had expired when it was made may be missing."""
        number, seen = self._complete.get((authority.authority_id, shard), (0, 0))
        if crl is None or crl.number != number:
            seen = 0
        known = self.journaled.of_shard(authority.authority_id, shard, after=seen)
        missing = {
            each.serial_number: each.revocation
            for each in known
            if crl is None or (each.serial_number not in crl.entries and each.expires_at >= crl.this_update)
        }
        if crl is not None and not missing:
            self._complete[authority.authority_id, shard] = crl.number, seen + len(known)
        return missing

    async def _made(
        self,
        authority: Authority,
        shard: int,
        newest: SignedCrl | None,
        added: Mapping[int, Revocation],
        expired: set[int],
        now: datetime,
    ) -> SignedCrl:
        if authority.certificate is None:
            raise AssertionError("checked: the authority signs")
        crl = next_crl(None if newest is None else newest.crl, added, expired, now, _points(authority, shard)[0])
        unsigned = await aside(len(crl.entries), build_crl, crl, authority.certificate)
        details = {"crl": str(crl.number), "shard": str(shard)}
        return SignedCrl(await self.signer.sign_for(None, authority, unsigned, details), crl)


def _points(authority: Authority, shard: int) -> tuple[str, ...]:
    """Return the distribution points that the CRL of a shard may name, the one of the next first.

    The CRL of shard 0 lists all certificates, and names no point, until the authority has shards.
    """
    url = authority.crl_url_of(shard)
    if shard:
        return (url,)
    return (url, "") if authority.crl_shards else ("", url)
