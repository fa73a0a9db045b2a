"""What a CRL says, and which follows it. Pure values and decisions.

    revoked ──► on the next CRL and on each one after it ──► expired: on one more CRL ──► gone (RFC 5280 section 3.3)

A revocation is for good. certificateHold and removeFromCRL are not offered.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from kms.certificates.certificate import Revocation, RevocationReason
from kms.domain.errors import malformed

CRL_LIFETIME: Final = timedelta(days=7)
CRL_INTERVAL: Final = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Crl:
    """What a CRL says. `number` is its CRL number; `entries` are by serial number, their moments in whole seconds.

    `distribution_point` is the address that its certificates name; empty for the one CRL of an authority.
    """

    number: int
    this_update: datetime
    next_update: datetime
    distribution_point: str
    entries: Mapping[int, Revocation]


def parse_reason(number: int) -> RevocationReason:
    """Return the reason with this number, or raise MALFORMED."""
    try:
        return RevocationReason(number)
    except ValueError:
        offered = ", ".join(f"{reason.value} {reason.name.lower()}" for reason in RevocationReason)
        raise malformed("reason", f"expected one of {offered}") from None


def next_crl(
    previous: Crl | None, added: Mapping[int, Revocation], expired: Collection[int], now: datetime, distribution_point: str
) -> Crl:
    """Return the CRL after *previous*: its entries and those of *added*, without the serial numbers in *expired*.

    Nothing but the end of its validity takes a certificate off the list: *expired* are certificates that had ended before
    *previous* was made. The number is the time in milliseconds, so that a database that was put back from a backup gives no
    number twice.
    """
    entries = {} if previous is None else {serial: entry for serial, entry in previous.entries.items() if serial not in expired}
    for serial, revocation in added.items():
        entries.setdefault(serial, Revocation(revocation.at.replace(microsecond=0), revocation.reason))
    number = int(now.timestamp() * 1000)
    if previous is not None:
        number = max(number, previous.number + 1)
    this_update = now.replace(microsecond=0)
    return Crl(number, this_update, this_update + CRL_LIFETIME, distribution_point, entries)


def is_due(crl: Crl, now: datetime) -> bool:
    """Whether the next CRL is to be made although nothing was revoked."""
    return crl.this_update + CRL_INTERVAL <= now
