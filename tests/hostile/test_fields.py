"""Every field of every request is of a kind, and refuses what no field of its kind may hold: MALFORMED, with its name.

The fields are found in the descriptors. A field that is added later fails here until the table says of which kind it is.
"""

import importlib
import json
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import grpc
import psycopg
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import error_details_pb2, status_pb2

import kms.v1
from kms.v1 import audit_pb2
from kms.v1 import certificates_pb2 as pb
from kms.v1 import keys_pb2 as kpb
from kms.v1 import rotation_pb2 as rpb
from tests.conformance.certificates import allow, create, csr, manager_of
from tests.conformance.refusals import Refusal, refusal, refusal_of
from tests.conformance.requests import made
from tests.fixtures.server import Caller, RunningServer
from tests.hostile.values import BAD_UTF8, HIDDEN, HIDDEN_TEXTS, MOMENTS, READABLE

MALFORMED: Final = (grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED")
LONG: Final = "x" * 100_000
EC: Final[dict[str, Any]] = {"type": kpb.KEY_TYPE_SECP256K1, "purpose": kpb.KEY_PURPOSE_SIGNING}
BAD_NUMBERS: Final = (2**63, 2**64 - 1)
METHODS: Final[list[MethodDescriptor]] = [
    method
    for module in pkgutil.iter_modules(kms.v1.__path__)
    if module.name.endswith("_pb2")
    for service in importlib.import_module(f"kms.v1.{module.name}").DESCRIPTOR.services_by_name.values()
    for method in service.methods
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
    "UpdateKeyRequest": {"key": "aes", "metadata": {"entries": {"a": "b"}}},
    **{f"{move}Request": {"key": "aes"} for move in ("ActivateKey", "DeactivateKey", "ReactivateKey", "CancelKeyDestruction")},
    "RevokeKeyRequest": {"key": "ec", "reason": "test"},
    "MarkKeyCompromisedRequest": {"key": "ec", "reason": "test"},
    "ScheduleKeyDestructionRequest": {"key": "aes", "pending_days": 7},
    "RotateKeyRequest": {"key": "aes", "reason": "test"},
    "GetLineageUsageRequest": {"key": "aes"},
    "RetryRotationRequest": {"rotation_id": "00000000-0000-4000-8000-000000000000"},
    "SetRotationPolicyRequest": {"key": "aes", "policy": {"on_compromise": True}},
    "WatchRotationRequest": {"rotation_id": "00000000-0000-4000-8000-000000000000"},
    "GetRotationRequest": {"rotation_id": "00000000-0000-4000-8000-000000000000"},
    "CreateCertificateAuthorityRequest": {"name": "new", "subject": "CN=new"},
    "ImportAuthorityCertificateRequest": {"authority": "fields-pending", "certificates": b"x"},
    "UpdateCertificateAuthorityRequest": {"authority": "fields-own", "set_self_service": True},
    "RotateCertificateAuthorityRequest": {"authority": "fields-own"},
    "GetCertificateAuthorityRequest": {"authority": "fields-own"},
    "IssueCertificateRequest": {"authority": "fields", "profile": "server", "csr": csr("dns:www.example.com")},
    "RenewCertificateRequest": {"certificate_id": "00000000-0000-4000-8000-000000000000"},
    "CreateCertificateRequestRequest": {"key": "ec", "subject": "CN=a"},
    "ImportCertificateRequest": {"key": "ec", "certificate": b"x"},
    "GetCertificateRequest": {"certificate_id": "00000000-0000-4000-8000-000000000000"},
    "RevokeCertificateRequest": {"certificate_id": "00000000-0000-4000-8000-000000000000"},
    "CreateAcmeAccountRequest": {"authority": "fields"},
    "DeactivateAcmeAccountRequest": {"account_id": "00000000-0000-4000-8000-000000000000"},
    "GetCrlRequest": {"authority": "fields-own"},
    "PublishCrlRequest": {"authority": "fields-own"},
}


@dataclass(frozen=True, slots=True)
class Kind:
    """What no field of a kind may hold. `field` is the name in the error where it is not the field's own."""

    refused: tuple[Any, ...]
    field: str = ""
    reason: str = "MALFORMED"


def _moments() -> tuple[Any, ...]:
    return tuple(
        Timestamp(seconds=seconds, nanos=nanos) for seconds, nanos in MOMENTS[3:] if not (seconds == 2**31 and nanos == 0)
    )


SPANS: Final = ((0, 0), (-1, 0), (1, 1), (86_400, -1), (36_500 * 86_400 + 1, 0), (2**62, 0), (-(2**62), 0), (1, 2**31 - 1))
NOT_NAMES: Final = (*HIDDEN_TEXTS, *HIDDEN.values(), *READABLE, " ", LONG, "x" * 91, "a b", "-a", "a'b", "a@b")
KEY: Final = Kind((*NOT_NAMES, "", "a@0", "a@9999999999"))
OPTIONAL_KEY: Final = Kind(tuple(text for text in KEY.refused if text), "key")
NAME: Final = Kind((*NOT_NAMES, "", "a@1", "00000000-0000-0000-0000-000000000000"))
PREFIX: Final = Kind((*NOT_NAMES, "a@1"))
REASON: Final = Kind((*HIDDEN_TEXTS, "", " ", "\u3000", "\u3164", "\u2800", "\u0301", "x" * 201, LONG))
REQUEST_ID: Final = Kind((*HIDDEN_TEXTS, *READABLE, " ", "x" * 65, LONG))
FILTER: Final = Kind((*HIDDEN_TEXTS, "x" * 101, LONG))
ID: Final = Kind((*NOT_NAMES, "0", "FFFFFFFF-FFFF-FFFF-FFFF-FFFFFFFFFFFF", "{00000000-0000-0000-0000-000000000000}"))
TOKEN: Final = Kind((*HIDDEN_TEXTS, *READABLE, LONG, "W10=", "bnVsbA==", "eyI6", "W1tbW1tbW1tbW1tb", "e30=", "MQ=="))
METADATA: Final = Kind(
    (
        *({text: "x"} for text in (*HIDDEN_TEXTS, "", " ", "x" * 64, "é" * 32, LONG)),
        *({"x": text} for text in (*HIDDEN_TEXTS, "x" * 256, "é" * 128, LONG)),
        {f"n{number}": "" for number in range(33)},
    ),
    "metadata",
)
KEY_METADATA: Final = Kind(tuple(kpb.KeyMetadata(entries=each) for each in METADATA.refused))
VERSION: Final = Kind(BAD_NUMBERS)
LIMIT: Final = Kind((0, *BAD_NUMBERS))
MOMENT: Final = Kind(_moments())
SPAN: Final = Kind(tuple(Duration(seconds=seconds, nanos=nanos) for seconds, nanos in SPANS))
SHARE: Final = Kind((100, 2**31, 2**32 - 1))
POLICIES: Final = Kind((kpb.RotationPolicy(),), "policy")
ENUM: Final = Kind((-1, 99, 2**31 - 1, -(2**31)))
FLAG: Final = Kind(())
ITEMS: Final = Kind(([], "too many"))
AUTHORITY: Final = Kind((*NOT_NAMES, "", "A", "a-", "a/", "a/0", "a/b", "a/1/2", "x" * 64))
PARENT: Final = Kind(tuple(text for text in AUTHORITY.refused if text))
AUTHORITY_NAME: Final = Kind((*AUTHORITY.refused, "a/1", "00000000-0000-4000-8000-000000000000"))
BASE_URL: Final = Kind((*HIDDEN_TEXTS, "x", "https://a", "http://", "http://a/", "http://a b", "http://A", f"http://{LONG}"))
SHARDS: Final = Kind((65_537, 2**31, 2**32 - 1))
BAD_SUBJECTS: Final = ("CN", "CN=", "=a", ",", "CN=a,", "XX=a", "CN=a,CN=b", "C=de", f"CN={LONG}", f"CN={'x' * 65}", *READABLE)
SUBJECT: Final = Kind((*BAD_SUBJECTS, *(f"CN={text}" for text in HIDDEN_TEXTS)), reason="CERTIFICATE_INVALID")
BAD_NAMES: Final = ("", "x", "dns:", "dns:a b", "dns:a_b.example.com", "dns:1.2.3.4", "ip:x", "uri:x", "email:x", f"dns:{LONG}")
NAMES: Final = Kind(
    (*([each] for each in (*BAD_NAMES, *(f"dns:{text}.example.com" for text in HIDDEN_TEXTS))), ["dns:a.example.com"] * 2),
    reason="CERTIFICATE_INVALID",
)
SUBTREES: Final = Kind((["x"], ["dns:"], ["ip:192.0.2.1/8"], ["ip:x"], ["dns:a.example.com"] * 2), reason="CERTIFICATE_INVALID")
CSR: Final = Kind((b"", b"x", bytes(65_537), b"\x30\x84\xff\xff\xff\xff"), reason="CERTIFICATE_INVALID")
CERTIFICATES: Final = Kind((b"", b"x", b"-----BEGIN CERTIFICATE-----"), "certificate", reason="CERTIFICATE_INVALID")
PROFILE: Final = Kind((*HIDDEN_TEXTS, "", "x", "root", "ocsp", LONG))
GRANTS: Final = ([pb.IssuerGrant(user_id="x", profile="server")],)
DAYS: Final = Kind((1, 6, 91, 2**31, 2**32 - 1))
DATA_KEY_SIZE: Final = Kind((1, 15, 65, 2**31, 2**32 - 1))
RANDOM_SIZE: Final = Kind((0, 65_537, 2**31, 2**32 - 1))
BITS: Final = Kind((1, 255, 257, 2**31, 2**32 - 1))
MESSAGE: Final = Kind((bytes(65_537), b"\xff" * 1_048_577))
CIPHERTEXT: Final = Kind((bytes(66_561),))
SIGNATURE: Final = Kind((b"", bytes(1_025), b"\x30\x84\xff\xff\xff\xff"))

MOVES: Final = (
    *("UpdateKey", "ActivateKey", "DeactivateKey", "ReactivateKey", "RevokeKey", "MarkKeyCompromised"),
    *("ScheduleKeyDestruction", "CancelKeyDestruction"),
)
KINDS: Final[dict[str, Kind]] = {
    **{f"{move}Request.key": KEY for move in MOVES},
    **{f"{move}Request.version": VERSION for move in MOVES},
    "CreateKeyRequest.name": NAME,
    "CreateKeyRequest.type": ENUM,
    "CreateKeyRequest.purpose": ENUM,
    "CreateKeyRequest.size_bits": BITS,
    "CreateKeyRequest.custody_min": ENUM,
    "CreateKeyRequest.metadata": METADATA,
    "CreateKeyRequest.max_usage_count": LIMIT,
    "CreateKeyRequest.expires_at": MOMENT,
    "CreateKeyRequest.activated_at": MOMENT,
    "CreateKeyRequest.request_id": REQUEST_ID,
    "GetKeyRequest.key": KEY,
    "GetPublicKeyRequest.key": KEY,
    "ListKeysRequest.page_size": Kind((201, 2**31, 2**32 - 1)),
    "ListKeysRequest.page_token": TOKEN,
    "ListKeysRequest.type": ENUM,
    "ListKeysRequest.purpose": ENUM,
    "ListKeysRequest.state": ENUM,
    "ListKeysRequest.name_prefix": PREFIX,
    "ListKeysRequest.lineage": Kind(OPTIONAL_KEY.refused),
    "UpdateKeyRequest.max_usage_count": LIMIT,
    "UpdateKeyRequest.expires_at": MOMENT,
    "UpdateKeyRequest.metadata": KEY_METADATA,
    "KeyMetadata.entries": METADATA,
    "RevokeKeyRequest.reason": REASON,
    "MarkKeyCompromisedRequest.reason": REASON,
    "MarkKeyCompromisedRequest.occurred_at": MOMENT,
    "ScheduleKeyDestructionRequest.pending_days": DAYS,
    "SignRequest.key": KEY,
    "SignRequest.message": MESSAGE,
    "SignRequest.digest": MESSAGE,
    "SignRequest.scheme": ENUM,
    "SignRequest.hash": ENUM,
    "SignRequest.format": ENUM,
    "SignRequest.request_id": REQUEST_ID,
    "VerifyRequest.key": KEY,
    "VerifyRequest.message": MESSAGE,
    "VerifyRequest.digest": MESSAGE,
    "VerifyRequest.signature": SIGNATURE,
    "VerifyRequest.scheme": ENUM,
    "VerifyRequest.hash": ENUM,
    "VerifyRequest.format": ENUM,
    "VerifyRequest.require_low_s": FLAG,
    "EncryptRequest.key": KEY,
    "EncryptRequest.plaintext": MESSAGE,
    "EncryptRequest.aad": MESSAGE,
    "EncryptRequest.oaep_hash": ENUM,
    "EncryptRequest.request_id": REQUEST_ID,
    "DecryptRequest.ciphertext": CIPHERTEXT,
    "DecryptRequest.aad": MESSAGE,
    "DecryptRequest.key": OPTIONAL_KEY,
    "DecryptRequest.format": ENUM,
    "DecryptRequest.oaep_hash": ENUM,
    "DecryptRequest.allow_compromised": FLAG,
    "DecryptRequest.allow_revoked": FLAG,
    "ReEncryptRequest.ciphertext": CIPHERTEXT,
    "ReEncryptRequest.aad": MESSAGE,
    "ReEncryptRequest.source_key": Kind(OPTIONAL_KEY.refused),
    "ReEncryptRequest.key": OPTIONAL_KEY,
    "ReEncryptRequest.new_aad": MESSAGE,
    "ReEncryptRequest.oaep_hash": ENUM,
    "ReEncryptRequest.allow_compromised": FLAG,
    "ReEncryptRequest.allow_revoked": FLAG,
    "ReEncryptRequest.request_id": REQUEST_ID,
    "GenerateDataKeyRequest.key": KEY,
    "GenerateDataKeyRequest.size_bytes": DATA_KEY_SIZE,
    "GenerateDataKeyRequest.aad": MESSAGE,
    "GenerateDataKeyRequest.without_plaintext": FLAG,
    "GenerateDataKeyRequest.request_id": REQUEST_ID,
    "GenerateRandomRequest.size_bytes": RANDOM_SIZE,
    **{f"Batch{use}Request.items": ITEMS for use in ("Sign", "Verify", "Encrypt", "Decrypt", "ReEncrypt")},
    "SearchEventsRequest.since": MOMENT,
    "SearchEventsRequest.until": MOMENT,
    "SearchEventsRequest.user_id": ID,
    "SearchEventsRequest.resource_id": ID,
    "SearchEventsRequest.event_type": FILTER,
    "SearchEventsRequest.action": FILTER,
    "SearchEventsRequest.outcome": ENUM,
    "SearchEventsRequest.severity_min": ENUM,
    "SearchEventsRequest.request_id": FILTER,
    "SearchEventsRequest.page_size": Kind((1001, 2**31, 2**32 - 1)),
    "SearchEventsRequest.page_token": TOKEN,
    "TailEventsRequest.cursor": TOKEN,
    "VerifyTrailRequest.from_size": VERSION,
    "VerifyTrailRequest.to_size": VERSION,
    "VerifyTrailRequest.keys_after": ID,
    "RotateKeyRequest.key": KEY,
    "RotateKeyRequest.reason": Kind((*REASON.refused, "x" * 101)),
    "RotateKeyRequest.allow_compromised": FLAG,
    "RotateKeyRequest.request_id": REQUEST_ID,
    "RetryRotationRequest.rotation_id": Kind((*ID.refused, "")),
    "SetRotationPolicyRequest.key": KEY,
    "SetRotationPolicyRequest.policy": POLICIES,
    "RotationPolicy.every": SPAN,
    "RotationPolicy.before_expiry": SPAN,
    "RotationPolicy.at_usage_percent": SHARE,
    "RotationPolicy.on_compromise": FLAG,
    "RotationPolicy.paused": FLAG,
    "RotationPolicy.version": VERSION,
    "WatchRotationRequest.rotation_id": Kind((*ID.refused, "")),
    "GetRotationRequest.rotation_id": Kind((*ID.refused, "")),
    "ListRotationsRequest.key": OPTIONAL_KEY,
    "ListRotationsRequest.status": ENUM,
    "ListRotationsRequest.page_size": Kind((201, 2**31, 2**32 - 1)),
    "ListRotationsRequest.page_token": TOKEN,
    "GetLineageUsageRequest.key": KEY,
    "GetLineageUsageRequest.since": MOMENT,
    "GetLineageUsageRequest.page_size": Kind((51, 2**31, 2**32 - 1)),
    "GetLineageUsageRequest.page_token": TOKEN,
    "CreateCertificateAuthorityRequest.name": AUTHORITY_NAME,
    "CreateCertificateAuthorityRequest.subject": Kind((*SUBJECT.refused, ""), reason=SUBJECT.reason),
    "CreateCertificateAuthorityRequest.key_type": ENUM,
    "CreateCertificateAuthorityRequest.size_bits": BITS,
    "CreateCertificateAuthorityRequest.custody_min": ENUM,
    "CreateCertificateAuthorityRequest.parent": PARENT,
    "CreateCertificateAuthorityRequest.external": FLAG,
    "CreateCertificateAuthorityRequest.validity": SPAN,
    "CreateCertificateAuthorityRequest.path_length": Kind((17, 2**31, 2**32 - 1)),
    "CreateCertificateAuthorityRequest.permitted": SUBTREES,
    "CreateCertificateAuthorityRequest.excluded": SUBTREES,
    "CreateCertificateAuthorityRequest.base_url": BASE_URL,
    "CreateCertificateAuthorityRequest.crl_shards": SHARDS,
    "ImportAuthorityCertificateRequest.authority": AUTHORITY,
    "ImportAuthorityCertificateRequest.certificates": CERTIFICATES,
    "UpdateCertificateAuthorityRequest.authority": AUTHORITY,
    "UpdateCertificateAuthorityRequest.version": VERSION,
    "UpdateCertificateAuthorityRequest.allow": Kind(GRANTS, "allow.user_id"),
    "UpdateCertificateAuthorityRequest.disallow": Kind(GRANTS, "disallow.user_id"),
    "UpdateCertificateAuthorityRequest.self_service": Kind((["server"], ["x"], [""], *([text] for text in HIDDEN_TEXTS))),
    "UpdateCertificateAuthorityRequest.set_self_service": FLAG,
    "UpdateCertificateAuthorityRequest.manager_id": ID,
    "UpdateCertificateAuthorityRequest.base_url": BASE_URL,
    "UpdateCertificateAuthorityRequest.crl_shards": SHARDS,
    "UpdateCertificateAuthorityRequest.disable": FLAG,
    "IssuerGrant.user_id": ID,
    "IssuerGrant.profile": PROFILE,
    "RotateCertificateAuthorityRequest.authority": AUTHORITY,
    "RotateCertificateAuthorityRequest.validity": SPAN,
    "GetCertificateAuthorityRequest.authority": AUTHORITY,
    "ListCertificateAuthoritiesRequest.page_size": Kind((201, 2**31, 2**32 - 1)),
    "ListCertificateAuthoritiesRequest.page_token": TOKEN,
    "IssueCertificateRequest.authority": AUTHORITY,
    "IssueCertificateRequest.profile": PROFILE,
    "IssueCertificateRequest.csr": CSR,
    "IssueCertificateRequest.key": KEY,
    "IssueCertificateRequest.subject": SUBJECT,
    "IssueCertificateRequest.names": NAMES,
    "IssueCertificateRequest.user_id": ID,
    "IssueCertificateRequest.validity": SPAN,
    "IssueCertificateRequest.request_id": REQUEST_ID,
    "RenewCertificateRequest.certificate_id": Kind((*ID.refused, "")),
    "RenewCertificateRequest.csr": FLAG,  # whatever it holds, there is no such certificate
    "RenewCertificateRequest.validity": SPAN,
    "RenewCertificateRequest.request_id": REQUEST_ID,
    "CreateCertificateRequestRequest.key": KEY,
    "CreateCertificateRequestRequest.authority": Kind((), "authority"),  # it takes no subject, which the good request has
    "CreateCertificateRequestRequest.subject": SUBJECT,
    "CreateCertificateRequestRequest.names": NAMES,
    "ImportCertificateRequest.key": KEY,
    "ImportCertificateRequest.certificate": CERTIFICATES,
    "GetCertificateRequest.certificate_id": Kind((*ID.refused, "")),
    "ListCertificatesRequest.authority": PARENT,
    "ListCertificatesRequest.key": OPTIONAL_KEY,
    "ListCertificatesRequest.page_size": Kind((201, 2**31, 2**32 - 1)),
    "ListCertificatesRequest.page_token": TOKEN,
    "RevokeCertificateRequest.certificate_id": Kind((*ID.refused, "")),
    "RevokeCertificateRequest.reason": ENUM,
    "GetCrlRequest.authority": AUTHORITY,
    "GetCrlRequest.shard": Kind((1, 2**31, 2**32 - 1)),
    "PublishCrlRequest.authority": AUTHORITY,
    "CreateAcmeAccountRequest.authority": AUTHORITY_NAME,
    "ListAcmeAccountsRequest.page_size": Kind((201, 2**31, 2**32 - 1)),
    "ListAcmeAccountsRequest.page_token": TOKEN,
    "DeactivateAcmeAccountRequest.account_id": Kind((*ID.refused, "")),
    "PublishCrlRequest.shard": Kind((1, 2**31, 2**32 - 1)),
}


def _messages(message: Descriptor) -> Iterator[Descriptor]:
    """Yield *message* and the messages of ours that its fields hold."""
    yield message
    for field in message.fields:
        inner = field.message_type
        if inner is not None and inner.file.package == message.file.package and not inner.GetOptions().map_entry:
            yield from _messages(inner)


def _fields(method: MethodDescriptor) -> Iterator[tuple[str, FieldDescriptor]]:
    for message in _messages(method.input_type):
        for field in message.fields:
            yield f"{message.name}.{field.name}", field


def test_every_field_of_every_request_is_of_a_kind() -> None:
    assert {name for method in METHODS for name, _ in _fields(method)} == set(KINDS)


def _bad_requests(method: MethodDescriptor) -> Iterator[tuple[Message, str, str]]:
    """Yield the good request of *method* with each field, in turn, bad, the name of that field, and the reason of the refusal."""
    request, good = GetMessageClass(method.input_type), GOOD.get(method.input_type.name, {})
    for field in method.input_type.fields:
        kind = KINDS[f"{method.input_type.name}.{field.name}"]
        if kind is ITEMS:
            item: Any = GetMessageClass(_items_of(method))
            yield request(items=[]), "items", kind.reason
            yield request(items=[item(**GOOD[item.DESCRIPTOR.name])] * 257), "items", kind.reason
            continue
        for value in kind.refused:
            yield request(**{**good, field.name: value}), kind.field or field.name, kind.reason


def _items_of(method: MethodDescriptor) -> Descriptor:
    found = method.input_type.fields_by_name["items"].message_type
    assert found is not None
    return found


def _bad_items(items: Descriptor) -> Iterator[tuple[Message, str]]:
    item, good = GetMessageClass(items), GOOD[items.name]
    for field in items.fields:
        kind = KINDS[f"{items.name}.{field.name}"]
        for value in kind.refused:
            made_item = item(**{**good, field.name: value})
            if made_item.ByteSize() < 1_000_000:
                yield made_item, kind.field or field.name


def _called(method: MethodDescriptor, caller: Caller, auditor: Caller) -> Callable[..., Any]:
    services = {
        "KeyService": caller.keys,
        "CryptoService": caller.crypto,
        "AuditService": auditor.audit,
        "RotationService": caller.rotation,
        "CertificateService": caller.certificates,
        "AcmeService": caller.acme,
    }
    services["AdminService"] = caller.admin
    stub: Callable[..., Any] = getattr(services[method.containing_service.name], method.name)
    if not method.server_streaming:
        return stub

    def first(request: Message, timeout: float) -> Any:  # noqa: ANN401 - a message of the method's output type
        stream = stub(request, timeout=timeout)
        try:
            return next(stream)
        finally:
            stream.cancel()

    return first


def _refused_field(status: status_pb2.Status) -> tuple[str, str]:
    info = error_details_pb2.ErrorInfo()
    assert any(detail.Unpack(info) for detail in status.details)
    return info.reason, info.metadata["field"]


@pytest.fixture(scope="session")  # as the server: a worker that comes back to this module would find the names taken
def owner(server: RunningServer) -> Caller:
    """A user with the keys and the authorities that the good requests name. Nothing of them is changed."""
    manager, caller = manager_of(server), manager_of(server)
    with psycopg.connect(server.deployment.database.admin_dsn, autocommit=True) as connection:
        connection.execute("SELECT authentication.assign_role(%s, 'certificate-issuer')", (caller.user_id,))
    made(caller, "aes", name="aes")
    made(caller, "secp256k1", name="ec")
    create(manager, "fields")
    allow(manager, "fields", (caller, "server"))
    create(caller, "fields-own")
    create(caller, "fields-pending", external=True)
    return caller


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_field_that_its_kind_refuses_is_malformed_and_named(owner: Caller, auditor: Caller, method: MethodDescriptor) -> None:
    call = _called(method, owner, auditor)
    for request, field, reason in _bad_requests(method):
        found = refusal(call, request)
        shown = (str(request)[:200], found)
        assert (found.code, found.reason, found.metadata.get("field")) == (MALFORMED[0], reason, field), shown
        assert len(found.message) < 400, shown
        assert found.message.isprintable(), shown


@pytest.mark.parametrize("field", ["every", "before_expiry", "at_usage_percent", "version"])
def test_a_field_of_a_policy_that_its_kind_refuses_is_malformed_and_named(owner: Caller, field: str) -> None:
    for value in KINDS[f"RotationPolicy.{field}"].refused:
        policy = kpb.RotationPolicy(**{"on_compromise": True, field: value})
        found = refusal(owner.rotation.SetRotationPolicy, rpb.SetRotationPolicyRequest(key="aes", policy=policy))
        assert (found.code, found.reason, found.metadata.get("field")) == (*MALFORMED, field), (value, found)


@pytest.mark.parametrize(
    "method", [method for method in METHODS if method.name.startswith("Batch")], ids=lambda method: method.name
)
def test_an_item_that_its_kind_refuses_is_malformed_and_named_alone(
    owner: Caller, auditor: Caller, method: MethodDescriptor
) -> None:
    call, request = _called(method, owner, auditor), GetMessageClass(method.input_type)
    items = _items_of(method)
    good = GetMessageClass(items)(**GOOD[items.name])
    bad = list(_bad_items(items))
    while bad:
        some: list[tuple[Message, str]] = []
        while bad and len(some) < 100 and sum(item.ByteSize() for item, _ in (*some, bad[-1])) < 1_000_000:
            some.append(bad.pop())
        answer = call(request(items=[good, *(item for item, _ in some), good]), timeout=60)
        first, *answered, last = answer.items
        assert method.name in ("BatchDecrypt", "BatchReEncrypt") or (first.HasField("result") and last.HasField("result")), (
            first,
            last,
        )
        for (item, field), got in zip(some, answered, strict=True):
            assert got.HasField("error"), str(item)[:200]
            assert _refused_field(got.error) == ("MALFORMED", field), (str(item)[:200], got)


def _tag(number: int, kind: int) -> bytes:
    return bytes([number << 3 | kind])


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_text_that_is_no_utf_8_is_malformed(owner: Caller, auditor: Caller, method: MethodDescriptor) -> None:
    channel = auditor.channel if method.containing_service.name == "AuditService" else owner.channel
    path = f"/{method.containing_service.full_name}/{method.name}"
    multi: Any = (channel.unary_stream if method.server_streaming else channel.unary_unary)(path, None, None)

    def first(answer: Any) -> Any:  # noqa: ANN401 - what grpc gives
        return next(answer) if method.server_streaming else answer

    def refused(body: bytes) -> Refusal:
        with pytest.raises(grpc.RpcError) as caught:
            first(multi(body, timeout=15))
        return refusal_of(caught.value)

    for field in method.input_type.fields:
        for bad in BAD_UTF8:
            text = bytes([len(bad)]) + bad
            if field.type == FieldDescriptor.TYPE_STRING:
                body = _tag(field.number, 2) + text
            elif field.message_type is not None and field.message_type.GetOptions().map_entry:
                entry = _tag(2, 2) + text
                body = _tag(field.number, 2) + bytes([len(entry)]) + entry
            else:
                continue
            found = refused(body)
            assert (found.code, found.reason) == MALFORMED, (field.name, bad, found)


def test_numbers_at_the_limits_are_accepted_or_refused_for_what_they_mean(owner: Caller, auditor: Caller) -> None:
    for number in (2**31, 2**32, 2**63 - 1):
        for move in MOVES:
            fields = GOOD[f"{move}Request"]
            request = getattr(kpb, f"{move}Request")(**{**fields, "version": number})
            found = refusal(getattr(owner.keys, move), request)
            assert found.reason in ("STALE", "KEY_ACTIVE", "KEY_INACTIVE"), (move, number, found)
        limited = kpb.CreateKeyRequest(
            name=f"limit-{number}", type=kpb.KEY_TYPE_AES, purpose=kpb.KEY_PURPOSE_ENCRYPTION, max_usage_count=number
        )
        assert owner.keys.CreateKey(limited, timeout=30).key.max_usage_count == number
        try:
            assert auditor.audit.VerifyTrail(audit_pb2.VerifyTrailRequest(from_size=number), timeout=60).verified_size < number
        except grpc.RpcError as error:
            assert refusal_of(error).code == grpc.StatusCode.NOT_FOUND, number  # not yet any checkpoint


def test_moments_at_the_limits_are_accepted_or_refused_for_what_they_mean(owner: Caller, auditor: Caller) -> None:
    first, last = (Timestamp(seconds=seconds, nanos=nanos) for seconds, nanos in MOMENTS[1:3])
    auditor.audit.SearchEvents(audit_pb2.SearchEventsRequest(since=first, until=last), timeout=15)
    key = owner.keys.CreateKey(kpb.CreateKeyRequest(name="eternal", **EC, expires_at=last, activated_at=first), timeout=30).key
    assert key.expires_at.ToJsonString() == "9999-12-31T23:59:59.999999Z"
    found = refusal(owner.keys.CreateKey, kpb.CreateKeyRequest(name="k", **EC, expires_at=first))
    assert (found.reason, found.metadata["field"]) == ("MALFORMED", "expires_at")
    found = refusal(owner.keys.UpdateKey, kpb.UpdateKeyRequest(key="eternal", expires_at=first))
    assert (found.reason, found.metadata["field"]) == ("MALFORMED", "expires_at")
    found = refusal(owner.keys.MarkKeyCompromised, kpb.MarkKeyCompromisedRequest(key="eternal", reason="test", occurred_at=last))
    assert (found.reason, found.metadata["field"]) == ("MALFORMED", "occurred_at")
    marked = kpb.MarkKeyCompromisedRequest(key="eternal", reason="test", occurred_at=first)
    assert owner.keys.MarkKeyCompromised(marked, timeout=15).key.state == kpb.KEY_STATE_COMPROMISED
    assert owner.keys.GetKey(kpb.GetKeyRequest(key="eternal"), timeout=15).key.activated_at.ToJsonString().startswith("0001")


def test_what_people_write_is_kept_as_they_wrote_it(owner: Caller, auditor: Caller) -> None:
    entries = {text: text for text in READABLE if len(text.encode()) <= 63}
    assert len(entries) > 15
    update = kpb.UpdateKeyRequest(key="aes", metadata=kpb.KeyMetadata(entries=entries))
    assert dict(owner.keys.UpdateKey(update, timeout=15).key.metadata) == entries
    for number, reason in enumerate(READABLE):
        key = made(owner, "secp256k1", name=f"k{number}")
        owner.keys.RevokeKey(kpb.RevokeKeyRequest(key=key.id, reason=reason), timeout=15)
        events = auditor.audit.SearchEvents(
            audit_pb2.SearchEventsRequest(resource_id=key.id, event_type="key.revoked"), timeout=15
        ).events
        assert [json.loads(event.details_json)["reason"] for event in events] == [reason]
