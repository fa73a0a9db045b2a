"""Every field of every request with hostile values: an error of the table, and never INTERNAL.

The fields are found in the descriptors, so a field added later is covered without a line here.
"""

from collections.abc import Callable, Iterator
from typing import Any, Final

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from kms.v1 import audit_pb2, crypto_pb2, keys_pb2
from tests.conformance.refusals import refusal_of
from tests.conformance.requests import made
from tests.fixtures.server import Caller
from tests.hostile.values import HIDDEN_TEXTS, MOMENTS, NUMBERS, READABLE, WIDE_NUMBERS

METHODS: Final[list[MethodDescriptor]] = [
    *keys_pb2.DESCRIPTOR.services_by_name["KeyService"].methods,
    *crypto_pb2.DESCRIPTOR.services_by_name["CryptoService"].methods,
    *audit_pb2.DESCRIPTOR.services_by_name["AuditService"].methods,
]
GOOD: Final[dict[str, dict[str, Any]]] = {
    "CreateKeyRequest": {"name": "new", "type": 5, "purpose": 2},
    "GetKeyRequest": {"key": "aes"},
    "GetPublicKeyRequest": {"key": "ec"},
    "SignRequest": {"key": "ec", "message": b"m"},
    "VerifyRequest": {"key": "ec", "message": b"m", "signature": bytes.fromhex("3006020101020101")},
    "EncryptRequest": {"key": "aes", "plaintext": b"p"},
    "DecryptRequest": {"ciphertext": b"\x01" + bytes(60)},
    "ReEncryptRequest": {"ciphertext": b"\x01" + bytes(60)},
    "GenerateDataKeyRequest": {"key": "aes"},
    "GenerateRandomRequest": {"size_bytes": 16},
    "UpdateKeyRequest": {"key": "aes"},
    **{f"{move}Request": {"key": "aes"} for move in ("ActivateKey", "DeactivateKey", "ReactivateKey", "CancelKeyDestruction")},
    "RevokeKeyRequest": {"key": "ec", "reason": "test"},
    "MarkKeyCompromisedRequest": {"key": "ec", "reason": "test"},
    "ScheduleKeyDestructionRequest": {"key": "aes", "pending_days": 7},
}
TEXTS: Final = (
    *("", " ", "\x00", "a\x00b", "'; DROP TABLE cryptography.keys; --", "../../etc/passwd", "%s%n{0}", "ﷺ" * 50, "x" * 100_000),
    *("\u202e", "\ud7ff", "é" * 90, "@", "a@", "a@0", "a@99999999999", "NULL", "-1"),
    *("00000000-0000-0000-0000-000000000000", "FFFFFFFF-FFFF-FFFF-FFFF-FFFFFFFFFFFF"),
    *("W10=", "bnVsbA==", "eyI6", "W1tbW1tbW1tbW1tb"),  # page tokens that are JSON, or nearly
    *HIDDEN_TEXTS,
    *READABLE,
)
BLOBS: Final = (
    *(b"", b"\x00", b"\xff" * 17, bytes(31), bytes(33), bytes(64), bytes(65), bytes(65_537), b"\xff" * 1_100_000),
    *(b"\x30\x84\xff\xff\xff\xff", b"\x01" * 29, b"\x02" + bytes(300)),
)
ENUMS: Final = (0, -1, 1, 2, 3, 4, 5, 6, 7, 99, 2**31 - 1, -(2**31))
ALLOWED: Final = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.UNIMPLEMENTED,
}


def values(field: FieldDescriptor) -> tuple[Any, ...]:
    """Return hostile values for *field*."""
    if field.type == FieldDescriptor.TYPE_STRING:
        return TEXTS
    if field.type == FieldDescriptor.TYPE_BYTES:
        return BLOBS
    if field.type == FieldDescriptor.TYPE_ENUM:
        return ENUMS
    if field.type == FieldDescriptor.TYPE_BOOL:
        return (True, False)
    return WIDE_NUMBERS if field.type == FieldDescriptor.TYPE_UINT64 else (*NUMBERS, 7, 99)


def bad_values(field: FieldDescriptor) -> Iterator[Any]:
    """Yield hostile values for *field* in the form in which a message's constructor takes them."""
    message = field.message_type
    if message is None:
        yield from values(field)
    elif message.GetOptions().map_entry:
        yield from ({text: "x"} for text in TEXTS)
        yield from ({"x": text} for text in TEXTS)
    elif message.name == "Timestamp":
        yield from (GetMessageClass(message)(seconds=seconds, nanos=nanos) for seconds, nanos in MOMENTS)
    elif message.name == "KeyMetadata":
        yield from (GetMessageClass(message)(entries={text: text}) for text in TEXTS)
    else:
        item, good = GetMessageClass(message), GOOD[message.name]
        yield from ([item(**{**good, inner.name: value})] for inner in message.fields for value in values(inner))


def called(method: MethodDescriptor, caller: Caller, auditor: Caller) -> Callable[[Message], Any]:
    """Return the call of *method* by somebody who may make it; of a stream it gives the first answer."""
    stubs = {"KeyService": caller.keys, "CryptoService": caller.crypto, "AuditService": auditor.audit}
    stub = getattr(stubs[method.containing_service.name], method.name)

    def call(request: Message) -> Any:  # noqa: ANN401 - a message of the method's output type
        answer = stub(request, timeout=15)
        if not method.server_streaming:
            return answer
        first = next(answer)
        answer.cancel()
        return first

    return call


def requests(method: MethodDescriptor) -> Iterator[Message]:
    """Yield the good request of *method* with each field, in turn, bad."""
    message, good = GetMessageClass(method.input_type), GOOD.get(method.input_type.name, {})
    for field in method.input_type.fields:
        for value in bad_values(field):
            yield message(**{**good, field.name: value})


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_bad_field_gets_an_error_of_the_table_and_never_internal(
    caller: Caller, auditor: Caller, method: MethodDescriptor
) -> None:
    call = called(method, caller, auditor)
    if method.containing_service.name != "AuditService":
        made(caller, "aes", name="aes")
        made(caller, "secp256k1", name="ec")
    refused = 0
    for request in requests(method):
        try:
            answer = call(request)
        except grpc.RpcError as error:
            found = refusal_of(error)
            assert found.code in ALLOWED, (str(request)[:200], found)
            assert found.reason, (str(request)[:200], found)
            assert len(found.message) < 400
            refused += 1
        else:
            assert isinstance(answer, GetMessageClass(method.output_type))
            refused += sum(item.HasField("error") for item in getattr(answer, "items", ()))
    assert refused > 0


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_bytes_that_are_no_request_are_malformed(caller: Caller, auditor: Caller, method: MethodDescriptor) -> None:
    channel = auditor.channel if method.containing_service.name == "AuditService" else caller.channel
    path = f"/{method.containing_service.full_name}/{method.name}"
    raw: Any = (channel.unary_stream if method.server_streaming else channel.unary_unary)(
        path, request_serializer=bytes, response_deserializer=bytes
    )
    for body in (
        b"\xff",
        b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
        b"\x0a\x02\xff\xfe",
        b"\x08" * 40,
        b"\x0b" * 200,
        b"\x0a\x05ab",
    ):
        try:
            answer = raw(body, timeout=15)
            if method.server_streaming:
                next(answer)
        except grpc.RpcError as error:
            assert refusal_of(error).code in ALLOWED, (body, refusal_of(error))
            assert refusal_of(error).reason


def test_a_message_that_is_larger_than_any_request_is_refused_by_the_transport(caller: Caller) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        caller.crypto.Encrypt(crypto_pb2.EncryptRequest(key="k", plaintext=bytes(5_000_000)), timeout=15)
    assert refusal_of(caught.value).code == grpc.StatusCode.RESOURCE_EXHAUSTED
