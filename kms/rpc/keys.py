"""The servicer of KeyService."""

from dataclasses import dataclass

from kms.app.keyring import Keyring, existing
from kms.domain.algorithms import key_spec
from kms.domain.errors import KmsError, Reason
from kms.domain.ids import parse_key_name, parse_key_ref
from kms.rpc import convert, enums
from kms.rpc.edge import Context, caller
from kms.v1 import keys_pb2, keys_pb2_grpc


@dataclass(frozen=True, slots=True)
class KeyServicer(keys_pb2_grpc.KeyServiceServicer):
    """Decodes, calls `Keyring`, encodes."""

    keyring: Keyring

    async def CreateKey(self, request: keys_pb2.CreateKeyRequest, context: Context) -> keys_pb2.CreateKeyResponse:
        """Make a key."""
        convert.refuse_unimplemented(request, "max_usage_count", "expires_at", "activated_at", "request_id")
        spec = key_spec(
            enums.required(enums.KEY_TYPES, request.type, "type"),
            enums.required(enums.PURPOSES, request.purpose, "purpose"),
            request.size_bits or None,
        )
        custody_min = enums.optional(enums.CUSTODIES, request.custody_min, "custody_min")
        name = parse_key_name(request.name)
        key = await self.keyring.create(caller(), name, spec, custody_min=custody_min, metadata=request.metadata)
        return keys_pb2.CreateKeyResponse(key=convert.wire_key(key))

    async def GetKey(self, request: keys_pb2.GetKeyRequest, context: Context) -> keys_pb2.GetKeyResponse:
        """Return a key."""
        key = await existing(self.keyring.keys, caller(), parse_key_ref(request.key))
        return keys_pb2.GetKeyResponse(key=convert.wire_key(key))

    async def ListKeys(self, request: keys_pb2.ListKeysRequest, context: Context) -> keys_pb2.ListKeysResponse:
        """List the caller's keys."""
        which, after, limit = convert.page_request(request)
        found, more = await self.keyring.page(caller(), which, after=after, limit=limit)
        token = convert.page_token(found[-1].name, which) if more else ""
        return keys_pb2.ListKeysResponse(keys=[convert.wire_key(key) for key in found], next_page_token=token)

    async def GetPublicKey(self, request: keys_pb2.GetPublicKeyRequest, context: Context) -> keys_pb2.GetPublicKeyResponse:
        """Return the public half of a key."""
        key = await existing(self.keyring.keys, caller(), parse_key_ref(request.key))
        spec = key.identity.spec
        if spec.is_symmetric:
            raise KmsError(Reason.WRONG_PURPOSE, "an AES key has no public half", key_type=spec.key_type)
        return keys_pb2.GetPublicKeyResponse(
            key_id=str(key.identity.key_id),
            type=enums.number_of(enums.KEY_TYPES, spec.key_type),
            public_key_pem=key.public_key,
            public_key_der=convert.der_of(key.public_key),
        )
