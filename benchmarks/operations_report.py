"""What `operations.py` makes of its samples: ratios, round by round, of a call to its limits, and two tables in Markdown."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from rich import box
from rich.table import Table

from benchmarks.operations_calls import BATCH_ITEMS, SIGNING
from benchmarks.operations_load import ECHO

COMMIT: Final = "durable commit"
CREATE: Final = "create-key"
CROWD: Final = 32
# A batch is a crowd by itself: four of them keep a hundred times as many uses on their way.
_BATCH_CROWD: Final = 4
_CPU_MAX: Final = 1.5
LANES: Final = 2


@dataclass(frozen=True, slots=True)
class Operation:
    """Something measured, by one client and by a crowd of them, with what is aimed at for the crowd.

    `share_min` is of the lesser of the limits, `rate_min` is a second, `cpu_max` is times echo and token. None: no aim.
    """

    name: str
    crowd: int = CROWD
    share_min: float | None = None
    rate_min: float | None = None
    cpu_max: float | None = _CPU_MAX


@dataclass(frozen=True, slots=True)
class Sample:
    """One round of one thing. Processor times are in microseconds for each result, latencies in milliseconds for each call."""

    rate: float
    cpu: float = 0.0
    database_cpu: float = 0.0
    client_cpu: float = 0.0
    p50: float = 0.0
    p99: float = 0.0


def _operations() -> Iterable[Operation]:
    for key in SIGNING:
        yield Operation(f"sign-{key}", share_min=0.7 if key == "secp256k1" else None)
        share = None if key == "secp256r1" else 0.8
        yield Operation(f"batch-sign-{key}", _BATCH_CROWD, share_min=share, cpu_max=None)
    for name in ("encrypt", "decrypt"):
        yield Operation(name)
        yield Operation(f"batch-{name}", _BATCH_CROWD, share_min=0.5, cpu_max=None)
    yield Operation("generate-data-key")
    yield Operation(CREATE, rate_min=300, cpu_max=None)


ALL: Final = tuple(_operations())
Samples = Mapping[str, Mapping[int, Sequence[Sample]]]


def token_of(operation: str) -> str:
    """Return the name of the token's work in an operation."""
    return operation.removeprefix("batch-")


def token_threads(operation: str, clients: int) -> int:
    """Return in how many threads of a process the service lets the token work for *clients*: a batch is as good as many."""
    # Short operations gain nothing by threads (SoftHSM's locks), and the service runs them on its event loop.
    is_short = token_of(operation) in ("encrypt", "decrypt", "generate-data-key")
    return 1 if is_short or (clients == 1 and token_of(operation) == operation) else LANES


def limits_table(samples: Samples) -> Table:
    """Return the table of the limits."""
    table = _table("limit", "clients or threads", "per second", "p50 ms", "processor µs", "client's µs")
    for what, by_clients in samples.items():
        if what in (ECHO, COMMIT) or what.startswith("token "):
            for clients, rounds in by_clients.items():
                latency = _spread([each.p50 for each in rounds], "{:.2f}") if what == ECHO else ""
                cpu = "" if what == COMMIT else _spread([each.cpu for each in rounds])
                of_client = _spread([each.client_cpu for each in rounds]) if what == ECHO else ""
                table.add_row(what, str(clients), _spread([each.rate for each in rounds]), latency, cpu, of_client)
    return table


def operations_table(operations: Sequence[Operation], samples: Samples) -> Table:
    """Return the table of the operations, with the ratios to their limits and what is aimed at."""
    table = _table(
        "operation", "clients", "per second", "p50 ms", "p99 ms", "service µs", "database µs", "service ÷ (echo + token)",
        "rate ÷ limit", "aim",
    )  # fmt: skip
    for operation in operations:
        for clients in (1, operation.crowd):
            table.add_row(*_row(operation, clients, samples))
    return table


def _row(operation: Operation, clients: int, samples: Samples) -> list[str]:
    rounds = samples[operation.name][clients]
    cpu, share = _ratios(operation, clients, samples)
    return [
        operation.name,
        str(clients),
        _spread([each.rate for each in rounds]),
        _spread([each.p50 for each in rounds], "{:.1f}"),
        _spread([each.p99 for each in rounds], "{:.1f}"),
        _spread([each.cpu for each in rounds]),
        _spread([each.database_cpu for each in rounds]),
        _spread(cpu, "{:.2f}"),
        _spread(share, "{:.0%}"),
        _aim(operation, cpu, share, [each.rate for each in rounds]) if clients == operation.crowd else "",
    ]


def _ratios(operation: Operation, clients: int, samples: Samples) -> tuple[list[float], list[float]]:
    """Return, for each round, processor time and rate against the limits. A batch shares one call among its results."""
    echoes, tokens = samples[ECHO][clients], samples[f"token {token_of(operation.name)}"][token_threads(operation.name, clients)]
    items = BATCH_ITEMS if operation.name.startswith("batch-") else 1
    rounds = list(zip(samples[operation.name][clients], echoes, tokens, strict=True))
    cpu = [each.cpu / (echo.cpu / items + token.cpu) for each, echo, token in rounds]
    return cpu, [each.rate / min(echo.rate * items, token.rate) for each, echo, token in rounds]


def _aim(operation: Operation, cpu: Sequence[float], share: Sequence[float], rate: Sequence[float]) -> str:
    aims = [
        (operation.cpu_max, cpu, "time ≤ {:g} ×", lambda found, aim: found <= aim),
        (operation.share_min, share, "rate ≥ {:.0%}", lambda found, aim: found >= aim),
        (operation.rate_min, rate, "≥ {:g} per s", lambda found, aim: found >= aim),
    ]
    return ", ".join(_judged(aim, found, text, reached) for aim, found, text, reached in aims if aim is not None)


def _judged(aim: float, found: Sequence[float], text: str, reached: Callable[[float, float], bool]) -> str:
    return f"{text.format(aim)} {'reached' if reached(statistics.median(found), aim) else '**missed**'}"


def _spread(values: Sequence[float], form: str = "{:,.0f}") -> str:
    median, low, high = (form.format(value) for value in (statistics.median(values), min(values), max(values)))
    return f"{median} ({low} to {high})"


def _table(*columns: str) -> Table:
    table = Table(box=box.MARKDOWN)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 or column == "aim" else "right", no_wrap=True)
    return table
