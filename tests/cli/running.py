"""Runs the `kms` command in this process, as its users do: arguments and standard input in, bytes and an exit code out."""

import io
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from kms.cli.main import main


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended."""

    code: int
    out: bytes
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """What it printed, as JSON."""
        found: dict[str, Any] = json.loads(self.out)
        return found

    @property
    def failure(self) -> dict[str, Any]:
        """What it reported on standard error, as JSON."""
        found: dict[str, Any] = json.loads(self.err)
        return found


Kms = Callable[..., Ended]


def run_kms(*arguments: object, stdin: bytes = b"") -> Ended:
    """Run `kms` with *arguments* and *stdin*."""
    given, out, err = (io.TextIOWrapper(io.BytesIO(data), encoding="utf-8") for data in (stdin, b"", b""))
    with pytest.MonkeyPatch.context() as patch:
        for name, stream in (("stdin", given), ("stdout", out), ("stderr", err)):
            patch.setattr(sys, name, stream)
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
    return Ended(int(ended.value.code or 0), _written(out), _written(err).decode())


def _written(stream: io.TextIOWrapper) -> bytes:
    stream.flush()
    stream.seek(0)
    return bytes(stream.buffer.read())
