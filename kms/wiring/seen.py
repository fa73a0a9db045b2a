"""A process that serves, as it is seen from outside."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from time import monotonic
from typing import Final

import structlog
from prometheus_client import ProcessCollector

from kms.telemetry import Telemetry
from kms.wiring.condition import Condition, ConditionCollector
from kms.wiring.endpoint import endpoint_app, served

_STILL_SECONDS_MAX: Final = 10.0
_LOG = structlog.get_logger("kms")


@asynccontextmanager
async def seen(address: str | Path | None, telemetry: Telemetry, condition: Condition, pulse: "Pulse") -> AsyncIterator[None]:
    """Let the process be seen on *address* (see `served`) within the block; None: it is not seen."""
    if address is None:
        yield
        return
    telemetry.registry.register(ConditionCollector(condition))
    ProcessCollector(registry=telemetry.registry)
    app = endpoint_app(telemetry.registry, alive=pulse.look, ready=condition.look)
    with served(address, app) as port:
        if isinstance(address, str):  # of a worker the supervisor says it
            _LOG.info("seen from outside", address=address, port=port)
        yield


class Pulse:
    """Whether the event loop turns: a job of the loop beats, and a thread looks. A thread that answers proves no loop."""

    def __init__(self) -> None:
        self._beaten_at = monotonic()

    async def beat(self) -> None:
        """Note that the loop turns."""
        self._beaten_at = monotonic()

    def look(self) -> tuple[bool, str]:
        """Return whether the loop has turned lately, with a text for GET /livez."""
        is_alive = monotonic() - self._beaten_at < _STILL_SECONDS_MAX
        return is_alive, "alive" if is_alive else f"nothing has moved for {_STILL_SECONDS_MAX:.0f} seconds"
