"""A server with ACME, and an authority whose issuer gives accounts to clients."""

import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from kms.dev.postgres import EmbeddedPostgres
from kms.v1 import acme_pb2 as pb
from tests.acme.client import AcmeClient
from tests.acme.stubs import Names, serving_names
from tests.conformance.certificates import Platform, platform
from tests.fixtures.postgres import cloned
from tests.fixtures.server import RunningServer, deployed

ORDERS_MAX: Final = 60


@dataclass(frozen=True, slots=True)
class AcmeServer:
    """A server that serves ACME. Challenges over HTTP are asked on `http_port`."""

    running: RunningServer
    names: Names
    http_port: int
    platform: Platform

    @property
    def ca_file(self) -> Path:
        """What clients trust its certificate by."""
        return self.running.deployment.directory / "authority.crt"

    def new_account(self) -> pb.CreateAcmeAccountResponse:
        """Make an account as the issuer does."""
        request = pb.CreateAcmeAccountRequest(authority=self.platform.name)
        return self.platform.issuer.acme.CreateAcmeAccount(request)

    def client(self) -> AcmeClient:
        """Return a client that has taken a new account."""
        made = self.new_account()
        client = AcmeClient(made.directory_url, self.ca_file)
        assert client.register(made.account.id, made.secret).status == 201
        return client


def free_port() -> int:
    """Return a port on which nobody listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def acme(postgres: EmbeddedPostgres, token_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AcmeServer]:
    """A server with ACME that the tests of this worker share."""
    port, http_port = free_port(), free_port()
    with (
        serving_names(tmp_path_factory.mktemp("names")) as names,
        cloned(postgres) as database,
        deployed(tmp_path_factory.mktemp("acme"), database, token_template) as deployment,
    ):
        deployment.set_server(journal="journal")
        config = deployment.config_file
        config.write_text(
            config.read_text() + f'[acme]\nlisten = "127.0.0.1:{port}"\nurl = "https://127.0.0.1:{port}"\n'
            f'resolvers = ["127.0.0.1:{names.port}"]\nnetworks = ["127.0.0.1/32"]\nhttp_port = {http_port}\n'
            f"orders_per_hour_max = {ORDERS_MAX}\n"
        )
        with deployment.serving() as running:
            yield AcmeServer(running, names, http_port, platform(running, base_url="http://127.0.0.1:1"))


@pytest.fixture
def client(acme: AcmeServer) -> AcmeClient:
    """A client with an account of its own."""
    return acme.client()


@pytest.fixture
def new_client(acme: AcmeServer) -> Callable[[], AcmeClient]:
    """Make clients with accounts of their own."""
    return acme.client
