"""How a command is run: `--config` and `--json` before or after its name, and examples at the end of its help."""

import inspect
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from kms.domain.text import escaped

if TYPE_CHECKING:  # all take longer to import than `--help` may last
    from structlog.typing import EventDict

    from kms.cli.client import Client
    from kms.config import Config

CommandFunction = Callable[..., None]
ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="Configuration file (TOML).", show_default="KMS_CONFIG"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON; errors too.")]

_KEYWORD: Final = inspect.Parameter.KEYWORD_ONLY


@dataclass(frozen=True, slots=True)
class Invocation:
    """What every command gets: which configuration, and in which form to answer."""

    config_file: Path | None = None
    as_json: bool = False

    def config(self, *needs: str) -> "Config":
        """Return the configuration with the sections that *needs* names, or raise `ConfigError` with every fault."""
        from kms.config import ConfigError, load

        try:
            return load(self.config_file, needs=needs)
        except ConfigError as error:
            if self.config_file is not None:
                raise
            raise ConfigError([*error.faults, "no file is named: use --config FILE or KMS_CONFIG"]) from None

    def operator_config(self, *needs: str) -> "Config":
        """The same for a command that runs a part of the service here: what that logs is not mixed with the answer.

        Warnings go to standard error; `kms serve` writes its own log instead.
        """
        import structlog

        structlog.configure(
            processors=[
                structlog.contextvars.merge_contextvars,
                structlog.processors.add_log_level,
                structlog.processors.TimeStamper(fmt="iso", utc=True),
                structlog.processors.format_exc_info,
                _on_one_line,
                structlog.dev.ConsoleRenderer(colors=False),
            ],
            wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
            logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        )
        return self.config(*needs)

    @contextmanager
    def client(self) -> Iterator["Client"]:
        """Connect as `[client]` says. Raises `ConfigError` here, and in the block `CallError`."""
        from kms.cli.client import connect

        section = self.config("client").client
        assert section is not None  # noqa: S101 - `needs` has seen to it
        with connect(section) as client:
            yield client


def _on_one_line(_logger: object, _method: str, event: "EventDict") -> "EventDict":
    """Escape hidden characters: a value may come from the database. Only a traceback has lines."""
    return {name: escaped(value) if isinstance(value, str) and name != "exception" else value for name, value in event.items()}


def command(app: typer.Typer, name: str, *examples: str) -> Callable[[CommandFunction], CommandFunction]:
    """Register a function whose first parameter is an `Invocation` as the command *name*, with *examples* in its help."""

    def register(function: CommandFunction) -> CommandFunction:
        parameters = list(inspect.signature(function, eval_str=True).parameters.values())[1:]

        def run(ctx: typer.Context, **arguments: Any) -> None:  # noqa: ANN401 - whatever the command's options are
            config_file, as_json = arguments.pop("config_file"), arguments.pop("as_json")
            above = ctx.find_object(Invocation) or Invocation()
            function(Invocation(config_file or above.config_file, as_json or above.as_json), **arguments)

        run.__signature__ = inspect.Signature([*_CONTEXT, *_keyword_only(parameters), *_GLOBAL])  # type: ignore[attr-defined]  # read by inspect
        run.__doc__ = function.__doc__
        app.command(name, epilog=_epilog(examples))(run)
        return function

    return register


def group(app: typer.Typer, name: str, description: str) -> typer.Typer:
    """Add a group of commands to *app* and return it."""
    found = typer.Typer(help=description, rich_markup_mode=None)
    app.add_typer(found, name=name)
    return found


def _keyword_only(parameters: list[inspect.Parameter]) -> list[inspect.Parameter]:
    return [parameter.replace(kind=_KEYWORD) for parameter in parameters]


def _epilog(examples: tuple[str, ...]) -> str:
    # \b keeps the lines as they are, so that each can be copied.
    return "\n".join(("\b", "Examples:", *(f"  {example}" for example in examples)))


_CONTEXT: Final = (inspect.Parameter("ctx", _KEYWORD, annotation=typer.Context),)
_GLOBAL: Final = (
    inspect.Parameter("config_file", _KEYWORD, default=None, annotation=ConfigOption),
    inspect.Parameter("as_json", _KEYWORD, default=False, annotation=JsonOption),
)
