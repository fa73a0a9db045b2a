"""A SoftHSM token in a directory of ours, for development, the demonstration and tests. It protects nothing from this host."""

import os
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kms.domain.errors import KmsError, Reason
from kms.domain.secret import Secret
from kms.hsm.new_token import new_token
from kms.pki.private_file import write_private

_MODULE_VARIABLE: Final = "KMS_HSM_MODULE"
_CONFIGURATION_VARIABLE: Final = "SOFTHSM2_CONF"
_DIRECTORIES: Final = ("/usr/lib", "/usr/lib64", "/usr/local/lib", "/opt/homebrew/lib", "/usr/lib/*-linux-gnu")


@dataclass(frozen=True, slots=True)
class SoftToken:
    """A token that exists: the module, where its files are, and its label."""

    module: Path
    directory: Path
    label: str

    @property
    def pin_file(self) -> Path:
        """The user's PIN, mode 0400."""
        return self.directory / "pin"

    @property
    def token_directory(self) -> Path:
        """Where SoftHSM keeps the objects: what a backup copies."""
        return self.directory / "tokens"

    @property
    def environment(self) -> dict[str, str]:
        """The variable by which SoftHSM finds this token; it must be set before the module is loaded."""
        return {_CONFIGURATION_VARIABLE: str(self.directory / "softhsm2.conf")}


def find_softhsm() -> Path:
    """Return the path of `libsofthsm2.so`, or the module that KMS_HSM_MODULE names. Raises HSM_UNAVAILABLE."""
    named = os.environ.get(_MODULE_VARIABLE)
    candidates = [Path(named)] if named else _common_places()
    for path in candidates:
        if path.is_file():
            return path
    place = f"{_MODULE_VARIABLE} names a file that is not there" if named else "libsofthsm2.so is not in the usual places"
    raise KmsError(Reason.HSM_UNAVAILABLE, f"{place}: install SoftHSM (Debian: softhsm2) or set {_MODULE_VARIABLE}")


def soft_token(directory: Path, label: str) -> SoftToken:
    """Return the token *label* kept in *directory*, made with random PINs on first use.

    The token becomes findable in this process only with its `environment` set. Raises HSM_UNAVAILABLE.
    """
    token = SoftToken(find_softhsm(), directory.absolute(), label)
    if "#" in str(token.directory) or "\n" in str(token.directory):
        raise KmsError(Reason.HSM_UNAVAILABLE, "SoftHSM cannot have its tokens in a directory with # in its name")
    if not token.directory.exists():
        # Made aside and renamed, so that an interrupted start leaves no token without its PIN.
        unfinished = SoftToken(token.module, token.directory.with_name(token.directory.name + ".unfinished"), label)
        _make(unfinished)
        unfinished.directory.rename(token.directory)
    _write_configuration(token)
    return token


def _make(token: SoftToken) -> None:
    shutil.rmtree(token.directory, ignore_errors=True)
    token.directory.mkdir(mode=0o700, parents=True)
    token.token_directory.mkdir(mode=0o700)
    _write_configuration(token)
    so_pin, pin = (Secret(secrets.token_urlsafe(24).encode()) for _ in range(2))
    write_private(token.directory / "so.pin", so_pin.reveal())
    write_private(token.pin_file, pin.reveal())
    new_token(token.module, token.label, so_pin=so_pin, pin=pin, environment=token.environment)


def _write_configuration(token: SoftToken) -> None:
    lines = (
        f"directories.tokendir = {token.token_directory}",
        "objectstore.backend = file",
        "log.level = ERROR",
        "slots.removable = false",
    )
    (token.directory / "softhsm2.conf").write_text("".join(line + "\n" for line in lines))


def _common_places() -> list[Path]:
    directories = [path for pattern in _DIRECTORIES for path in Path("/").glob(pattern.lstrip("/"))]
    return [
        path / below for path in directories for below in ("softhsm/libsofthsm2.so", "libsofthsm2.so", "pkcs11/libsofthsm2.so")
    ]
