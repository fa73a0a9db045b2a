"""The client side of the API: a channel with mutual TLS, and errors with the reason that the service gave."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, Protocol, TypeVar

from kms.cli.failures import CallError
from kms.config import ClientConfig

# Set before grpc is imported: it writes of its own accord to standard error, where only our line belongs.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from kms.v1 import crypto_pb2_grpc, keys_pb2_grpc

Request = TypeVar("Request", contravariant=True)
Response = TypeVar("Response", covariant=True)

_UNREACHABLE: Final = "SERVER_UNAVAILABLE"


class _Method(Protocol[Request, Response]):
    def __call__(self, request: Request, /, timeout: float | None = None) -> Response: ...


class Client:
    """The stubs of both services. `call` invokes one of their methods within the configured time."""

    def __init__(self, channel: grpc.Channel, config: ClientConfig) -> None:
        self.keys = keys_pb2_grpc.KeyServiceStub(channel)
        self.crypto = crypto_pb2_grpc.CryptoServiceStub(channel)
        self._config = config

    def call(self, method: _Method[Request, Response], request: Request) -> Response:
        """Return the response, or raise `CallError`."""
        try:
            return method(request, timeout=self._config.timeout_seconds)
        except grpc.RpcError as error:
            raise call_error(error, self._config.server) from None


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
    for detail in status.details if status is not None else ():
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info):
            return CallError(code.name, info.reason, message, info.metadata)
    if code is grpc.StatusCode.UNAVAILABLE:
        return CallError(code.name, _UNREACHABLE, f"{server} does not answer as a KMS server: {message}", {"server": server})
    return CallError(code.name, code.name, message, {})
