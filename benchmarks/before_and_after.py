"""What a change costs: the same calls to two source trees, in one run, in turn.

What counts is the server's processor time for a call, from /proc, with all its threads. It survives what else runs on the
machine. Each round drives both trees; the ratios are taken round by round.

    git worktree add /tmp/before COMMIT
    .venv/bin/python -m benchmarks.before_and_after --before /tmp/before
"""

import argparse
import json
import math
import os
import platform
import secrets
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.processor_time import commit, tree_seconds
from kms.cli.client import Client, connect
from kms.config import ClientConfig, load
from kms.v1 import crypto_pb2, keys_pb2

_HERE: Final = Path(__file__).parents[1]
_CLIENTS: Final = 8
_ROUNDS_MIN: Final = 10
# Run by the interpreter in each tree: it serves until its standard input ends.
_SERVE: Final = """
import json, os, sys
from pathlib import Path
from kms.dev.embedded_stack import dev_stack

with dev_stack(Path(sys.argv[1]), port=0) as stack:
    files = stack.files
    journal = "[server]\\njournal = " + json.dumps(str(files.configuration.parent / "journal")) + "\\n"
    files.configuration.write_text(files.configuration.read_text().replace("[server]\\n", journal, 1))
    with stack.serving() as service:
        print(json.dumps({"client": str(files.client_configuration), "pid": service.process.pid}), flush=True)
        sys.stdin.read()
"""
Call = Callable[[Client], object]
CALLS: Final[dict[str, Call]] = {
    "Sign secp256r1": lambda client: client.crypto.Sign(crypto_pb2.SignRequest(key="sign", message=b"m"), timeout=30),
    "Sign ed25519": lambda client: client.crypto.Sign(crypto_pb2.SignRequest(key="ed", message=b"m"), timeout=30),
    "Encrypt aes": lambda client: client.crypto.Encrypt(crypto_pb2.EncryptRequest(key="seal", plaintext=bytes(64)), timeout=30),
    "Encrypt aes, with a request_id": lambda client: client.crypto.Encrypt(
        crypto_pb2.EncryptRequest(key="seal", plaintext=bytes(64), request_id=secrets.token_hex(16)), timeout=30
    ),
}
KEYS: Final = (
    ("sign", keys_pb2.KEY_TYPE_SECP256R1, keys_pb2.KEY_PURPOSE_SIGNING),
    ("ed", keys_pb2.KEY_TYPE_ED25519, keys_pb2.KEY_PURPOSE_SIGNING),
    ("seal", keys_pb2.KEY_TYPE_AES, keys_pb2.KEY_PURPOSE_ENCRYPTION),
)


@dataclass(frozen=True, slots=True)
class Tree:
    """A service of one source tree, its clients and its process."""

    clients: list[Client]
    pid: int

    def drive(self, call: Call, seconds: float) -> tuple[float, float]:
        """Return the microseconds of the server's processor time for a call, and calls a second."""
        until = time.monotonic() + seconds
        counts = [0] * len(self.clients)

        def repeat(number: int, client: Client) -> None:
            while time.monotonic() < until:
                call(client)
                counts[number] += 1

        before = tree_seconds({"server": [self.pid]})["server"]
        threads = [threading.Thread(target=repeat, args=pair) for pair in enumerate(self.clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        spent = tree_seconds({"server": [self.pid]})["server"] - before
        return spent / sum(counts) * 1e6, sum(counts) / seconds


@contextmanager
def served(tree: Path, directory: Path, *, before: str = "") -> Iterator[Tree]:
    """Serve from the source *tree* within the block. *before* is put before it in PYTHONPATH."""
    environment = {**os.environ, "PYTHONPATH": f"{before}:{tree}" if before else str(tree)}
    command = [sys.executable, "-c", _SERVE, str(directory)]
    with ExitStack() as stack:
        process = stack.enter_context(
            subprocess.Popen(command, cwd=tree, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        )
        assert process.stdout is not None
        assert process.stdin is not None
        stack.callback(process.stdin.close)
        told: dict[str, Any] = json.loads(process.stdout.readline())
        config: ClientConfig | None = load(Path(told["client"]), needs=("client",)).client
        assert config is not None
        clients = [stack.enter_context(connect(config)) for _ in range(_CLIENTS)]
        for name, key_type, purpose in KEYS:
            clients[0].keys.CreateKey(keys_pb2.CreateKeyRequest(name=name, type=key_type, purpose=purpose))
        yield Tree(clients, told["pid"])


def median_between(values: list[float]) -> tuple[float, float, float]:
    """Return the median of *values*, and the ends of a confidence interval of 95 % for the true median.

    The ends are order statistics, by the normal approximation of the binomial distribution. Raises ValueError for fewer than ten
    values, which are too few for it.
    """
    if len(values) < _ROUNDS_MIN:
        raise ValueError(f"expected at least {_ROUNDS_MIN} rounds")
    values = sorted(values)
    outside = math.floor(len(values) / 2 - 0.98 * math.sqrt(len(values)) - 0.5)
    return statistics.median(values), values[outside], values[-1 - outside]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Compare what calls cost in two source trees.")
    parser.add_argument("--before", type=Path, required=True, help="the source tree to compare with")
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each call, tree and round")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kms-bench-", dir="/tmp") as name, ExitStack() as stack:
        Path(name).chmod(0o711)
        before = stack.enter_context(served(options.before.absolute(), Path(name) / "before"))
        after = stack.enter_context(served(_HERE, Path(name) / "after"))
        for tree in (before, after):
            for call in CALLS.values():
                tree.drive(call, 1.0)
        # In turn which is first: what comes second may find the machine warmer.
        measured: dict[str, list[tuple[tuple[float, float], tuple[float, float]]]] = {label: [] for label in CALLS}
        for number in range(options.rounds):
            for label, call in CALLS.items():
                first, second = (before, after) if number % 2 else (after, before)
                one, other = first.drive(call, options.seconds), second.drive(call, options.seconds)
                measured[label].append((one, other) if number % 2 else (other, one))
    print(f"{platform.platform()}, Python {platform.python_version()}, {_CLIENTS} clients, {options.rounds} rounds, {commit()}")
    for label, pairs in measured.items():
        middle, low, high = median_between([late[0] / early[0] for early, late in pairs])
        early, late = (statistics.median(pair[index][0] for pair in pairs) for index in (0, 1))
        print(
            f"{label}: {early:.0f} -> {late:.0f} µs of server processor time a call, after : before = "
            f"{middle:.3f} (95 %: {low:.3f} to {high:.3f}); "
            f"{statistics.median(p[0][1] for p in pairs):.0f} -> {statistics.median(p[1][1] for p in pairs):.0f} calls a second"
        )


if __name__ == "__main__":
    main()
