"""The `kms` command: its groups, its global options, and what the process ends with."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final, NoReturn

import typer

from kms.cli import (
    acme,
    audit,
    authorities,
    certificates,
    crypto,
    database,
    events,
    hsm,
    kek,
    keys,
    moves,
    partitions,
    records,
    reencryption,
    revocations,
    rotations,
    service,
    status,
    users,
)
from kms.cli.failures import EXIT_CODES_HELP, ExitCode, Failure, failure_of, interrupted, report, usage_failure
from kms.cli.invocation import Invocation, JsonOption
from kms.cli.output import guard_streams
from kms.wiring import collection

_UsageError: Final[type[Exception]] = typer.BadParameter.__mro__[1]
_HELP: Final = f"""Neo KMS: keys made in an HSM, sealed in PostgreSQL, used over gRPC.

--config and --json may stand before or after the command. PINs and connection strings are never arguments: the
configuration names their files, or the environment has them.

{EXIT_CODES_HELP}"""
_EPILOG: Final = """\b
Examples:
  kms dev
  kms --config client.toml key create payments --type secp256k1
  kms sign payments --message hello --encoding hex
  kms COMMAND --help"""

app: Final = typer.Typer(help=_HELP, epilog=_EPILOG, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.callback()
def _global(
    ctx: typer.Context,
    config_file: Annotated[
        Path | None,
        typer.Option("--config", metavar="FILE", envvar="KMS_CONFIG", help="Configuration file (TOML).", show_envvar=True),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    ctx.obj = Invocation(config_file, as_json)


for _part in (service, database, partitions, hsm, kek, records, users, crypto, reencryption, status, authorities, acme):
    _part.register(app)
_keys = keys.register(app)
moves.register(_keys)
rotations.register(app, _keys)
revocations.register(app, certificates.register(app))
audit.register(events.register(app))


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit. It reports an expected failure in one line, with `--json` in one object.

    With *arguments* it is a part of a larger process, whose garbage is not its own.
    """
    # `kms dev` and the demonstration start processes beside grpc's threads; its fork handlers can crash such a child.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    if arguments is not None:
        _end(list(arguments))
    collection.begin()
    try:
        _end(sys.argv[1:])
    finally:
        collection.end()


def _end(given: list[str]) -> NoReturn:
    guard_streams()
    failure = _run(given)
    if failure is not None:
        report(failure, as_json="--json" in given)
    sys.exit(failure.exit_code if failure is not None else ExitCode.OK)


def _run(arguments: list[str]) -> Failure | None:
    try:
        code = typer.main.get_command(app).main(arguments or ["--help"], prog_name="kms", standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:
        _give_up_output()
        sys.exit(ExitCode.FAILED)
    except typer.Abort:
        return interrupted()
    except Exception as error:
        failure = _usage(error) if isinstance(error, _UsageError) else failure_of(error)
        if failure is None:
            raise
        return failure
    if code == ExitCode.INTERRUPTED:  # what typer makes of Ctrl-C
        return interrupted()
    if code:
        sys.exit(code)
    return None


def _usage(error: Exception) -> Failure:
    context: typer.Context | None = getattr(error, "ctx", None)
    message = str(getattr(error, "format_message", error.__str__)())
    return usage_failure(f"{message} Try: {context.command_path} --help" if context is not None else message)


def _give_up_output() -> None:
    # Python flushes standard output once more at exit; the reader is gone.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
