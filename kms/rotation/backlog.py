"""How the rotations of the deployment are: what is due, what runs, what failed, and for how long the oldest has waited."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from kms.store.pool import AS_JOB, Pool

BACKLOG: Final = "SELECT due, running, failed, oldest_seconds, policies_overdue FROM cryptography.rotation_backlog()"
# By then ten attempts have been made, or nobody makes them.
_OVERDUE_SECONDS: Final = 3600.0


@dataclass(frozen=True, slots=True)
class Backlog:
    """Numbers of rotations, each to 1,000. `oldest_seconds`: how long ago the oldest that has not ended was asked for; 0: none.

    `policies_overdue` are policies whose key was due, and has not been rotated although that was tried.
    """

    due: int = 0
    running: int = 0
    failed: int = 0
    oldest_seconds: float = 0.0
    policies_overdue: int = 0

    @property
    def warnings(self) -> Iterator[str]:
        """Yield sentences for an operator."""
        if self.oldest_seconds > _OVERDUE_SECONDS:
            yield f"a rotation has waited for {self.oldest_seconds / 3600:.0f} hours: see `kms rotation list --status pending`"
        if self.policies_overdue:
            keys = "1 key is" if self.policies_overdue == 1 else f"{self.policies_overdue} keys are"
            yield f"{keys} due by policy and not rotated: the log and `kms rotation list` say why"


NO_BACKLOG: Final = Backlog()


async def read_backlog(pool: Pool) -> Backlog:
    """Return how the rotations are. Raises STORE_UNAVAILABLE."""
    row = (await pool.fetch(AS_JOB, BACKLOG))[0]
    return Backlog(row["due"], row["running"], row["failed"], max(row["oldest_seconds"] or 0.0, 0.0), row["policies_overdue"])
