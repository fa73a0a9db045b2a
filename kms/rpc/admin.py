"""The servicer of AdminService."""

from dataclasses import asdict, dataclass

from google.protobuf.timestamp_pb2 import Timestamp

from kms.app.ports import Call
from kms.app.status import Administration
from kms.rpc import enums
from kms.v1 import admin_pb2 as pb


@dataclass(frozen=True, slots=True)
class AdminServicer:
    """Calls `Administration`, encodes."""

    administration: Administration

    async def GetStatus(self, request: pb.GetStatusRequest, call: Call) -> pb.GetStatusResponse:
        """Return how the service is."""
        status = await self.administration.status(call)
        server_time = Timestamp()
        server_time.FromDatetime(status.server_time)
        return pb.GetStatusResponse(
            version=status.version,
            deployment_id=status.deployment_id,
            mode=status.mode,
            ready=not status.faults,
            faults=[pb.Fault(part=part, message=message) for part, message in status.faults.items()],
            server_time=server_time,
            worker=status.worker,
            detail=None if status.detail is None else pb.StatusDetail(**asdict(status.detail)),
        )

    async def GetHsmCapabilities(self, request: pb.GetHsmCapabilitiesRequest, call: Call) -> pb.GetHsmCapabilitiesResponse:
        """Return what the HSM can do."""
        found = self.administration.capabilities()
        keys = [
            pb.GetHsmCapabilitiesResponse.KeyCapability(
                type=enums.number_of(enums.KEY_TYPES, key.key_type),
                purpose=enums.number_of(enums.PURPOSES, key.purpose),
                custodies=[enums.number_of(enums.CUSTODIES, custody) for custody in key.custodies],
                mechanisms=key.mechanisms,
            )
            for key in found.keys
        ]
        hashes = [enums.number_of(enums.HASHES, hash_) for hash_ in sorted(found.oaep_hashes)]
        return pb.GetHsmCapabilitiesResponse(keys=keys, oaep_hashes=hashes, sealed_allowed=found.is_sealed_allowed)
