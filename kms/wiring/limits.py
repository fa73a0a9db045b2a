"""The limits of clients: from the configuration to the edge, and the look that closes connections over a limit."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final

import structlog

from kms.config import ServerConfig
from kms.rpc.connections import ConnectionLimits, Connections
from kms.rpc.limits import CallLimits
from kms.rpc.sockets import AcceptedSockets
from kms.rpc.transport import TransportLimits
from kms.wiring.descriptors import connections_that_fit

_PAUSE_PER_LOOK: Final = 20  # a look at many connections takes long: at most a twentieth of the time goes into looking
_LOG = structlog.get_logger("kms")


def call_limits(config: ServerConfig) -> CallLimits:
    """Return the limits of calls."""
    return CallLimits(config.call_seconds_max, config.message_seconds_max, config.calls_max, config.calls_per_user_max)


def connection_limits(config: ServerConfig) -> ConnectionLimits:
    """Return the limits of connections: those of the configuration, and no more than file descriptors permit."""
    total = _connections_max(config)
    per_address = config.connections_per_address_max or max(1, total // 2)
    return ConnectionLimits(total, config.connections_per_user_max, per_address, config.streams_per_connection_max)


def transport_limits(config: ServerConfig) -> TransportLimits:
    """Return the limits that grpc itself keeps."""
    return TransportLimits(
        _connections_max(config),
        config.connection_idle_seconds,
        config.connection_age_seconds,
        config.streams_per_connection_max,
        config.ping_seconds_min,
    )


def closing_connections(connections: Connections, port: int) -> Callable[[], Awaitable[None]]:
    """Return the look at the connections to *port* that closes those over a limit. A look ends with a pause by its length."""
    sockets = AcceptedSockets(port)
    connections.close = sockets.close

    async def look() -> None:
        began = time.monotonic()
        present = sockets.peers()
        closing = connections.to_close(present)
        for peer in closing:
            sockets.shut_down(peer, present[peer])
        if closing:
            _LOG.warning("connections closed", count=len(closing), open=len(present))
        await asyncio.sleep((time.monotonic() - began) * _PAUSE_PER_LOOK)

    return look


def _connections_max(config: ServerConfig) -> int:
    fitting = connections_that_fit()
    return fitting if config.connections_max is None else min(config.connections_max, fitting)
