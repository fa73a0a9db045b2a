"""The moment at which certificates, CRLs and OCSP answers are made. The database's clock is its owner's, so it is not enough.

Whoever could set it would have the token sign today that a certificate is good next month.
"""

from datetime import datetime, timedelta
from typing import Final

from kms.app.records import Records
from kms.store.errors import unavailable
from kms.store.pool import AS_JOB, Pool

NOW: Final = "SELECT clock_timestamp() AS now"
CLOCKS_APART_MAX: Final = timedelta(minutes=1)


async def agreed_now(pool: Pool, records: Records) -> datetime:
    """Return the moment by the database's clock. Raises STORE_UNAVAILABLE where the host's differs by over a minute."""
    now: datetime = (await pool.fetch(AS_JOB, NOW))[0]["now"]
    if abs(now - records.clock()) > CLOCKS_APART_MAX:
        raise unavailable("the clocks of the database and of the host differ by over a minute: nothing is signed by them")
    return now
