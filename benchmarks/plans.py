"""Does any statement of the service read a large table whole, or take longer because the tables are large?

Two databases by the same generator, one with a hundredth of the rows. Every SQL constant of the store, found as the tests find
them, is run in both in turn, in the role that has the rights for it and with row security, each execution undone at its end.
Its plans, and those of the statements in the functions that it calls, are PostgreSQL's own account (auto_explain) of the
execution, with generic and with custom plans. Ends with 1 if one of them has a sequential scan of a large table.

    .venv/bin/python -m benchmarks.plans --keys 1000000 --events 10000000 --sessions 1000000
"""

import argparse
import json
import platform
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psycopg

from benchmarks.plans_rows import Size, generate
from benchmarks.plans_values import CASES, Make, Sending
from kms.dev.postgres import FAST_UNSAFE, embedded_postgres
from tests.store.test_plans import WATCH, large, plan_of, scanned_whole
from tests.store.test_statements import numbered, statements

# They concern every key, which is their purpose; the operator runs them when nothing is served. Planned, and not run.
WHOLE_ON_PURPOSE: Final = ("epoch.DEACTIVATE", "restore_drill.ENVELOPES")
EXECUTIONS: Final = (20, 200)  # at least, at most
WARM_UP: Final = 6  # the sixth execution is the first that may have a generic plan
SECONDS: Final = 1.0
GENERATING: Final = {
    **FAST_UNSAFE,
    "autovacuum": "off",
    "shared_buffers": "1GB",
    "maintenance_work_mem": "256MB",
    "max_wal_size": "8GB",
    "wal_level": "minimal",
    "max_wal_senders": "0",
}
_DUMMIES: Final = {"uuid": "00000000-0000-0000-0000-000000000001", "timestamptz": "2030-01-01", "jsonb": "{}", "bool": "true"}
_PARTITION: Final = re.compile(r"_(\d{4}(_\d\d)?|default|\d)(?=_|$)")


@dataclass(frozen=True, slots=True)
class Case:
    """A statement, whoever runs it (None: the owner), its own plan, and what is sent with it (None: made-up values)."""

    name: str
    statement: str
    role: str | None
    plan: dict[str, Any]
    make: Make | None


@dataclass(frozen=True, slots=True)
class Filled:
    """A database with its rows: a connection that measures and one that watches plans."""

    size: Size
    measuring: psycopg.Connection[Any]
    watching: psycopg.Connection[Any]


@contextmanager
def sent(connection: psycopg.Connection[Any], case: Case, size: Size) -> Iterator[tuple[Any, Any, Any]]:
    """A transaction of the role, undone at its end: the cursor, and the statement with its parameters, ready to be run."""
    sending = case.make(size) if case.make else made_up(connection, case.statement)
    with connection.transaction(force_rollback=True):
        if case.role is not None:
            user = "" if sending.user is None else str(sending.user)
            connection.execute(
                "SELECT set_config('role', %s, true), set_config('app.user_id', %s, true)", (sending.role or case.role, user)
            )
        if case.make:
            yield connection.cursor(), case.statement.encode(), sending.parameters
        else:
            yield psycopg.RawCursor(connection), numbered(case.statement).encode(), sending.parameters


def made_up(connection: psycopg.Connection[Any], statement: str) -> Sending:
    """Return values of the right types that find nothing."""
    connection.pgconn.prepare(b"", numbered(statement).encode())
    described = connection.pgconn.describe_prepared(b"")
    types = [connection.adapters.types.get(described.param_type(number)) for number in range(described.nparams)]
    return Sending(None, [_DUMMIES.get(found.name if found else "", "1") for found in types])


def cases(connection: psycopg.Connection[Any]) -> Iterator[Case]:
    """Yield every statement with everything that is sent with it; a statement of several modules once."""
    seen: set[str] = set()
    for full_name, statement in sorted(statements(), key=lambda each: (CASES.get(_short(each[0])) is None, each)):
        # Those of a restore read a temporary table of its own transaction, which holds every key on purpose.
        if statement in seen or "pg_temp." in statement:
            continue
        seen.add(statement)
        role, plan = plan_of(connection, statement) or (None, owners_plan(connection, statement))
        for label, make in CASES.get(_short(full_name), {"": None}).items():
            yield Case(f"{_short(full_name)}{': ' if label else ''}{label}", statement, role, plan, make)


def owners_plan(connection: psycopg.Connection[Any], statement: str) -> dict[str, Any]:
    """Return the generic plan of a statement that only the owner of the tables may send."""
    row = connection.execute(f"EXPLAIN (GENERIC_PLAN, VERBOSE, FORMAT JSON) {numbered(statement)}".encode()).fetchone()
    assert row is not None
    return dict(row[0][0]["Plan"])


def plans(filled: Filled, case: Case) -> list[dict[str, Any]]:
    """Return the plans of all that runs for the case, generic ones and custom ones."""
    connection, said = filled.watching, list[str]()
    if case.name in WHOLE_ON_PURPOSE:
        return [case.plan]
    handler = lambda notice: said.append(notice.message_primary or "")  # noqa: E731
    connection.add_notice_handler(handler)
    try:
        for mode in ("force_generic_plan", "force_custom_plan"):
            connection.execute("SELECT set_config('plan_cache_mode', %s, false)", (mode,))
            with sent(connection, case, filled.size) as (cursor, statement, parameters):
                cursor.execute(statement, parameters, prepare=True)
    except psycopg.Error as error:
        print(f"{case.name}: {error}", file=sys.stderr)  # a made-up value may be refused; its plan is there
    finally:
        connection.remove_notice_handler(handler)
        connection.execute(b"SELECT pg_advisory_unlock_all()")
    told = [json.loads(text.partition("plan:\n")[2]) for text in said if "plan:\n" in text]
    return [case.plan, *(each["Plan"] for each in told if "set_config(" not in each["Query Text"])]


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the nodes of a plan."""
    yield plan
    for child in plan.get("Plans", ()):
        yield from nodes(child)


def summary(connection: psycopg.Connection[Any], found: list[dict[str, Any]]) -> tuple[str, list[str]]:
    """Return in words how the large tables are read, and which of them are read whole."""
    whole = sorted({table for plan in found for table in large(connection, scanned_whole(plan))})
    every = [node for plan in found for node in nodes(plan)]
    indexes = {_PARTITION.sub("", node["Index Name"]) for node in every if "Index Name" in node}
    said = [f"**Seq Scan on {table}**" for table in whole] + sorted(name for name in indexes if not name.startswith("pg_"))
    return ", ".join(said) or found[0]["Node Type"], whole


def times(pair: tuple[Filled, Filled], case: Case) -> tuple[float, float]:
    """Return the medians in milliseconds, of executions in both in turn; the transaction around them does not count.

    Raises `psycopg.Error` where the values are refused.
    """
    taken: tuple[list[float], list[float]] = ([], [])
    until, number = time.monotonic() + SECONDS, 0
    while number < WARM_UP + EXECUTIONS[0] or (time.monotonic() < until and number < EXECUTIONS[1]):
        for filled, seconds in zip(pair, taken, strict=True):
            with sent(filled.measuring, case, filled.size) as (cursor, statement, parameters):
                began = time.perf_counter()
                cursor.execute(statement, parameters, prepare=True)
                ended = time.perf_counter()
            if number >= WARM_UP:
                seconds.append(1000 * (ended - began))
        number += 1
    return statistics.median(taken[0]), statistics.median(taken[1])


@contextmanager
def filled_pair(directory: Path, size: Size) -> Iterator[tuple[Filled, Filled]]:
    """Generate a hundredth of *size* and *size* on a fast and unsafe server, and open both on one with PostgreSQL's defaults."""
    sizes = {"small": size.hundredth(), "large": size}
    with embedded_postgres(directory, GENERATING) as server:
        with psycopg.connect(server.superuser_dsn(), autocommit=True) as connection:
            for name in sizes:
                connection.execute(f"CREATE DATABASE {name}".encode())
        for name, each in sizes.items():
            began = time.monotonic()
            generate(server.superuser_dsn(name), each)
            print(f"{name}: {each}, made in {time.monotonic() - began:.0f} s", file=sys.stderr)
    with embedded_postgres(directory) as server, ExitStack() as stack:

        def opened(name: str) -> psycopg.Connection[Any]:
            return stack.enter_context(psycopg.connect(server.superuser_dsn(name), autocommit=True))

        small, big = (Filled(each, opened(name), opened(name)) for name, each in sizes.items())
        for filled in (small, big):
            filled.watching.execute(WATCH)
            for connection in (filled.watching, filled.measuring):
                connection.execute(b"SET lock_timeout = '2s'")  # what one connection of ours still holds is a mistake
        yield small, big


def report(pair: tuple[Filled, Filled], only: str) -> bool:
    """Print the table of the statements whose names begin with *only*.

    Return whether a large table was read whole without that being the purpose.
    """
    wrong = False
    print("| statement | role | how it reads what is large | small, ms | large, ms | ratio |\n|---|---|---|---|---|---|")
    for case in [each for each in cases(pair[1].measuring) if each.name.startswith(only)]:
        planned, whole = summary(pair[1].watching, plans(pair[1], case))
        figures = "not run | not run | –"
        if case.name in WHOLE_ON_PURPOSE:
            planned += " (every key is its purpose)"
        else:
            wrong |= bool(whole)
            figures = _figures(pair, case)
        print(f"| `{case.name}` | {case.role or 'owner'} | {planned} | {figures} |", flush=True)
    return wrong


def _figures(pair: tuple[Filled, Filled], case: Case) -> str:
    try:
        small, big = times(pair, case)
    except psycopg.Error:
        return "refused | refused | –"
    finally:
        for filled in pair:
            filled.measuring.execute(b"SELECT pg_advisory_unlock_all()")
    ratio = f"**{big / small:.1f}**" if big > 2 * small and big > small + 0.2 else f"{big / small:.1f}"
    return f"{small:.2f} | {big:.2f} | {ratio}"


def _short(name: str) -> str:
    return name.removeprefix("kms.").removeprefix("store.")


def main() -> int:
    """Generate, measure and print."""
    parser = argparse.ArgumentParser(description="Plans and times of every statement on a large and on a small database.")
    for name, default in (("users", 20_000), ("keys", 1_000_000), ("events", 10_000_000), ("sessions", 1_000_000)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"rows of the large database (default: {default:,})")
    parser.add_argument("--only", default="", metavar="PREFIX", help="only statements whose names begin so, such as rotation.")
    chosen = vars(parser.parse_args())
    only = chosen.pop("only")
    size = Size(**chosen)
    if size.keys < 100_000 or size.users < 1_000:
        parser.error("expected at least 100000 keys and 1000 users: the small database has a hundredth of them")
    with tempfile.TemporaryDirectory(prefix="kms-plans-", ignore_cleanup_errors=True) as name:
        Path(name).chmod(0o711)  # the server's user passes through it to its data
        with filled_pair(Path(name), size) as pair:
            row = pair[1].measuring.execute(b"SHOW server_version").fetchone()
            assert row is not None
            print(f"{platform.platform()}, Python {platform.python_version()}, PostgreSQL {row[0]}, {size}\n")
            return int(report(pair, only))


if __name__ == "__main__":
    sys.exit(main())
