"""What the proofs against a hostile database owner cost: one service, whose proofs are switched off and on in turn.

The proofs are the MACs of keys' rows and of stored answers, and what the journal knows, asked at each use. Two services differ by
more than the proofs cost, even two of the same source: their batches fall out differently. So one service is driven, in slices of
a second, and a slice without the proofs is beside each with them. The service has no such switch: it is built in from here.

The token call that recognizes a request stays, since it is older than the proofs; of an answer only the making of its MAC is
switched. Not measured: checking a stored answer, and the first proof of a key's row, which every worker makes once a version.

    .venv/bin/python -m benchmarks.cost_of_proofs
"""

import argparse
import os
import platform
import statistics
import tempfile
from io import FileIO
from pathlib import Path
from typing import Final

from benchmarks.before_and_after import CALLS, median_between, served
from benchmarks.processor_time import commit

_HERE: Final = Path(__file__).parents[1]
# Python imports a `sitecustomize` at its start. A thread of the service sleeps until a letter comes through the pipe.
_SWITCH: Final = """
import pathlib, sys, threading

if "serve" in sys.orig_argv:
    from kms.app import records
    from kms.domain import answers
    from kms.keys.ledger import counts
    from kms.store import journal_knowledge

    proven, checked = records.Records.prove_key, journal_knowledge.JournalKnowledge.check
    used, taken = journal_knowledge.JournalKnowledge.uses, counts.Counts.take_due
    sealed = answers.RequestSecret.stored
    off = [False]

    async def prove(self, row):
        if not off[0]:
            await proven(self, row)

    def check(self, key, *, uses=0):
        if not off[0]:
            checked(self, key, uses=uses)

    def uses(self, key_id):
        return 0 if off[0] else used(self, key_id)

    def take_due(self):
        return [] if off[0] else taken(self)

    def stored(self, answer_id, content):
        return bytes(33) + answer_id + content if off[0] else sealed(self, answer_id, content)

    def follow():
        with (pathlib.Path(__file__).parent / "switch").open("rb", buffering=0) as pipe:
            while letter := pipe.read(1):
                off[0] = letter == b"0"

    records.Records.prove_key = prove
    journal_knowledge.JournalKnowledge.check, journal_knowledge.JournalKnowledge.uses = check, uses
    counts.Counts.take_due, answers.RequestSecret.stored = take_due, stored
    threading.Thread(target=follow, daemon=True).start()
"""


def _switch(pipe: Path) -> FileIO:
    """Open the pipe to the service, or raise OSError (ENXIO) where the switch was not built in and nobody reads it."""
    return os.fdopen(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK), "wb", buffering=0)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Measure what the proofs against a hostile database owner cost.")
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each slice")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kms-bench-", dir="/tmp") as name:
        directory = Path(name)
        directory.chmod(0o711)
        (directory / "sitecustomize.py").write_text(_SWITCH)
        os.mkfifo(directory / "switch")
        with served(_HERE, directory / "stack", before=name) as tree, _switch(directory / "switch") as switch:
            for call in CALLS.values():
                tree.drive(call, 1.0)
            spent: dict[str, list[dict[bytes, float]]] = {label: [] for label in CALLS}
            for number in range(options.rounds):
                for label, call in CALLS.items():
                    slices = {}
                    for letter in (b"0", b"1") if number % 2 else (b"1", b"0"):
                        switch.write(letter)
                        slices[letter] = tree.drive(call, options.seconds)[0]
                    spent[label].append(slices)
    print(f"{platform.platform()}, Python {platform.python_version()}, {options.rounds} rounds, {commit()}")
    for label, rounds in spent.items():
        without, proven = (statistics.median(slices[letter] for slices in rounds) for letter in (b"0", b"1"))
        middle, low, high = median_between([slices[b"1"] / slices[b"0"] for slices in rounds])
        print(
            f"{label}: {without:.0f} µs of server processor time a call without the proofs, {proven:.0f} with them; "
            f"with : without = {middle:.3f} (95 %: {low:.3f} to {high:.3f})"
        )


if __name__ == "__main__":
    main()
