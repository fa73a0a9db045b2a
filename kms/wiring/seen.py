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
from kms.wiring.jobs import repeating

_PULSE_SECONDS: Final = 1.0
_STILL_SECONDS_MAX: Final = 10.0
_LOG = structlog.get_logger("kms")


@asynccontextmanager
async def seen(address: str | Path | None, telemetry: Telemetry, condition: Condition) -> AsyncIterator[None]:
    """Let the process be seen on *address* (see `served`) within the block; None: it is not seen."""
    if address is None:
        yield
        return
    telemetry.registry.register(ConditionCollector(condition))
    ProcessCollector(registry=telemetry.registry)
    pulse = _Pulse()
    app = endpoint_app(telemetry.registry, alive=pulse.look, ready=condition.look)
    async with repeating("pulse", _PULSE_SECONDS, pulse.beat):
        with served(address, app) as port:
            if isinstance(address, str):  # of a worker the supervisor says it
                _LOG.info("seen from outside", address=address, port=port)
            yield


class _Pulse:
    """Whether the event loop turns: it says so every second, and a thread that still answers is no sign of it."""

    def __init__(self) -> None:
        self._beaten_at = monotonic()

    async def beat(self) -> None:
        self._beaten_at = monotonic()

    def look(self) -> tuple[bool, str]:
        is_alive = monotonic() - self._beaten_at < _STILL_SECONDS_MAX
        return is_alive, "alive" if is_alive else f"nothing has moved for {_STILL_SECONDS_MAX:.0f} seconds"
