"""Several workers seen on one address: the supervisor asks each over a socket of its own and tells all, each by its number.

Nothing is added up: the label `worker` tells them apart, and a worker that was replaced begins its counts anew, as Prometheus
expects of a process.
"""

import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Final

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from kms.config import MetricsConfig
from kms.wiring.endpoint import endpoint_app, served

_PATIENCE_SECONDS: Final = 2.0
_OK: Final = 200


def worker_socket(directory: Path, number: int) -> Path:
    """Return where worker *number* is seen."""
    return directory / f"{number}.sock"


@contextmanager
def gathered(config: MetricsConfig | None) -> Iterator[tuple[Path, int] | None]:
    """Answer for the workers within the block; yield the directory for their sockets and the port. None: nobody is seen."""
    if config is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="kms-metrics-") as name:  # of mode 0700
        directory = Path(name)
        app = endpoint_app(_Workers(directory), alive=lambda: (True, "alive"), ready=lambda: _ready(directory))
        with served(config.listen, app) as port:
            yield directory, port


class _Workers(Collector):
    """The metrics of all workers that answer."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def collect(self) -> Iterator[Metric]:
        """Return each family once, with the samples of every worker."""
        families: dict[str, Metric] = {}
        answers = dict(_asked(self._directory, "/metrics"))
        for number, (_, text) in answers.items():
            for family in text_string_to_metric_families(text):
                known = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    known.add_sample(sample.name, {**sample.labels, "worker": number}, sample.value)
        yield from families.values()
        yield GaugeMetricFamily("kms_workers", "Workers that answer.", value=len(answers))

    def describe(self) -> list[Metric]:
        """Return nothing: what there is depends on the workers."""
        return []


def _ready(directory: Path) -> tuple[bool, str]:
    """One that is ready is enough: calls go to those that listen."""
    answers = dict(_asked(directory, "/readyz"))
    lines = [f"worker {number}: {line}" for number, (_, text) in answers.items() for line in text.splitlines()]
    return any(status == _OK for status, _ in answers.values()), "\n".join(lines or ["no worker answers"])


def _asked(directory: Path, path: str) -> Iterator[tuple[str, tuple[int, str]]]:
    for place in sorted(directory.glob("*.sock"), key=lambda place: int(place.stem)):
        connection = _UnixConnection(place)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            yield place.stem, (answer.status, answer.read().decode())
        except (OSError, HTTPException):
            continue  # it has ended, or is stuck: the supervisor sees to it
        finally:
            connection.close()


class _UnixConnection(HTTPConnection):
    def __init__(self, place: Path) -> None:
        super().__init__("localhost", timeout=_PATIENCE_SECONDS)
        self._place = place

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(_PATIENCE_SECONDS)
        self.sock.connect(str(self._place))
