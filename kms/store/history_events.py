"""Events about the signing of the trail: what was refused, and whose memory began."""

import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from psycopg.types.json import Jsonb

from kms.app.trail_ports import HistoryEvent
from kms.store.pool import AS_JOB, Pool

RECORD: Final = "SELECT audit.record_history_event(%(event)s, %(details)s) AS recorded"


@dataclass(frozen=True, slots=True)
class StoredHistoryEvents:
    """`HistoryEvents` in `audit.security_events`, with the name of this machine."""

    pool: Pool

    async def record(self, event: HistoryEvent, details: Mapping[str, object]) -> None:
        """Record *event*."""
        told = Jsonb({**details, "machine": socket.gethostname()})
        await self.pool.fetch(AS_JOB, RECORD, {"event": event.value, "details": told})
