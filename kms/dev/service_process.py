"""`kms serve` as a child process: started, awaited until it is healthy, and stopped as an operator would."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kms.config import ClientConfig
from kms.dev.bound_process import bound
from kms.domain.errors import KmsError, Reason

_START_SECONDS: Final = 60.0
_STOP_SECONDS: Final = 60.0  # longer than the calls in flight may take
_POLL_SECONDS: Final = 0.05
_TAIL_LINES: Final = 5


@dataclass(frozen=True, slots=True)
class ServiceProcess:
    """A service that runs. It ends with this process, however that ends."""

    process: subprocess.Popen[bytes]
    log_file: Path

    def wait(self) -> None:
        """Wait until the service ends by itself, and raise STORE_UNAVAILABLE with what it said last."""
        self.process.wait()
        raise self._ended()

    def await_health(self, client: ClientConfig) -> None:
        """Return when the service answers *client* that it serves; raise STORE_UNAVAILABLE if it ends or takes too long."""
        deadline = time.monotonic() + _START_SECONDS
        while not is_serving(client):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise self._ended()
            time.sleep(_POLL_SECONDS)

    def stop(self) -> None:
        """Send SIGTERM and wait for the end; after a minute, kill."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            self.process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            raise KmsError(Reason.STORE_UNAVAILABLE, f"the service did not stop in time; its log is {self.log_file}") from None

    def _ended(self) -> KmsError:
        said = "\n".join(self.log_file.read_text(errors="replace").splitlines()[-_TAIL_LINES:])
        return KmsError(Reason.STORE_UNAVAILABLE, f"the service does not run; the end of its log, {self.log_file}:\n{said}")


@contextmanager
def service_process(
    environment: Mapping[str, str], log_file: Path, client: ClientConfig, *, workers: int | None = None
) -> Iterator[ServiceProcess]:
    """Run `kms serve` in *environment* until the end, its output going to *log_file*; yield it when *client* finds it healthy.

    *workers* None is as many as the configuration says.
    """
    options = [] if workers is None else ["--workers", str(workers)]
    with open(os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as log:
        command = bound([sys.executable, "-m", "kms", "serve", *options], signal.SIGTERM)
        # A session of its own keeps Ctrl-C from it: it ends when we say, after whoever uses it.
        process = subprocess.Popen(  # noqa: S603  # our own interpreter and module
            command, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
        )
    service = ServiceProcess(process, log_file)
    try:
        service.await_health(client)
        yield service
    finally:
        service.stop()


def is_serving(client: ClientConfig) -> bool:
    """Ask the service's gRPC health over mutual TLS."""
    files = (client.ca_file, client.key_file, client.cert_file)
    credentials = grpc.ssl_channel_credentials(*(file.read_bytes() for file in files))
    with grpc.secure_channel(client.server, credentials) as channel, suppress(grpc.RpcError):
        check = health_pb2_grpc.HealthStub(channel).Check  # type: ignore[attr-defined]  # the stubs leave it out
        answer = check(health_pb2.HealthCheckRequest(), timeout=2)
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
    return False
