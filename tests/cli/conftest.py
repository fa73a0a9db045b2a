"""The `kms` command, run without the variables of whoever runs the tests, also as a user of a running server."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from kms.domain.ids import identity_uri
from tests.cli.running import Ended, Kms, run_kms
from tests.fixtures.server import DEPLOYMENT, RunningServer

NewConfig = Callable[..., Path]


@pytest.fixture
def kms(monkeypatch: pytest.MonkeyPatch) -> Kms:
    """Run `kms` with arguments; `stdin` is what it reads."""
    for name in [name for name in os.environ if name.startswith("KMS_")]:
        monkeypatch.delenv(name)
    return run_kms


@pytest.fixture
def new_config(server: RunningServer, tmp_path_factory: pytest.TempPathFactory) -> NewConfig:
    """Write the configuration of a new user of the running server, or of an *address* where there is none."""

    def write(address: str | None = None) -> Path:
        directory = tmp_path_factory.mktemp("client")
        issued = server.deployment.certificate(identity_uri(DEPLOYMENT, server.deployment.new_user()))
        issued.write(directory / "client.crt", directory / "client.key")
        authority = server.deployment.directory / "authority.crt"
        settings = {"server": address or server.address, "ca_file": str(authority)}
        settings |= {"cert_file": "client.crt", "key_file": "client.key"}
        lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items()]
        file = directory / "client.toml"
        file.write_text("\n".join(("[client]", *lines)))
        return file

    return write


@pytest.fixture
def ada(new_config: NewConfig) -> Path:
    """The configuration of a user called Ada."""
    return new_config()


@pytest.fixture
def as_ada(kms: Kms, ada: Path) -> Kms:
    """`kms` as Ada."""

    def run(*arguments: object, stdin: bytes = b"") -> Ended:
        return kms("--config", ada, *arguments, stdin=stdin)

    return run
