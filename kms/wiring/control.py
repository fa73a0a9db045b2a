"""What a supervisor and its workers say to each other, over a socket that nobody else has.

The first message is the worker's `Task`. It holds the secrets, so that no command line and no environment has them.
"""

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from kms.config import Config


@dataclass(frozen=True, slots=True)
class Task:
    """What a worker is to do: serve as *number*, from 1, with this configuration, in which the secrets have been read.

    `metrics` is the path of the socket on which it is seen; None: it is not.
    """

    number: int
    config: Config = field(repr=False)
    metrics: Path | None = None


class Order(Enum):
    """What the supervisor says afterwards. That it is gone is an order, too: to drain."""

    ANSWER = "answer"
    STATUS = "status"
    DRAIN = "drain"
    HURRY = "hurry"


class Report(Enum):
    """What a worker says: that its event loop runs, and, once each, that it serves and that it has drained."""

    ANSWER = "answer"
    SERVING = "serving"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a worker does not start. One that may pass, such as a database that is away, is worth another try."""

    error: Exception
    may_pass: bool
