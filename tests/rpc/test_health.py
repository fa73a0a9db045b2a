"""Health follows what is at fault, also when a look at it ends with a bug."""

import asyncio
from collections.abc import Awaitable, Callable, Collection
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import grpc
import pytest
import structlog
from cryptography.hazmat.primitives.serialization import Encoding
from grpc_health.v1 import health_pb2, health_pb2_grpc
from structlog.testing import LogCapture

from kms.pki.authority import issue_client, issue_server, make_authority
from kms.rpc import server as serving
from kms.rpc.server import LIVENESS, READINESS, Server, TlsMaterial
from kms.rpc.transport import TransportLimits
from kms.v1.acme_pb2_grpc import AcmeServiceServicer
from kms.v1.admin_pb2_grpc import AdminServiceServicer
from kms.v1.audit_pb2_grpc import AuditServiceServicer
from kms.v1.certificates_pb2_grpc import CertificateServiceServicer
from kms.v1.crypto_pb2_grpc import CryptoServiceServicer
from kms.v1.keys_pb2_grpc import KeyServiceServicer
from kms.v1.rotation_pb2_grpc import RotationServiceServicer

if TYPE_CHECKING:  # generic in the stubs only
    Interceptor = grpc.aio.ServerInterceptor[Any, Any]
else:
    Interceptor = grpc.aio.ServerInterceptor
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


class Open(Interceptor):
    """An edge that lets everything through."""

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any) -> Any:  # noqa: ANN401
        """Return the handler as it is."""
        return await continuation(handler_call_details)

    def end_streams(self) -> None:
        """There are none."""


async def test_a_bug_in_a_look_at_the_faults_is_a_fault_until_the_next_look_and_keeps_no_server_from_stopping(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, log = datetime.now(UTC), LogCapture()
    monkeypatch.setattr(serving, "_LOG", structlog.wrap_logger(None, processors=[log]))
    authority = make_authority(tmp_path, now=now)
    own, root = issue_server(authority, ["localhost"], now=now), authority.certificate.public_bytes(Encoding.PEM)
    theirs = issue_client(authority, "urn:test", now=now)
    error: Exception | None = None

    def faults() -> Collection[str]:
        if error is not None:
            raise error
        return ()

    servicers = (KeyServiceServicer, CryptoServiceServicer, AuditServiceServicer, AdminServiceServicer)
    parts = cast(Any, (*servicers, RotationServiceServicer, CertificateServiceServicer, AcmeServiceServicer))
    server = Server(
        *cast(Any, (Open(), *(part() for part in parts))), transport=TransportLimits(10, 60, 60, 10, 5), faults=faults
    )
    port = await server.start("localhost:0", lambda: TlsMaterial(own.certificate, own.key, root))
    credentials = grpc.ssl_channel_credentials(root, theirs.key, theirs.certificate)
    async with grpc.aio.secure_channel(f"localhost:{port}", credentials) as channel:
        health = cast(Any, health_pb2_grpc.HealthStub(channel))

        async def told(service: str, status: object) -> None:
            async with asyncio.timeout(5):
                server.report()
                assert (await health.Check(health_pb2.HealthCheckRequest(service=service))).status == status

        await told(READINESS, SERVING)
        error = RuntimeError("a bug")
        for service in (READINESS, "", "kms.v1.KeyService"):
            await told(service, NOT_SERVING)
        await told(LIVENESS, SERVING)
        error = None
        await told(READINESS, SERVING)
        error = RuntimeError("a bug")
        async with asyncio.timeout(5):
            await server.stop(0)
    assert {line["event"] for line in log.entries} == {"bug in what is told of health"}
