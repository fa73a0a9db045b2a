"""Whether the database answers, for readiness. No decision about a call depends on it."""

import asyncio
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from kms.domain.errors import KmsError
from kms.store.pool import BEFORE_LOGIN, Pool

ASK: Final = "SELECT 1 AS alive"
CLOCK: Final = "SELECT clock_timestamp() AS now"
_ANSWER_SECONDS: Final = 3.0


async def database_time(pool: Pool) -> datetime:
    """Return the moment by the database's clock. Raises STORE_UNAVAILABLE."""
    moment: datetime = (await pool.fetch(BEFORE_LOGIN, CLOCK))[0]["now"]
    return moment


@dataclass(slots=True, eq=False)
class DatabaseProbe:
    """Remembers whether the database answered when the probe last asked. `answered` changes with each question."""

    pool: Pool
    answered: bool = True

    def answers(self) -> bool:
        """Return whether the database answered the last question. Before the first one it counts as answering."""
        return self.answered

    async def ask(self) -> None:
        """Ask the database. No answer is a result and not an error; a bug is raised and counts as no answer."""
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                await self.pool.fetch(BEFORE_LOGIN, ASK)
        except (KmsError, TimeoutError):
            self.answered = False
        except Exception:
            self.answered = False
            raise
        else:
            self.answered = True
