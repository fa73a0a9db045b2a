"""The job of ACME: what is over is removed."""

from typing import Final

from kms.certificates.acme.postgres import StoredNonces
from kms.jobs.job import Job

ACME: Final = "acme"
_KEPT_SECONDS: Final = 86_400.0  # an order that ended is shown to its client for a day
_INTERVAL_SECONDS: Final = 300.0
_WARNS_AFTER_SECONDS: Final = 7200.0
_ROWS_MAX: Final = 1000


def forgetting_job(nonces: StoredNonces) -> Job:
    """Return the job that removes spent nonces and orders that ended."""

    async def forget() -> None:
        while await nonces.forget(_KEPT_SECONDS, _ROWS_MAX) >= _ROWS_MAX:
            pass

    return Job(ACME, _INTERVAL_SECONDS, forget, warns_after_seconds=_WARNS_AFTER_SECONDS)
