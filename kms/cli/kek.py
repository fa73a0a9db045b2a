"""`kms kek`: the master keys, which wrap and seal all others."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from kms.cli.invocation import Invocation, command, group
from kms.cli.output import print_json, print_table, progress
from kms.domain.text import json_text

if TYPE_CHECKING:
    from kms.wiring.kek import Ending, Generation

_PAUSE_SECONDS: Final = 5.0
_HEADINGS: Final = (
    "generation",
    "state",
    "made",
    "copy confirmed",
    "envelopes",
    "moved",
    "moved SEALED",
    "not opened",
    "error",
)

GenerationArgument = Annotated[int, typer.Argument(metavar="GENERATION", min=1, max=999_999, show_default=False)]


def rotate(invocation: Invocation) -> None:
    """Make the next generation of master keys in the token. The service moves every envelope to it, while it runs.

    Copy the token afterwards. In production nothing is made under the new generation before `kms hsm backup-confirmed`. Needs
    [database] too. Run it again after an interruption.
    """
    config = invocation.operator_config("hsm", "database")
    from kms.wiring import kek as wiring
    from kms.wiring.token import needs_copy

    number = wiring.rotate(config)
    if invocation.as_json:
        print_json({"generation": number})
        return
    print(f"The token has generation {number}. Copy it now, then run with the copy: kms hsm backup-confirmed")
    if needs_copy(config):
        print("Until then the service makes nothing under it.")


def list_generations(invocation: Invocation) -> None:
    """List the generations of master keys, how many envelopes each still has, and how many have left it. Needs [database] too."""
    config = invocation.operator_config("hsm", "database")
    from kms.wiring import kek as wiring

    found = wiring.generations(config)
    if invocation.as_json:
        print_json({"generations": [_as_json(one) for one in found]})
    else:
        print_table(_HEADINGS, [_row(one) for one in found])


def watch(
    invocation: Invocation,
    seconds: Annotated[float, typer.Option("--seconds", min=0.1, max=3600.0, help="How often to look.")] = _PAUSE_SECONDS,
) -> None:
    """Show how envelopes leave the old generations, until none is left that opens: a bar on a terminal, else lines.

    Before the copy of a new generation is confirmed it says so, and waits for that.

    The service does the work. With --json each look is one object on a line. Needs [database] too.
    """
    config = invocation.operator_config("hsm", "database")
    from kms.wiring import kek as wiring

    with _shown(invocation) as show:
        wiring.watch(config, show, pause_seconds=seconds)


def retire(invocation: Invocation, generation: GenerationArgument) -> None:
    """Have nothing be made under a generation any more. Refused for the newest, and while an envelope names it.

    Its keys stay in the token, and open what an older backup brings back. Needs [database] too.
    """
    config = invocation.operator_config("hsm", "database")
    from kms.wiring import kek as wiring

    wiring.retire(config, generation)
    if invocation.as_json:
        print_json({"retired": generation})
    else:
        print(f"Nothing is made under generation {generation} any more. Its keys are still in the token.")


def destroy(
    invocation: Invocation,
    generation: GenerationArgument,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Remove the keys of a retired generation from the token, for ever. Backups from before it was left become useless.

    Refused while an envelope names it. Copies of the token still have the keys: destroy those, too. Needs [database] too.
    """
    config = invocation.operator_config("hsm", "database")
    from kms.wiring import kek as wiring

    def ask(ending: "Ending") -> None:
        for line in _told(ending):
            typer.echo(line, err=True)
        if not yes:
            typer.confirm(f"The keys of generation {generation} will be lost for ever. Destroy them?", abort=True, err=True)

    wiring.destroy(config, generation, ask)
    if invocation.as_json:
        print_json({"destroyed": generation})
    else:
        print(f"The token has no keys of generation {generation} any more.")


def register(app: typer.Typer) -> None:
    """Add these commands to *app*."""
    master_keys = group(app, "kek", "Rotate the master keys, which wrap and seal all others.")
    command(master_keys, "rotate", "kms kek rotate --config kms.toml")(rotate)
    command(master_keys, "list", "kms kek list --config kms.toml", "kms kek list --config kms.toml --json")(list_generations)
    command(master_keys, "watch", "kms kek watch --config kms.toml")(watch)
    command(master_keys, "retire", "kms kek retire 1 --config kms.toml")(retire)
    command(master_keys, "destroy", "kms kek destroy 1 --config kms.toml")(destroy)


@contextmanager
def _shown(invocation: Invocation) -> Iterator[Callable[[Sequence["Generation"]], None]]:
    with ExitStack() as stack:
        bars: list[Callable[[int, str], None]] = []

        def show(found: Sequence["Generation"]) -> None:
            left, faulty = sum(one.left for one in found), sum(one.not_opened for one in found if one.left)
            done = sum(one.envelopes for one in found if one.state == "in_use")
            if invocation.as_json:
                print(json_text({"generations": [_as_json(one) for one in found]}), flush=True)
                return
            if not bars:
                bars.append(stack.enter_context(progress(done + left, done, quiet=False)))
            waiting = [str(one.number) for one in found if one.state == "waiting"]
            copy = f", generation {', '.join(waiting)} waits for a confirmed copy" if waiting else ""
            bars[0](done, f"{faulty} do not open{copy}")

        yield show


def _told(ending: "Ending") -> list[str]:
    since = ending.last_left_at
    before = f"before {_moment(since)}, when the last envelope left it," if since else f"before {_moment(ending.retired_at)}"
    return [
        f"A backup from {before} has keys under generation {ending.generation}, and they open with its keys alone.",
        f"A backup from after {_moment(ending.retired_at)} needs nothing of it.",
    ]


def _row(one: "Generation") -> tuple[str, ...]:
    moments = (_moment(one.created_at), _moment(one.backup_confirmed_at))
    counts = (one.envelopes, one.moved, one.moved_sealed, one.not_opened)
    return (str(one.number), one.state, *moments, *map(str, counts), one.error_message or "-")


def _as_json(one: "Generation") -> dict[str, Any]:
    return {name: value.isoformat() if isinstance(value, datetime) else value for name, value in asdict(one).items()}


def _moment(moment: datetime | None) -> str:
    return "-" if moment is None else moment.isoformat(timespec="seconds")
