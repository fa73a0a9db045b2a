"""The client side of the API: a channel with mutual TLS, and errors with the reason that the service gave."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, Protocol, TypeVar

from kms.cli.failures import CallError
from kms.config import ClientConfig

# Set before grpc is imported: it writes of its own accord to standard error, where only our line belongs.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from kms.v1 import (
    acme_pb2_grpc,
    admin_pb2_grpc,
    audit_pb2,
    audit_pb2_grpc,
    certificates_pb2_grpc,
    crypto_pb2_grpc,
    keys_pb2_grpc,
    rotation_pb2,
    rotation_pb2_grpc,
)

Request = TypeVar("Request", contravariant=True)
Response = TypeVar("Response", covariant=True)

_REOPEN_SECONDS: Final = 0.5
_UNREACHABLE: Final = "SERVER_UNAVAILABLE"


class _Method(Protocol[Request, Response]):
    def __call__(self, request: Request, /, timeout: float | None = None) -> Response: ...


class Client:
    """The stubs of the services. `call` invokes one of their methods within the configured time."""

    def __init__(self, channel: grpc.Channel, config: ClientConfig) -> None:
        self.keys = keys_pb2_grpc.KeyServiceStub(channel)
        self.crypto = crypto_pb2_grpc.CryptoServiceStub(channel)
        self.audit = audit_pb2_grpc.AuditServiceStub(channel)
        self.admin = admin_pb2_grpc.AdminServiceStub(channel)
        self.rotation = rotation_pb2_grpc.RotationServiceStub(channel)
        self.acme = acme_pb2_grpc.AcmeServiceStub(channel)
        self.certificates = certificates_pb2_grpc.CertificateServiceStub(channel)
        self._config = config

    def call(self, method: _Method[Request, Response], request: Request) -> Response:
        """Return the response, or raise `CallError`."""
        try:
            return method(request, timeout=self._config.timeout_seconds)
        except grpc.RpcError as error:
            raise call_error(error, self._config.server) from None

    def pages(self, method: _Method[Any, Any], request: Any, field: str, limit: int) -> Iterator[Any]:  # noqa: ANN401
        """Yield what the pages of a list hold in *field*, at most *limit* items; 0: all. Raises `CallError`."""
        count = 0
        for page in self.whole_pages(method, request):
            for item in getattr(page, field):
                yield item
                count += 1
                if count == limit:
                    return

    def whole_pages(self, method: _Method[Any, Any], request: Any) -> Iterator[Any]:  # noqa: ANN401
        """Yield the pages of a list. An empty page is not always the last: only a page without a token is."""
        while True:
            page = self.call(method, request)
            yield page
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def followed(self, cursor: str) -> Iterator[audit_pb2.TailEventsResponse]:
        """Yield what the trail holds behind *cursor*, without end, or raise `CallError`.

        A stream that the server ended in good order (it drains, or the stream's hour is over) is opened again where it stood.
        """
        while True:
            # The stub's type is no iterator: types-grpcio says so of every stream.
            stream: Any = self.audit.TailEvents(audit_pb2.TailEventsRequest(cursor=cursor))
            try:
                for answer in stream:
                    cursor = answer.cursor
                    yield answer
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                    raise call_error(error, self._config.server) from None
            finally:
                stream.cancel()
            time.sleep(_REOPEN_SECONDS)

    def watched(self, rotation_id: str) -> Iterator[rotation_pb2.Rotation]:
        """Yield a rotation at once, and again with each change, until it is over. Raises `CallError`.

        A stream that the server ended in good order before that is opened again.
        """
        over = (rotation_pb2.ROTATION_STATUS_COMPLETED, rotation_pb2.ROTATION_STATUS_FAILED)
        shown: rotation_pb2.Rotation | None = None
        while shown is None or shown.status not in over:
            stream: Any = self.rotation.WatchRotation(rotation_pb2.WatchRotationRequest(rotation_id=rotation_id))
            try:
                for answer in stream:
                    if answer.rotation != shown:
                        yield answer.rotation
                    shown = answer.rotation
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                    raise call_error(error, self._config.server) from None
            finally:
                stream.cancel()
            if shown is None or shown.status not in over:
                time.sleep(_REOPEN_SECONDS)


@contextmanager
def connect(config: ClientConfig) -> Iterator[Client]:
    """Yield a client of the server that *config* names, and close its channel. Raises OSError for an unreadable file.

    The connection is made at the first call.
    """
    credentials = grpc.ssl_channel_credentials(
        config.ca_file.read_bytes(), config.key_file.read_bytes(), config.cert_file.read_bytes()
    )
    with grpc.secure_channel(config.server, credentials) as channel:
        yield Client(channel, config)


def call_error(error: grpc.RpcError, server: str) -> CallError:
    """Return what *error* says: the service's reason, message and metadata, or that *server* does not answer."""
    call: Any = error  # every error of a stub is a grpc.Call too, which the stubs' types do not know
    code: grpc.StatusCode = call.code()
    message = str(call.details() or code.name)
    status = rpc_status.from_call(call)
    info = _info(status) if status is not None else None
    if info is not None:
        return CallError(code.name, info.reason, message, info.metadata)
    if code is grpc.StatusCode.UNAVAILABLE:
        return CallError(code.name, _UNREACHABLE, f"{server} does not answer as a KMS server: {message}", {"server": server})
    return CallError(code.name, code.name, message, {})


def status_error(status: status_pb2.Status) -> CallError:
    """Return what the status of an item of a batch says."""
    info = _info(status) or error_details_pb2.ErrorInfo()
    code = code_pb2.Code.Name(status.code)  # type: ignore[arg-type]  # the field is a number of this enumeration
    return CallError(code, info.reason or code, status.message, info.metadata)


def _info(status: status_pb2.Status) -> error_details_pb2.ErrorInfo | None:
    for detail in status.details:
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info):
            return info
    return None
