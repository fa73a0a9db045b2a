"""Configuration: every fault at once, unknown names refused, secrets from the right places only."""

import os
from pathlib import Path

import pytest

from kms import config
from kms.config import ConfigError


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("KMS_")]:
        monkeypatch.delenv(name)


def _written(directory: Path, text: str) -> Path:
    file = directory / "kms.toml"
    file.write_text(text)
    return file


def _secret(directory: Path, *, mode: int = 0o400, content: bytes = b"s3cret\n") -> Path:
    file = directory / "pin"
    file.write_bytes(content)
    file.chmod(mode)
    return file


def _hsm(directory: Path, extra: str = "") -> str:
    (directory / "module.so").touch()
    return f'[hsm]\nmodule = "module.so"\ntoken_label = "t"\n{extra}'


def test_every_fault_is_reported_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KMS_HSM_LANE", "3")
    text = 'mode = "fast"\ncolour = 1\n' + _hsm(tmp_path, 'lanes = 0\npin = "1234"\nsurprise = true\n')
    with pytest.raises(ConfigError) as refusal:
        config.load(_written(tmp_path, text), needs=("hsm", "server"))
    faults = "\n".join(refusal.value.faults)
    for name in ("KMS_HSM_LANE", "mode", "colour", "hsm.lanes", "hsm.pin", "hsm.surprise"):
        assert name in faults
    assert "1234" not in str(refusal.value)


def test_a_missing_section_and_a_missing_file_are_named(tmp_path: Path) -> None:
    text = '[client]\nca_file = "ca"\ncert_file = "cert"\nkey_file = "key"\n'
    with pytest.raises(ConfigError) as refusal:
        config.load(_written(tmp_path, text), needs=("client", "hsm"))
    faults = "\n".join(refusal.value.faults)
    for name in ("client.ca_file", "client.cert_file", "client.key_file", "[hsm]"):
        assert name in faults


def test_a_variable_overrides_the_file_and_paths_are_relative_to_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _secret(tmp_path)
    monkeypatch.setenv("KMS_HSM_TOKEN_LABEL", "other")
    monkeypatch.setenv("KMS_DEPLOYMENT_ID", "blue")
    found = config.load(_written(tmp_path, _hsm(tmp_path, 'pin_file = "pin"\n')), needs=("hsm",))
    assert found.hsm is not None
    assert (found.hsm.token_label, found.deployment_id) == ("other", "blue")
    assert found.hsm.module == tmp_path / "module.so"
    assert found.hsm.read_secret("hsm") == b"s3cret"


@pytest.mark.parametrize("mode", [0o440, 0o404, 0o644, 0o410])
def test_a_secret_that_others_can_reach_is_refused(tmp_path: Path, mode: int) -> None:
    _secret(tmp_path, mode=mode)
    found = config.load(_written(tmp_path, _hsm(tmp_path, 'pin_file = "pin"\n')), needs=("hsm",))
    assert found.hsm is not None
    with pytest.raises(ConfigError, match="0400"):
        found.hsm.read_secret("hsm")


def test_an_empty_secret_is_refused(tmp_path: Path) -> None:
    _secret(tmp_path, content=b"\n")
    found = config.load(_written(tmp_path, _hsm(tmp_path, 'pin_file = "pin"\n')), needs=("hsm",))
    assert found.hsm is not None
    with pytest.raises(ConfigError, match="empty"):
        found.hsm.read_secret("hsm")


def test_a_secret_leaves_the_environment_once_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KMS_HSM_PIN", "s3cret")
    found = config.load(_written(tmp_path, _hsm(tmp_path)), needs=("hsm",))
    assert found.hsm is not None
    assert "s3cret" not in repr(found)
    assert found.hsm.read_secret("hsm") == b"s3cret"
    assert "KMS_HSM_PIN" not in os.environ


def test_a_secret_can_come_by_a_descriptor(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"s3cret\n")
    os.close(writer)
    found = config.load(_written(tmp_path, _hsm(tmp_path, f"pin_fd = {reader}\n")), needs=("hsm",))
    assert found.hsm is not None
    assert found.hsm.read_secret("hsm") == b"s3cret"


def test_two_sources_of_a_secret_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _secret(tmp_path)
    monkeypatch.setenv("KMS_HSM_PIN", "s3cret")
    with pytest.raises(ConfigError, match="exactly one"):
        config.load(_written(tmp_path, _hsm(tmp_path, 'pin_file = "pin"\n')), needs=("hsm",))


@pytest.mark.parametrize("text", ["[hsm", "\xff\xfe", 'hsm = "x"', "[hsm]\nlanes = true\n", "[[hsm]]\n"])
def test_a_broken_file_is_a_configuration_error(tmp_path: Path, text: str) -> None:
    file = tmp_path / "kms.toml"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError):
        config.load(file, needs=("hsm",))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.toml"):
        config.load(tmp_path / "absent.toml")


def test_a_fault_of_one_section_hides_none_of_another(tmp_path: Path) -> None:
    text = _hsm(tmp_path, 'token_lable = "t"\npin_file = "absent-pin"\n') + '[database]\ndsn_file = "absent-dsn"\n'
    with pytest.raises(ConfigError) as refusal:
        config.load(_written(tmp_path, text), needs=("hsm", "database", "server"))
    faults = "\n".join(refusal.value.faults)
    for name in ("hsm.token_lable", "hsm.pin_file: no such file", "database.dsn_file: no such file", "[server]: missing"):
        assert name in faults


@pytest.mark.parametrize("address", ["127.0.0.1:99999", "127.0.0.1", "127.0.0.1:", "a b:1", ":1", "[::1:1"])
def test_an_address_is_a_host_and_a_port_that_exists(tmp_path: Path, address: str) -> None:
    text = f'[client]\nserver = "{address}"\nca_file = "x"\ncert_file = "x"\nkey_file = "x"\n'
    with pytest.raises(ConfigError, match=r"client\.server"):
        config.load(_written(tmp_path, text))


def test_a_file_that_anybody_can_write_to_is_refused(tmp_path: Path) -> None:
    file = _written(tmp_path, "")
    file.chmod(0o666)
    with pytest.raises(ConfigError, match="anybody"):
        config.load(file)


_UNSIGNED = "audit.checkpoints: missing, and needed in production mode: a file outside the database, for signed checkpoints"


@pytest.mark.parametrize(
    ("text", "variables", "is_refused"),
    [
        ("", {}, True),
        ("[audit]\nseal_seconds = 2.0\n", {}, True),
        ('mode = "fast"\n', {}, False),
        ('mode = "development"\n', {}, False),
        ('[audit]\ncheckpoints = "checkpoints"\n', {}, False),
        ("", {"KMS_AUDIT_CHECKPOINTS": "/var/lib/kms/checkpoints"}, False),
        ("", {"KMS_MODE": "development"}, False),
        ('mode = "development"\n', {"KMS_MODE": "production"}, True),
        ("colour = 1\n", {}, True),
        ("colour = 1\n", {"KMS_AUDIT_CHECKPOINTS": "/var/lib/kms/checkpoints"}, False),
    ],
)
def test_in_production_nobody_serves_without_a_memory_of_the_trail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, variables: dict[str, str], is_refused: bool
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as refusal:
        config.load(_written(tmp_path, text), needs=("server", "hsm", "database"))
    assert (_UNSIGNED in refusal.value.faults) == is_refused
    with pytest.raises(ConfigError) as refusal:  # a command that does not serve does without
        config.load(tmp_path / "kms.toml", needs=("hsm",))
    assert _UNSIGNED not in refusal.value.faults
