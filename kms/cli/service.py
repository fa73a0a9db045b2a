"""`kms serve`, `work`, `migrate`, `dev`, `demo`, `version`: running the service."""

import os
from pathlib import Path
from typing import Annotated

import typer

from kms.cli.invocation import Invocation, command
from kms.cli.output import print_json


def serve(
    invocation: Invocation,
    workers: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            max=64,
            help="Processes that serve, on one port. Default: `workers` in [server], or 1.",
        ),
    ] = None,
) -> None:
    """Run the service until SIGTERM or SIGINT; a second signal does not wait for the calls in flight.

    Needs [server], [hsm] and [database] in the configuration. Refuses to start on a token or a database that is not as it
    must be, and says why.
    """
    config = invocation.operator_config("server", "hsm", "database")
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # read when grpc is loaded: its own lines are no JSON
    config = config.with_workers(workers)
    if config.server is not None and config.server.workers > 1:
        from kms.wiring.supervisor import supervise

        raise typer.Exit(supervise(config))
    from kms.wiring import serving

    serving.serve(config)


def work(invocation: Invocation) -> None:
    """Do rotations that are due, without serving, until SIGTERM or SIGINT.

    Needs [hsm] and [database] in the configuration, on any machine of the deployment; uses `journal` in [server]. Several at once
    are safe, also beside kms serve, which does the same.
    """
    config = invocation.operator_config("hsm", "database")
    from kms.wiring import working

    working.work(config)


def migrate(
    invocation: Invocation,
    check: Annotated[bool, typer.Option("--check", help="Change nothing; fail unless the schema is up to date.")] = False,
) -> None:
    """Bring the database's schema up to date.

    Needs [migration]: the login that owns the schema, which the service itself never uses.
    """
    config = invocation.operator_config("migration")
    from kms.wiring import database as wiring

    if check:
        wiring.check_schema(config)
        applied: list[str] = []
    else:
        applied = wiring.migrate(config)
    if invocation.as_json:
        print_json({"applied": applied, "up_to_date": True})
        return
    for name in applied:
        print(f"applied {name}")
    if not applied:
        print("the schema is up to date")


def dev(
    invocation: Invocation,
    directory: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Where everything is kept. Default: ~/.local/share/neo-kms/dev, for root /var/lib/neo-kms/dev"
        ),
    ] = None,
    port: Annotated[int, typer.Option(metavar="PORT", min=0, max=65535, help="Where to listen; 0 takes a free port.")] = 7443,
) -> None:
    """Run the service with a PostgreSQL and a SoftHSM token of its own, until Ctrl-C.

    For trying it out and for development: it protects nothing from this machine. Run again, it finds its keys again.
    """
    from kms.dev.session import run

    run(directory, port=port, as_json=invocation.as_json)


def demo(invocation: Invocation) -> None:
    """Show everything once on real parts, in a temporary directory that is removed at the end."""
    from kms.dev.demo import run

    raise typer.Exit(run(as_json=invocation.as_json))


def version(invocation: Invocation) -> None:
    """Print the version."""
    from kms import __version__

    if invocation.as_json:
        print_json({"version": __version__})
    else:
        print(f"kms {__version__}")


def register(app: typer.Typer) -> None:
    """Add these commands to *app*."""
    command(app, "serve", "kms serve --config /etc/kms/kms.toml", "kms serve --config kms.toml --workers 4")(serve)
    command(app, "work", "kms work --config /etc/kms/kms.toml")(work)
    command(app, "migrate", "kms migrate --config admin.toml", "kms migrate --config admin.toml --check")(migrate)
    command(app, "dev", "kms dev", "kms dev --directory ~/kms")(dev)
    command(app, "demo", "kms demo")(demo)
    command(app, "version", "kms version", "kms version --json")(version)
