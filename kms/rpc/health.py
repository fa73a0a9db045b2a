"""The standard health service (grpc.health.v1), over what was last reported.

The library's own holds a lock while it writes to a watcher: one that does not read would keep everybody from the truth, and the
server from stopping. Here nobody waits for a watcher.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final, TypeAlias

import grpc
from google.rpc import code_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kms.rpc.status import abort

Context = grpc.aio.ServicerContext[Any, Any]
Status: TypeAlias = health_pb2.HealthCheckResponse

_UNKNOWN: Final = status_pb2.Status(
    code=code_pb2.NOT_FOUND, message="there is no service of this name; the empty name stands for the server"
)


class Health(health_pb2_grpc.HealthServicer):
    """What is reported of each service, told to whoever asks or watches. It belongs to the event loop."""

    def __init__(self) -> None:
        self._statuses: dict[str, Any] = {}  # of Status.ServingStatus, which the stubs do not know as a type
        self._changed = asyncio.Event()

    def report(self, is_serving: Mapping[str, bool]) -> None:
        """Take whether each service is serving; watchers hear of it when anything has changed."""
        statuses = {name: Status.SERVING if serving else Status.NOT_SERVING for name, serving in is_serving.items()}
        if statuses != self._statuses:
            self._statuses = statuses
            self._changed.set()
            self._changed = asyncio.Event()

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Context) -> Status:
        """Return the status of a service; NOT_FOUND for one that is unknown."""
        status = self._statuses.get(request.service)
        if status is None:
            await abort(context, _UNKNOWN)
        return Status(status=status)

    async def List(self, request: object, context: Context) -> object:
        """Return the status of every service, as HealthListResponse."""
        statuses = {name: Status(status=status) for name, status in self._statuses.items()}
        return health_pb2.HealthListResponse(statuses=statuses)  # type: ignore[attr-defined]  # newer than the stubs

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Context) -> AsyncIterator[Status]:
        """Yield the status of a service, and again when it changes; SERVICE_UNKNOWN for one that is unknown."""
        told = None
        while True:
            changed = self._changed
            status = self._statuses.get(request.service, Status.SERVICE_UNKNOWN)
            if status != told:
                yield Status(status=status)
                told = status
            if changed is self._changed:
                await changed.wait()
