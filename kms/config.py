"""Configuration: one TOML file and `KMS_…` variables, read once, every fault reported together.

A variable overrides the file: `KMS_HSM_TOKEN_LABEL` is `token_label` in `[hsm]`, `KMS_DEPLOYMENT_ID` the top-level id.
Unknown names are faults in both. A secret (`pin`, `dsn`) comes from a file (`…_file`), from an inherited descriptor (`…_fd`) or
from a variable, which is removed from the environment once read; the file itself cannot hold one.
"""

import os
import re
import stat
import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, ValidationError, model_validator

Section = TypeVar("Section")

_PREFIX: Final = "KMS_"
_NOT_SETTINGS: Final = frozenset({"KMS_CONFIG"})
_NAME_FILES: Final = frozenset({"module", "disk_path"})
_SECRETS: Final = frozenset({"pin", "dsn"})
_SECRET_BYTES_MAX: Final = 4096
_PORT_MAX: Final = 65_535
WORKERS_MAX: Final = 64


def _check_port(address: str) -> str:
    if int(address.rpartition(":")[2]) > _PORT_MAX:
        raise ValueError(f"expected a port of at most {_PORT_MAX}")
    return address


Address = Annotated[str, Field(pattern=r"^(\[[0-9a-fA-F:]+\]|[A-Za-z0-9.-]+):[0-9]{1,5}$"), AfterValidator(_check_port)]


class ConfigError(Exception):
    """The configuration cannot be used. `faults` has a sentence for each fault, naming the setting."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("the configuration cannot be used:\n" + "\n".join(f"  {fault}" for fault in faults))
        self.faults = faults

    def __reduce__(self) -> tuple[object, ...]:
        return ConfigError, (self.faults,)


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class ServerConfig(_Section):
    """`[server]`: where to listen, and with which certificates."""

    listen: Address = "127.0.0.1:7443"
    tls_cert_file: Path
    tls_key_file: Path
    client_ca_file: Path
    client_crl_file: Path | None = None
    call_seconds_max: Annotated[float, Field(gt=0, le=600)] = 30.0
    calls_max: Annotated[int, Field(ge=1, le=100_000)] = 1000
    calls_per_user_max: Annotated[int, Field(ge=1, le=100_000)] = 200
    message_seconds_max: Annotated[float, Field(gt=0, le=600)] = 10.0
    connections_max: Annotated[int, Field(ge=2, le=1_000_000)] | None = None
    connections_per_user_max: Annotated[int, Field(ge=1, le=1_000_000)] = 100
    connections_per_address_max: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    connection_idle_seconds: Annotated[float, Field(ge=1, le=86_400)] = 300.0
    connection_age_seconds: Annotated[float, Field(ge=1, le=86_400)] = 3600.0
    streams_per_connection_max: Annotated[int, Field(ge=1, le=100_000)] = 256
    ping_seconds_min: Annotated[float, Field(ge=0.1, le=600)] = 5.0
    journal: Path | None = None
    workers: Annotated[int, Field(ge=1, le=WORKERS_MAX)] = 1
    stuck_seconds: Annotated[float, Field(ge=1, le=600)] = 10.0


class _SecretSection(_Section):
    """A section with one secret, which comes from exactly one of three places."""

    secret_name: ClassVar[str]

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        names = [self.secret_name, f"{self.secret_name}_file", f"{self.secret_name}_fd"]
        if sum(getattr(self, name) is not None for name in names) != 1:
            raise ValueError(f"expected exactly one of {', '.join(names)}")
        return self

    def read_secret(self, section: str) -> bytes:
        """Return the secret without its final line end, or raise `ConfigError`. Call it once: it may empty its source.

        A file must not be open to the group or to others. A variable is removed from the environment.
        """
        value: SecretStr | None = getattr(self, self.secret_name)
        file: Path | None = getattr(self, f"{self.secret_name}_file")
        descriptor: int | None = getattr(self, f"{self.secret_name}_fd")
        try:
            if file is not None:
                found = _read_private(file)
            elif descriptor is not None:
                found = _read_descriptor(descriptor)
            else:
                os.environ.pop(_variable(section, self.secret_name), None)
                found = value.get_secret_value().encode() if value is not None else b""
        except OSError as error:
            raise ConfigError([f"{section}.{self.secret_name}: cannot be read: {error.strerror}"]) from None
        if not found.strip():
            raise ConfigError([f"{section}.{self.secret_name}: is empty"])
        return found.rstrip(b"\r\n")

    def with_secret(self, section: str) -> Self:
        """Return the section with its secret read and held, for a process that has no way to its source."""
        try:
            value = SecretStr(self.read_secret(section).decode())
        except UnicodeDecodeError:
            raise ConfigError([f"{section}.{self.secret_name}: expected UTF-8"]) from None
        sources = {f"{self.secret_name}_file": None, f"{self.secret_name}_fd": None}
        return self.model_copy(update={self.secret_name: value, **sources})


class HsmConfig(_SecretSection):
    """`[hsm]`: the PKCS#11 module, the token in it and how much of it to use."""

    secret_name: ClassVar[str] = "pin"  # noqa: S105 - the name of a setting
    module: Path
    token_label: Annotated[str, Field(min_length=1, max_length=32)]
    pin: SecretStr | None = None
    pin_file: Path | None = None
    pin_fd: Annotated[int, Field(ge=3)] | None = None
    lanes: Annotated[int, Field(ge=1, le=64)] = 2
    sessions_max: Annotated[int, Field(ge=4, le=10_000)] = 16
    queue_max: Annotated[int, Field(ge=1, le=100_000)] = 1024
    handles_max: Annotated[int, Field(ge=1, le=100_000)] = 1000
    handle_idle_seconds: Annotated[float, Field(gt=0, le=3600)] = 30.0
    stuck_seconds: Annotated[float, Field(gt=0, le=600)] = 20.0
    resident_keys_max: Annotated[int, Field(ge=0, le=1000)] = 4
    allow_sealed: bool | None = None


class _PostgresSection(_SecretSection):
    secret_name: ClassVar[str] = "dsn"  # noqa: S105 - the name of a setting
    dsn: SecretStr | None = None
    dsn_file: Path | None = None
    dsn_fd: Annotated[int, Field(ge=3)] | None = None


class DatabaseConfig(_PostgresSection):
    """`[database]`: the service's own login, `kms_service`."""

    connections_max: Annotated[int, Field(ge=1, le=1000)] = 16
    disk_path: Path | None = None


class MigrationConfig(_PostgresSection):
    """`[migration]`: the login that owns the schema; `kms serve` never uses it."""


class ClientConfig(_Section):
    """`[client]`: which server the client commands call, and as whom."""

    server: Address = "127.0.0.1:7443"
    ca_file: Path
    cert_file: Path
    key_file: Path
    timeout_seconds: Annotated[float, Field(gt=0, le=600)] = 30.0


class AuthorityConfig(_Section):
    """`[authority]`: the development identity authority that `kms user add-service` issues certificates from."""

    cert_file: Path
    key_file: Path


class MetricsConfig(_Section):
    """`[metrics]`: where GET /metrics, /livez and /readyz are answered, over plain HTTP."""

    listen: Address = "127.0.0.1:9464"


class PublishingConfig(_Section):
    """`[publishing]`: where certificates of authorities, CRLs and OCSP answers are published, over plain HTTP.

    The bounds are those of each worker.
    """

    listen: Address = "127.0.0.1:7480"
    connections_max: Annotated[int, Field(ge=1, le=100_000)] = 256
    connection_seconds: Annotated[float, Field(ge=1, le=600)] = 30.0
    ocsp_signatures_per_second: Annotated[float, Field(gt=0, le=100_000)] = 50.0


class TracingConfig(_Section):
    """`[tracing]`: the collector that spans are sent to (OTLP over HTTP), and which share of calls without a trace begins one."""

    endpoint: Annotated[str, Field(pattern=r"^https?://[^\s@]+$")]
    sample_ratio: Annotated[float, Field(ge=0, le=1)] = 1.0


class AuditConfig(_Section):
    """`[audit]`: how often the trail is sealed, and the file outside the database that remembers its checkpoints.

    Without the file nothing is signed; in production mode `kms serve` does not start without it.
    """

    checkpoints: Path | None = None
    seal_seconds: Annotated[float, Field(ge=0.1, le=3600)] = 1.0


_ARC: Final = "(0|[1-9][0-9]{0,8})"
_OBJECT_IDENTIFIER: Final = re.compile(rf"([01]\.[1-3]?[0-9]|2\.{_ARC})(\.{_ARC}){{1,10}}")
EXTENDED_KEY_USAGE_NAMES: Final = ("serverAuth", "clientAuth", "codeSigning", "emailProtection", "timeStamping")
# OCSPSigning and anyExtendedKeyUsage: whoever has such a certificate answers for the authority itself, or for everything.
_NOT_FOR_OPERATORS: Final = frozenset({"1.3.6.1.5.5.7.3.9", "2.5.29.37.0"})


def _check_extended_key_usage(usage: str) -> str:
    if usage in _NOT_FOR_OPERATORS or not (usage in EXTENDED_KEY_USAGE_NAMES or _OBJECT_IDENTIFIER.fullmatch(usage)):
        names = ", ".join(EXTENDED_KEY_USAGE_NAMES)
        raise ValueError(f"expected {names}, or an object identifier like 1.3.6.1.4.1.99999.1, not of OCSPSigning or any usage")
    return usage


ExtendedKeyUsageName = Annotated[str, AfterValidator(_check_extended_key_usage)]
KeyUsageName = Literal[
    "digitalSignature", "contentCommitment", "keyEncipherment", "dataEncipherment", "keyAgreement", "encipherOnly", "decipherOnly"
]
SubjectAttribute = Literal["CN", "O", "OU", "C", "ST", "L", "serialNumber"]
_HOURS_MAX: Final = 36_500 * 24
BUILT_IN_PROFILES: Final = frozenset({"server", "client", "code-signing", "intermediate", "ocsp", "root"})
_AGREEMENT_ONLY: Final = frozenset({"encipherOnly", "decipherOnly"})


class ProfileConfig(_Section):
    """`[certificates.profiles.NAME]`: a kind of certificates of the operator's own, for end entities."""

    key_usage: Annotated[frozenset[KeyUsageName], Field(min_length=1)] = frozenset({"digitalSignature"})
    extended_key_usage: Annotated[tuple[ExtendedKeyUsageName, ...], Field(min_length=1, max_length=20)]
    key_types: Annotated[frozenset[Literal["rsa", "p-256", "p-384", "secp256k1", "ed25519"]], Field(min_length=1)] = frozenset(
        {"rsa", "p-256", "p-384", "ed25519"}
    )
    rsa_bits_min: Annotated[int, Field(ge=2048, le=4096, multiple_of=8)] = 2048
    name_kinds: frozenset[Literal["dns", "ip", "uri", "email"]] = frozenset()
    names_min: Annotated[int, Field(ge=0, le=100)] = 0
    names_max: Annotated[int, Field(ge=0, le=100)] = 10
    wildcards: bool = False
    subject_allowed: frozenset[SubjectAttribute] = frozenset({"CN"})
    subject_required: frozenset[SubjectAttribute] = frozenset()
    common_name_is_a_name: bool = False
    validity_hours: Annotated[int, Field(ge=1, le=_HOURS_MAX)] = 90 * 24
    validity_hours_max: Annotated[int, Field(ge=1, le=_HOURS_MAX)] = 398 * 24
    unknown_extensions: Literal["refuse", "drop"] = "refuse"

    @model_validator(mode="after")
    def _is_coherent(self) -> Self:
        for is_coherent, expected in (
            (
                _NOT_FOR_OPERATORS.isdisjoint(self.extended_key_usage),
                "extended_key_usage without OCSPSigning and anyExtendedKeyUsage",
            ),
            (len(set(self.extended_key_usage)) == len(self.extended_key_usage), "each extended_key_usage once"),
            (
                "keyAgreement" in self.key_usage or _AGREEMENT_ONLY.isdisjoint(self.key_usage),
                "encipherOnly and decipherOnly with keyAgreement only",
            ),
            (self.names_min <= self.names_max, "names_min of at most names_max"),
            (bool(self.name_kinds) or self.names_min == 0, "name_kinds, where names_min is not 0"),
            (self.subject_required <= self.subject_allowed, "subject_required among subject_allowed"),
            (self.names_min > 0 or bool(self.subject_required), "names_min of at least 1, or something in subject_required"),
            (self.validity_hours <= self.validity_hours_max, "validity_hours of at most validity_hours_max"),
        ):
            if not is_coherent:
                raise ValueError(f"expected {expected}")
        return self


class CertificatesConfig(_Section):
    """`[certificates]`: profiles of the operator's own, beside those that are built in."""

    profiles: dict[Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")], ProfileConfig] = Field(
        default_factory=dict
    )

    @model_validator(mode="after")
    def _are_new(self) -> Self:
        if taken := sorted(BUILT_IN_PROFILES & self.profiles.keys()):
            raise ValueError(f"expected a name of its own for each profile; built in are already {', '.join(taken)}")
        return self


class Config(_Section):
    """All settings. A section that is absent is None; a command asks for those it needs with `load`."""

    deployment_id: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")] = "neo-kms"
    mode: Literal["production", "development"] = "production"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    server: ServerConfig | None = None
    hsm: HsmConfig | None = None
    database: DatabaseConfig | None = None
    migration: MigrationConfig | None = None
    client: ClientConfig | None = None
    authority: AuthorityConfig | None = None
    metrics: MetricsConfig | None = None
    publishing: PublishingConfig | None = None
    tracing: TracingConfig | None = None
    audit: AuditConfig | None = None
    certificates: CertificatesConfig | None = None

    def with_workers(self, workers: int | None) -> Self:
        """Return the configuration with so many workers; None leaves it as it is."""
        if workers is None or self.server is None:
            return self
        return self.model_copy(update={"server": self.server.model_copy(update={"workers": workers})})


def needed(section: Section | None) -> Section:
    """Return the section; `load(needs=…)` has told the user by name if it is missing."""
    if section is None:
        raise ConfigError(["a section of the configuration that this command needs is missing"])
    return section


def load(path: Path | None, *, needs: tuple[str, ...] = ()) -> Config:
    """Return the configuration in *path* and the environment, or raise `ConfigError` with every fault.

    *needs* names the sections that must be there. Relative paths in the file are relative to the file.
    """
    content, faults = _read(path)
    faults += [f"{name}: no such setting" for name in sorted(_unknown_variables(os.environ))]
    config = None
    try:
        config = Config.model_validate(_overridden(content, os.environ))
    except ValidationError as error:
        faults += [_sentence(fault["loc"], fault["msg"]) for fault in error.errors(include_input=False, include_url=False)]
    # Where a section does not parse, what the file says of the others is looked at all the same.
    sections = {name: _values(config, content, name) for name in needs}
    faults += [f"[{name}]: missing, and needed here" for name, values in sections.items() if values is None]
    faults += [fault for name, values in sections.items() for fault in _missing_files(name, values or {})]
    if "server" in needs:
        faults += _unsigned(config, content)
    if faults or config is None:
        raise ConfigError(faults)
    return config


def _read(path: Path | None) -> tuple[dict[str, Any], list[str]]:
    """Return the file's settings with its paths made absolute, and its faults."""
    if path is None:
        return {}, []
    try:
        if path.stat().st_mode & stat.S_IWOTH:
            return {}, [f"{path}: anybody can write to it; take that right away"]
        content = tomllib.loads(path.read_text())
    except OSError as error:
        return {}, [f"{path}: cannot be read: {error.strerror}"]
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        return {}, [f"{path}: not TOML: {error}"]
    faults = []
    for section, values in content.items():
        for name in list(values) if isinstance(values, dict) else ():
            if name in _SECRETS:
                instead = f"{name}_file, {name}_fd or {_variable(section, name)}"
                faults.append(f"{section}.{name}: a secret is not kept in this file; use {instead}")
                del values[name]
            elif (name.endswith("_file") or name in {*_NAME_FILES, "journal", "checkpoints"}) and isinstance(values[name], str):
                values[name] = str(path.absolute().parent / values[name])
    return content, faults


def _overridden(content: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
    """Return the file's settings with those of the variables over them."""
    found, sections = dict(content), _sections()
    for name in Config.model_fields.keys() - sections.keys():
        if (variable := f"{_PREFIX}{name}".upper()) in environ:
            found[name] = environ[variable]
    for section, kind in sections.items():
        variables = {name: _variable(section, name) for name in kind.model_fields}
        if given := {name: environ[variable] for name, variable in variables.items() if variable in environ}:
            own = content.get(section)
            found[section] = {**own, **given} if isinstance(own, dict) else given
    return found


def _variable(section: str, name: str) -> str:
    return f"{_PREFIX}{section}_{name}".upper()


def _sections() -> dict[str, type[_Section]]:
    kinds = {name: typing.get_args(field.annotation) for name, field in Config.model_fields.items()}
    return {name: kind for name, args in kinds.items() for kind in args if isinstance(kind, type) and issubclass(kind, _Section)}


def _unknown_variables(environ: Mapping[str, str]) -> set[str]:
    sections = _sections()
    known = {f"{_PREFIX}{name}".upper() for name in Config.model_fields if name not in sections}
    known |= {_variable(section, name) for section, kind in sections.items() for name in kind.model_fields}
    return {name for name in environ if name.startswith(_PREFIX)} - known - _NOT_SETTINGS


def _sentence(where: tuple[int | str, ...], message: str) -> str:
    name = ".".join(map(str, where))
    return (
        f"{name}: no such setting" if message.startswith("Extra inputs") else f"{name}: {message.removeprefix('Value error, ')}"
    )


def _values(config: Config | None, content: dict[str, Any], section: str) -> dict[str, Any] | None:
    if config is None:
        prefix = _variable(section, "")
        given = content.get(section)
        return given if isinstance(given, dict) else {} if any(name.startswith(prefix) for name in os.environ) else None
    found: _Section | None = getattr(config, section)
    return None if found is None else {name: getattr(found, name) for name in type(found).model_fields}


def _unsigned(config: Config | None, content: dict[str, Any]) -> list[str]:
    """Return the fault of a service in production that remembers no checkpoint: it could sign two histories of the trail."""
    mode = os.environ.get(f"{_PREFIX}MODE", content.get("mode", "production")) if config is None else config.mode
    if mode != "production" or (_values(config, content, "audit") or {}).get("checkpoints"):
        return []
    if config is None and _variable("audit", "checkpoints") in os.environ:
        return []
    return ["audit.checkpoints: missing, and needed in production mode: a file outside the database, for signed checkpoints"]


def _missing_files(section: str, values: Mapping[str, Any]) -> list[str]:
    named = {name: value for name, value in values.items() if value and (name.endswith("_file") or name in _NAME_FILES)}
    files = {name: Path(value) for name, value in named.items()}
    return [f"{section}.{name}: no such file: {file}" for name, file in files.items() if not file.exists()]


def _read_descriptor(descriptor: int) -> bytes:
    with os.fdopen(descriptor, "rb") as stream:
        return stream.read(_SECRET_BYTES_MAX)


def _read_private(file: Path) -> bytes:
    with file.open("rb") as stream:
        if os.fstat(stream.fileno()).st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise PermissionError(0, "open to the group or to others; make it mode 0400")
        return stream.read(_SECRET_BYTES_MAX)
