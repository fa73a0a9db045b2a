"""The image, the compose file, and the service's parts in containers. Skipped where there is no Docker engine."""

import json
import os
import shutil
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from testcontainers.core.container import DockerContainer

from kms.config import ClientConfig
from kms.dev.service_process import is_serving
from kms.dev.stack_files import free_port
from kms.store.migrate import check
from tests.fixtures.containers import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.xdist_group("docker")]


class Compose:
    """`docker-compose.yml` as a project of its own, on a port of its own."""

    def __init__(self, docker: str) -> None:
        standalone = shutil.which("docker-compose")
        self._command = [standalone] if standalone else [docker, "compose"]
        self._docker = docker
        self.name = f"kms-test-{uuid.uuid4().hex[:8]}"
        self.port = free_port()

    def __call__(self, *arguments: str) -> str:
        command = [*self._command, "-p", self.name, "-f", str(ROOT / "docker-compose.yml"), *arguments]
        environment = {**os.environ, "KMS_PORT": str(self.port)}
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    def kms(self, *arguments: str) -> str:
        return self("exec", "-T", "kms", "kms", *arguments)

    def inspect(self, service: str, template: str) -> str:
        container = self("ps", "-q", service).strip()
        command = [self._docker, "inspect", "--format", template, container]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    def await_health(self) -> None:
        deadline = time.monotonic() + 120
        while self.inspect("kms", "{{.State.Health.Status}}") != "healthy":
            assert time.monotonic() < deadline, self("logs", "kms", "prepare")
            time.sleep(1)


@pytest.fixture
def compose(docker: str, service_image: str) -> Iterator[Compose]:
    assert service_image
    project = Compose(docker)
    try:
        yield project
    finally:
        project("down", "-v")


def test_the_compose_file_serves_and_keeps_its_keys_over_a_restart(compose: Compose) -> None:
    compose("up", "-d", "--no-build")
    compose.await_health()
    compose.kms("key", "create", "payments", "--type", "secp256k1")
    signature = compose.kms("sign", "payments", "--message", "hello", "--encoding", "hex").strip()
    compose("down")
    compose("up", "-d", "--no-build")
    compose.await_health()
    compose.kms("verify", "payments", "--message", "hello", "--signature-hex", signature)


def test_the_host_reaches_the_service_with_the_certificate_that_the_stack_made(compose: Compose, tmp_path: Path) -> None:
    compose("up", "-d", "--no-build")
    compose.await_health()
    paths = ("authority/authority.crt", "clients/developer/client.crt", "clients/developer/client.key")
    ca, cert, key = (tmp_path / Path(path).name for path in paths)
    for path, file in zip(paths, (ca, cert, key), strict=True):
        file.write_text(compose("exec", "-T", "kms", "cat", f"/var/lib/kms/service/{path}"))
    assert is_serving(ClientConfig(server=f"localhost:{compose.port}", ca_file=ca, cert_file=cert, key_file=key))


def test_no_secret_is_in_what_docker_knows_of_a_container(compose: Compose) -> None:
    compose("up", "-d", "--no-build")
    compose.await_health()
    found = [compose("exec", "-T", "postgres", "cat", "/run/kms/postgres").strip()]
    secrets = ("/var/lib/kms/service/secrets/service.password", "/var/lib/kms/hsm/token/pin")
    found += [compose("exec", "-T", "kms", "cat", path).strip() for path in secrets]
    assert all(len(secret) >= 16 for secret in found)
    shown = "".join(compose.inspect(service, "{{json .}}") for service in ("postgres", "kms")) + compose("logs")
    assert not [secret for secret in found if secret in shown]
    assert compose("exec", "-T", "kms", "id", "-u").strip() != "0"
    assert "postgres" not in compose("exec", "-T", "kms", "ls", "/var/lib/kms/password")


def test_the_image_holds_nothing_but_what_the_service_needs(docker: str, service_image: str) -> None:
    command = [docker, "run", "--rm", "--entrypoint", "python", service_image, "-m", "pip", "list", "--format", "json"]
    listed = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert {"neo-kms", "grpcio", "python-pkcs11"} <= {each["name"] for each in listed}
    assert not {"pytest", "mypy", "ruff", "testcontainers"} & {each["name"] for each in listed}


def test_the_migrations_run_on_a_postgresql_in_a_container(postgres_container: str) -> None:
    assert check(postgres_container) == []
    with psycopg.connect(postgres_container) as connection:
        row = connection.execute("SELECT rolsuper OR rolbypassrls FROM pg_roles WHERE rolname = 'kms_service'").fetchone()
    assert row == (False,)


def test_a_token_in_a_container_is_initialised_once(softhsm_container: DockerContainer) -> None:
    assert softhsm_container.exec(["kms", "hsm", "init"]).exit_code == 0
    assert softhsm_container.exec(["kms", "hsm", "probe", "--json"]).exit_code == 0
    again = softhsm_container.exec(["kms", "hsm", "init"])
    assert again.exit_code == 1
    assert b"NAME_TAKEN" in again.output
