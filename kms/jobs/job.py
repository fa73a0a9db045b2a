"""What a job is, and what is known of it. Pure values: the runner executes them."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import TypeAlias

Work: TypeAlias = Callable[[], Awaitable[object]]
_SECONDS_TOLD_MAX = 120
_MINUTES_TOLD_MAX = 120


class Scope(Enum):
    """Who does a round."""

    ANY_WORKER = auto()
    """Each worker does its own rounds."""
    ONE_WORKER = auto()
    """At most one worker of the deployment is in a round. Another worker whose time comes meanwhile skips its round."""


@dataclass(frozen=True, slots=True)
class Job:
    """Work that the service repeats: at once, and again `interval_seconds` after the end of each round.

    `warns_after_seconds` says what a failure means. None: the log and the metrics report it, nothing else does. A number:
    readiness carries a warning when the job has had no success for so long.
    """

    name: str
    interval_seconds: float
    work: Work
    scope: Scope = Scope.ANY_WORKER
    warns_after_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class JobStatus:
    """What is known of a job at one moment. Ages are in seconds.

    `success_age` counts from the last success, and from the start of the job while there is none. `failure_age` is None
    before the first failure. `last_failure` is the reason of the last failure since the last success, or empty. It is a
    reason and no message, since a message may name a key, and anybody who reaches /readyz reads the warning.
    `idle_age` is like `success_age`, but also counts from the last round that this worker skipped for another.
    """

    job: Job
    success_age: float
    idle_age: float
    failure_age: float | None
    failures: int
    last_failure: str

    @property
    def warning(self) -> str:
        """Return the warning for an operator, or an empty text."""
        allowance = self.job.warns_after_seconds
        if allowance is None or self.idle_age <= allowance:
            return ""
        why = self.last_failure or "its round has not ended"
        return f"job {self.job.name} has not succeeded for {_duration(self.idle_age)}: {why}"


def _duration(seconds: float) -> str:
    if seconds < _SECONDS_TOLD_MAX:
        return f"{seconds:.0f} seconds"
    minutes = seconds / 60
    return f"{minutes:.0f} minutes" if minutes < _MINUTES_TOLD_MAX else f"{minutes / 60:.0f} hours"
