"""The gRPC server: TLS with client certificates, our services behind the edge, health and reflection."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, Final, cast

import grpc
import structlog
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from kms.rpc.admin import AdminServicer
from kms.rpc.audit import AuditServicer
from kms.rpc.crypto import CryptoServicer
from kms.rpc.edge import Edge
from kms.rpc.health import Health
from kms.rpc.keys import KeyServicer
from kms.rpc.transport import TransportLimits, channel_arguments
from kms.v1 import (
    acme_pb2,
    acme_pb2_grpc,
    admin_pb2,
    admin_pb2_grpc,
    audit_pb2,
    audit_pb2_grpc,
    certificates_pb2,
    certificates_pb2_grpc,
    crypto_pb2,
    crypto_pb2_grpc,
    keys_pb2,
    keys_pb2_grpc,
    rotation_pb2,
    rotation_pb2_grpc,
)

_NO_PART: Final = frozenset[str]()
_UNTOLD: Final = frozenset({"untold"})  # a part that none does without
# What of the service each can do without. KeyService proves each record in the token, and makes the MAC of each move there.
DOES_WITHOUT: Final = {
    keys_pb2.DESCRIPTOR.services_by_name["KeyService"].full_name: _NO_PART,
    crypto_pb2.DESCRIPTOR.services_by_name["CryptoService"].full_name: _NO_PART,
    rotation_pb2.DESCRIPTOR.services_by_name["RotationService"].full_name: _NO_PART,
    certificates_pb2.DESCRIPTOR.services_by_name["CertificateService"].full_name: _NO_PART,
    acme_pb2.DESCRIPTOR.services_by_name["AcmeService"].full_name: _NO_PART,
    audit_pb2.DESCRIPTOR.services_by_name["AuditService"].full_name: frozenset({"token"}),
    admin_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name: frozenset({"token"}),
}
LIVENESS: Final = "liveness"
READINESS: Final = "readiness"
_LOG = structlog.get_logger("kms.rpc.server")


@dataclass(frozen=True, slots=True)
class TlsMaterial:
    """In PEM: our certificate with its chain, our key, and the authorities whose client certificates are taken."""

    certificate: bytes
    key: bytes = field(repr=False)
    client_authorities: bytes


class Server:
    """A server that listens from `start` until `stop`.

    `report` has health follow *faults*, which names the parts that are at fault: `""` and `readiness` want none, each service
    does without what `DOES_WITHOUT` says, `liveness` is SERVING as long as anybody answers. A bug in *faults* is a fault of
    each but that.

    One that *shares_port* listens where other processes do; that no stranger is among them is for the caller to see to.
    """

    def __init__(
        self,
        edge: Edge,
        keys: KeyServicer,
        crypto: CryptoServicer,
        audit: AuditServicer,
        admin: AdminServicer,
        rotation: object,
        certificates: object,
        acme: object,
        *,
        transport: TransportLimits,
        faults: Callable[[], Collection[str]],
        shares_port: bool = False,
    ) -> None:
        # No `maximum_concurrent_rpcs`: grpc counts health checks, and calls whose message never comes. The edge has the limits.
        options = channel_arguments(transport, shares_port=shares_port)
        self._server = grpc.aio.server(interceptors=[edge], options=options)
        # The edge calls our servicers, with a `Call` where grpc would hand in its context: hence no common base class.
        keys_pb2_grpc.add_KeyServiceServicer_to_server(cast(Any, keys), self._server)
        crypto_pb2_grpc.add_CryptoServiceServicer_to_server(cast(Any, crypto), self._server)
        audit_pb2_grpc.add_AuditServiceServicer_to_server(cast(Any, audit), self._server)
        admin_pb2_grpc.add_AdminServiceServicer_to_server(cast(Any, admin), self._server)
        rotation_pb2_grpc.add_RotationServiceServicer_to_server(cast(Any, rotation), self._server)
        certificates_pb2_grpc.add_CertificateServiceServicer_to_server(cast(Any, certificates), self._server)
        acme_pb2_grpc.add_AcmeServiceServicer_to_server(cast(Any, acme), self._server)
        self._health = Health()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((*DOES_WITHOUT, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        self._edge = edge
        self._faults = faults
        self._is_stopping = False

    async def start(self, address: str, material: Callable[[], TlsMaterial]) -> int:
        """Listen on *address* (`host:port`, port 0 for a free one) and return the port. Raises OSError.

        Every handshake asks for the *material*, from threads of grpc's.
        """
        try:
            port = self._server.add_secure_port(address, _credentials(material))
        except RuntimeError as error:
            raise OSError(f"cannot listen on {address}: {error}") from None
        self.report()
        await self._server.start()
        return port

    async def stop(self, grace_seconds: float) -> None:
        """Turn health to NOT_SERVING, take no new call, end streams, let calls in flight end within *grace_seconds*.

        Called again, also meanwhile, the shorter time holds.
        """
        self._is_stopping = True
        self.report()
        self._edge.end_streams()
        await self._server.stop(grace_seconds)

    def report(self) -> None:
        """Report to those who ask for health what is at fault now. To be called several times a second; never raises."""
        try:
            faults = frozenset(self._faults())
        except Exception:  # noqa: BLE001  # a bug in one look must end neither the later ones nor the stopping
            _LOG.exception("bug in what is told of health")
            faults = _UNTOLD
        spared = {"": _NO_PART, READINESS: _NO_PART, **DOES_WITHOUT}
        well = {service: faults <= parts and not self._is_stopping for service, parts in spared.items()}
        self._health.report({**well, LIVENESS: True})


def _credentials(material: Callable[[], TlsMaterial]) -> grpc.ServerCredentials:
    """Return credentials that follow *material*: what is renewed is used from the next handshake on."""
    used = [material()]

    def renewed() -> grpc.ServerCertificateConfiguration | None:
        now = material()
        if now == used[0]:
            return None
        used[0] = now
        return _certificates(now)

    return grpc.dynamic_ssl_server_credentials(
        _certificates(used[0]),
        renewed,  # type: ignore[arg-type]  # None is how grpc is told "unchanged"
        require_client_authentication=True,
    )


def _certificates(material: TlsMaterial) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration(
        [(material.key, material.certificate)], root_certificates=material.client_authorities
    )
