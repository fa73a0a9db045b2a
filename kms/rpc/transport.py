"""What grpc itself limits of connections: how many, how long, how many streams, how many pings."""

from dataclasses import dataclass
from typing import Final

MESSAGE_BYTES_MAX: Final = 4 * 1024 * 1024  # a batch of 1 MiB with room for its framing
STREAM_SECONDS_MAX: Final = 3600.0
_HANDSHAKE_SECONDS: Final = 10.0
_PING_STRIKES_MAX: Final = 2
_PENDING_MAX: Final = 20_000
# Our own pings find clients that are gone without a word, and end their calls.
_OWN_PING_SECONDS: Final = 60.0
_OWN_PING_ANSWER_SECONDS: Final = 20.0


@dataclass(frozen=True, slots=True)
class TransportLimits:
    """What one process gives: connections, seconds without a call and in total, streams of a connection, pause between pings.

    We close connections above `connections_max` ourselves, a fraction of a second later. Meanwhile grpc admits half as many more.
    """

    connections_max: int
    idle_seconds: float
    age_seconds: float
    streams_per_connection_max: int
    ping_seconds_min: float


def channel_arguments(limits: TransportLimits, *, shares_port: bool) -> list[tuple[str, int]]:
    """Return the arguments of a server that keeps *limits*."""
    return [
        # With SO_REUSEPORT a second server on the port would take half of the calls instead of being refused.
        ("grpc.so_reuseport", int(shares_port)),
        ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
        ("grpc.server_handshake_timeout_ms", _milliseconds(_HANDSHAKE_SECONDS)),
        ("grpc.max_allowed_incoming_connections", limits.connections_max + limits.connections_max // 2),
        # What gRPC does with calls beyond these is to cancel them, whoever's they are.
        ("grpc.server.max_pending_requests", _PENDING_MAX),
        ("grpc.server.max_pending_requests_hard_limit", _PENDING_MAX),
        ("grpc.max_concurrent_streams", limits.streams_per_connection_max),
        ("grpc.max_connection_idle_ms", _milliseconds(limits.idle_seconds)),
        ("grpc.max_connection_age_ms", _milliseconds(limits.age_seconds)),
        ("grpc.max_connection_age_grace_ms", _milliseconds(STREAM_SECONDS_MAX)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", _milliseconds(limits.ping_seconds_min)),
        ("grpc.http2.max_ping_strikes", _PING_STRIKES_MAX),
        ("grpc.keepalive_time_ms", _milliseconds(_OWN_PING_SECONDS)),
        ("grpc.keepalive_timeout_ms", _milliseconds(_OWN_PING_ANSWER_SECONDS)),
    ]


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)
