"""What does a call cost, with everything on, beside what it cannot cost less than?

A real stack (PostgreSQL, SoftHSM, `kms serve`) is driven over mutual TLS by one client and by many, and in turn with it, in the
same run: a bare gRPC echo with the same TLS, the token alone, and durable commits. What counts is the ratios. Ends with 1
where any answer was wrong, and where the usage counters of the keys are not exactly the number of results received.

    .venv/bin/python -m benchmarks.operations [--quick] [--only sign-secp256k1,batch-encrypt]
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from benchmarks.operations_calls import AES, BATCH_ITEMS, PLAINTEXT, SIGNING, Known
from benchmarks.operations_limits import COMMITTERS, Commits, TokenProcesses, echo_server, token_processes
from benchmarks.operations_load import ECHO, Load, load_processes
from benchmarks.operations_report import (
    ALL,
    COMMIT,
    CROWD,
    LANES,
    Operation,
    Sample,
    limits_table,
    operations_table,
    token_of,
    token_threads,
)
from benchmarks.processor_time import commit, machine, machine_seconds, tree_seconds
from kms.cli.client import Client, connect
from kms.dev.embedded_stack import dev_stack
from kms.dev.softhsm import SoftToken, soft_token
from kms.dev.stack import Stack
from kms.dev.stack_files import free_port
from kms.pki.trust import TrustFiles
from kms.v1 import crypto_pb2, keys_pb2

_LOAD_PROCESSES: Final = 2
_SESSIONS: Final = 16  # of the token, for each worker: what the configuration gives one by default
_RECORD: Final = Path(__file__).with_suffix(".json")


@dataclass(frozen=True, slots=True)
class Pace:
    """How many rounds, and the seconds of each part of one."""

    rounds: int
    warm_seconds: float
    seconds: float
    limit_seconds: float


FULL: Final = Pace(rounds=5, warm_seconds=0.4, seconds=1.6, limit_seconds=0.5)
QUICK: Final = Pace(rounds=3, warm_seconds=0.2, seconds=0.6, limit_seconds=0.2)


@dataclass(frozen=True, slots=True)
class Bench:
    """All that runs, and the processes whose time is counted."""

    load: Load
    token: TokenProcesses
    commits: Commits
    groups: Mapping[str, Sequence[int]]
    pace: Pace
    workers: int
    received: Counter[str]

    def drive(self, operation: str, clients: int) -> Sample:
        """Let *clients* repeat *operation*, and return what was seen in the counted time."""
        order = self.load.begin(operation, clients, warm_seconds=self.pace.warm_seconds, seconds=self.pace.seconds)
        time.sleep(max(0.0, order.counted_from - time.monotonic()))
        before = tree_seconds(self.groups)
        time.sleep(max(0.0, order.ends_at - time.monotonic()))
        after = tree_seconds(self.groups)
        tally = self.load.result()
        self.received[operation] += tally.results
        items, times = tally.calls * tally.items, sorted(tally.seconds)
        used = {name: (after[name] - before[name]) * 1e6 / items for name in self.groups}
        service = used["echo" if operation == ECHO else "service"]
        p50, p99 = (times[len(times) * percent // 100] * 1000 for percent in (50, 99))
        return Sample(items / self.pace.seconds, service, used["database"], used["clients"], p50, p99)

    def drive_token(self, work: str, threads: int) -> Sample:
        """Drive the token in *threads* of each process, of which there are as many as the service has."""
        driven = self.token.drive(work, threads=threads, seconds=self.pace.limit_seconds)
        return Sample(driven.times / driven.seconds, driven.cpu_seconds * 1e6 / driven.times)

    def round(self, operations: Sequence[Operation]) -> Iterator[tuple[str, int, Sample]]:
        """Measure everything once: (what, at how many clients, what was seen)."""
        for clients in (1, COMMITTERS):
            yield COMMIT, clients, Sample(self.commits.rate(clients, self.pace.limit_seconds))
        for clients in sorted({clients for operation in operations for clients in (1, operation.crowd)}):
            yield ECHO, clients, self.drive(ECHO, clients)
        seen: set[tuple[str, int]] = set()
        for operation in operations:
            for clients in (1, operation.crowd):
                work = token_of(operation.name)
                threads = token_threads(operation.name, clients)
                if (work, threads) not in seen:
                    seen.add((work, threads))
                    yield f"token {work}", threads, self.drive_token(work, threads)
                yield operation.name, clients, self.drive(operation.name, clients)


def prepared(client: Client) -> Known:
    """Make the keys, and return what the load generator needs to know of them."""
    public_keys = {}
    for name, key_type in SIGNING.items():
        request = keys_pb2.CreateKeyRequest(name=name, type=key_type, purpose=keys_pb2.KEY_PURPOSE_SIGNING)
        public_keys[name] = client.keys.CreateKey(request).key.public_key_pem
    client.keys.CreateKey(
        keys_pb2.CreateKeyRequest(name=AES, type=keys_pb2.KEY_TYPE_AES, purpose=keys_pb2.KEY_PURPOSE_ENCRYPTION)
    )
    encrypted = client.crypto.Encrypt(crypto_pb2.EncryptRequest(key=AES, plaintext=PLAINTEXT))
    return Known(public_keys, encrypted.ciphertext)


def check_counters(client: Client, received: Mapping[str, int]) -> None:
    """Raise unless each key was charged exactly as often as results of it have arrived."""
    charged = Counter({AES: 1})  # the ciphertext of `prepared`
    for operation, results in received.items():
        work = token_of(operation)
        if work.startswith("sign-"):
            charged[work.removeprefix("sign-")] += results
        elif work in ("encrypt", "generate-data-key"):
            charged[AES] += results
    for key, results in charged.items():
        counted = client.keys.GetKey(keys_pb2.GetKeyRequest(key=key)).key.usage_count
        if counted != results:
            raise RuntimeError(f"{key}: {results} results were received and {counted} charged")


@contextmanager
def bench(directory: Path, pace: Pace, workers: int) -> Iterator[tuple[Bench, Client]]:
    """Start everything in *directory*, an empty one."""
    with ExitStack() as stack:
        embedded = stack.enter_context(dev_stack(directory / "stack", port=0))
        settings = embedded.files.configuration
        settings.write_text(settings.read_text().replace("[hsm]\n", f"[hsm]\nsessions_max = {_SESSIONS * workers}\n"))
        service = stack.enter_context(embedded.serving(workers=workers))
        client = stack.enter_context(connect(embedded.client))
        known = prepared(client)
        files = embedded.files
        tls = TrustFiles(files.secret("server.crt"), files.secret("server.key"), files.authority_cert)
        echo = f"127.0.0.1:{free_port()}"
        echoes = stack.enter_context(echo_server(workers, tls, echo))
        token = stack.enter_context(token_processes(workers, LANES, _copy(embedded, directory / "token")))
        load = stack.enter_context(load_processes(_LOAD_PROCESSES, CROWD, embedded.client, echo, known))
        postmaster = int((files.postgres / "data" / "postmaster.pid").read_text().splitlines()[0])
        groups = {"service": [service.process.pid], "database": [postmaster], "echo": echoes, "clients": load.pids}
        yield Bench(load, token, Commits(embedded.superuser_dsn), groups, pace, workers, Counter()), client


def _copy(stack: Stack, directory: Path) -> SoftToken:
    shutil.copytree(stack.token.directory, directory)
    return soft_token(directory, stack.token.label)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and keep the record of a full run."""
    options = _options(arguments)
    pace = QUICK if options.quick else FULL
    operations = [operation for operation in ALL if not options.only or operation.name in options.only]
    samples: dict[str, dict[int, list[Sample]]] = {}
    with tempfile.TemporaryDirectory(prefix="kms-bench-", dir="/tmp") as name:
        Path(name).chmod(0o711)  # PostgreSQL's user passes through it to its data
        with bench(Path(name), pace, options.workers) as (running, client):
            machine_before, ours_before = machine_seconds(), _ours()
            for number in range(1, pace.rounds + 1):
                print(f"round {number} of {pace.rounds}", file=sys.stderr)
                for what, clients, sample in running.round(operations):
                    samples.setdefault(what, {}).setdefault(clients, []).append(sample)
            check_counters(client, running.received)
            beside = _beside(machine_before, ours_before)
            about = _about(running, pace, beside)
    console = Console(width=400)
    console.print(_headline(about))
    console.print(limits_table(samples), operations_table(operations, samples))
    record = options.json or (None if options.quick or options.only else _RECORD)
    if record is not None:
        record.write_text(json.dumps({**about, "samples": _plain(samples)}, indent=1) + "\n")
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    names = [operation.name for operation in ALL]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.operations", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three short rounds: to see a large change, not to be quoted")
    parser.add_argument("--only", type=lambda text: text.split(","), help=f"some of {', '.join(names)}")
    parser.add_argument("--workers", type=int, default=1, help="processes of the service, the echo and the token")
    parser.add_argument("--json", type=Path, help=f"where to write the record (a whole full run: {_RECORD.name})")
    options = parser.parse_args(arguments)
    if unknown := set(options.only or ()) - set(names):
        parser.error(f"no such operation: {', '.join(sorted(unknown))}")
    return options


def _ours() -> float:
    return tree_seconds({"ours": [os.getpid()]})["ours"]


def _beside(machine_before: tuple[float, float], ours_before: float) -> float:
    """Return which share of all cores' time other work took."""
    (busy, there), (busy_before, there_before) = machine_seconds(), machine_before
    return max(0.0, busy - busy_before - (_ours() - ours_before)) / (there - there_before)


def _about(running: Bench, pace: Pace, beside: float) -> dict[str, Any]:
    versions = {"Python": sys.version.split()[0], "PostgreSQL": running.commits.server_version, "token": running.token.version}
    versions |= {name: version(name) for name in ("grpcio", "psycopg", "python-pkcs11", "uvloop")}
    settings = {**asdict(pace), "workers": running.workers, "batch_items": BATCH_ITEMS}
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "versions": versions,
        "settings": settings,
        "share_of_other_work": round(beside, 3),
        "results_received": dict(running.received),
    }


def _headline(about: Mapping[str, Any]) -> str:
    machine_ = about["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    settings = about["settings"]
    return (
        f"{about['at']}, commit {about['commit']}; {machine_['cores']} cores ({machine_['processor']}), "
        f"{machine_['memory_gib']} GiB, Linux {machine_['kernel']}; {versions}.\n"
        f"{settings['workers']} worker(s), {settings['rounds']} rounds of {settings['seconds']} s each; "
        f"other work took {about['share_of_other_work']:.0%} of the cores' time. Medians (minimum to maximum).\n"
    )


def _plain(samples: Mapping[str, Mapping[int, Sequence[Sample]]]) -> dict[str, Any]:
    return {
        what: {
            str(clients): {name: [round(getattr(each, name), 3) for each in rounds] for name in asdict(rounds[0])}
            for clients, rounds in by_clients.items()
        }
        for what, by_clients in samples.items()
    }


if __name__ == "__main__":
    sys.exit(main())
