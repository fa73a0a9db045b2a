"""What a person at a terminal sees: a pseudo-terminal takes the place of the pipe."""

import base64
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.running import Kms


def _on_terminal(config: Path, *arguments: object, stdin: bytes = b"") -> str:
    """Run `kms` with a terminal as its standard output and return what that shows."""
    ours, terminal = pty.openpty()
    command = [sys.executable, "-m", "kms", "--config", str(config), *map(str, arguments)]
    environment = {**os.environ, "COLUMNS": "120", "NO_COLOR": "1"}
    subprocess.run(command, input=stdin, stdout=terminal, env=environment, check=True, timeout=60)
    os.close(terminal)
    shown = os.read(ours, 65_536)
    os.close(ours)
    return shown.decode(errors="replace").replace("\r\n", "\n")


@pytest.fixture
def backups(as_ada: Kms) -> str:
    """An AES key of Ada's."""
    assert as_ada("key", "create", "backups", "--type", "aes").code == 0
    return "backups"


def test_a_list_has_headings(ada: Path, backups: str) -> None:
    lines = _on_terminal(ada, "key", "list").splitlines()
    assert any("name" in line and "custody" in line for line in lines)
    assert any(backups in line and "active" in line for line in lines)


def test_bytes_are_shown_in_base64(ada: Path, backups: str, as_ada: Kms) -> None:
    shown = _on_terminal(ada, "encrypt", backups, "--message", "secret")
    assert as_ada("decrypt", stdin=base64.b64decode(shown, validate=False)).out == b"secret"


def test_a_plaintext_that_is_text_is_shown_as_it_is(ada: Path, backups: str, as_ada: Kms) -> None:
    sealed = as_ada("encrypt", backups, "--message", "grüße\tan alle").out
    assert _on_terminal(ada, "decrypt", stdin=sealed).expandtabs() == "grüße\tan alle\n".expandtabs()


def test_a_plaintext_cannot_steer_the_terminal(ada: Path, backups: str, as_ada: Kms) -> None:
    hostile = b"\x1b]0;title\x07"
    shown = _on_terminal(ada, "decrypt", stdin=as_ada("encrypt", backups, stdin=hostile).out)
    assert "\x1b" not in shown
    assert base64.b64decode(shown) == hostile
