"""`kms dev`: the embedded stack, staying up until it is told to stop."""

import json
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

from kms.dev.embedded_stack import PORT, default_directory, dev_stack
from kms.dev.stack import Stack


def run(directory: Path | None = None, *, port: int = PORT, as_json: bool = False) -> None:
    """Run the stack in *directory* (None: `default_directory()`) until Ctrl-C or SIGTERM; say how to use it once it serves.

    It listens on *port* of this machine's own interface, on a free one for 0. With *as_json* what it says is one JSON object a
    line, first `serving`, then `stopped`. Raises `KmsError`, saying why, if something does not start or ends by itself.
    """
    where = (directory or default_directory()).absolute()
    with suppress(KeyboardInterrupt), _termination_interrupts():
        if not as_json:
            _say(f"Starting PostgreSQL, a SoftHSM token and the service in {where} …")
        with dev_stack(where, port=port) as stack, stack.serving() as service:
            _say(json.dumps(_described(stack)) if as_json else _instructions(stack))
            service.wait()
    _say('{"state": "stopped"}' if as_json else "\nStopped. `kms dev` finds everything again.")


@contextmanager
def _termination_interrupts() -> Iterator[None]:
    """Make SIGTERM end the block as Ctrl-C does: through every `finally`."""

    def interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _say(text: str) -> None:
    print(text, flush=True)


def _described(stack: Stack) -> dict[str, str | dict[str, str]]:
    return {
        "state": "serving",
        "server": stack.address,
        "directory": str(stack.files.directory),
        "config_file": str(stack.files.configuration),
        "client_config_file": str(stack.files.client_configuration),
        "log_file": str(stack.files.service_log),
        "environment": stack.variables,
    }


def _instructions(stack: Stack) -> str:
    variables = [f"{name}={shlex.quote(value)}" for name, value in stack.variables.items()]
    exports = "\n  ".join(f"export {each}" for each in [*_path(), *variables])
    return f"""
The service runs at {stack.address}, for this machine only. Ctrl-C stops it.
It publishes CRLs and answers OCSP at http://{stack.publishes_on}
Its log is {stack.files.service_log}

In another terminal:

  {exports}
  kms key create payments --type secp256k1
  kms sign payments --message 'pay 5 to Bob' --encoding hex
  kms key create backups --type aes
  printf secret | kms encrypt backups --out secret.kms
  kms decrypt --in secret.kms
  kms key list
  kms user add-service billing
"""


def _path() -> list[str]:
    """Return what must be exported for a shell to find `kms` as this very program; nothing where it does already."""
    program = Path(sys.executable).with_name("kms")
    return [] if shutil.which("kms") == str(program) else [f"PATH={shlex.quote(str(program.parent))}:$PATH"]
