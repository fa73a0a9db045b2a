"""What the HSM package needs to know, handed over once by the wiring."""

from dataclasses import dataclass, field
from pathlib import Path

from kms.domain.errors import malformed
from kms.domain.secret import Secret

# Beside the lanes a connection holds: the login session, the event loop's own, the watch's, the generator's, and one spare
# with which a lane asks whether its own session or the input is at fault.
SESSIONS_BESIDE_LANES = 5


@dataclass(frozen=True, slots=True)
class HsmSettings:
    """One token and how it is used. The upper part is `[hsm]` of the configuration, under the same names.

    Times are in seconds. `processes` is how many service processes share the token: their sessions together stay under
    `sessions_max`. `allow_sealed` is decided by the wiring (in development mode, or where the operator said so).
    """

    module: Path
    token_label: str
    pin: Secret = field(repr=False)
    lanes: int = 2
    sessions_max: int = 16
    queue_max: int = 1024
    handles_max: int = 1000
    handle_idle_seconds: float = 30.0
    stuck_seconds: float = 20.0
    resident_keys_max: int = 4
    allow_sealed: bool = False

    processes: int = 1
    inline_p99_seconds: float = 200e-6
    watch_seconds: float = 0.25
    generation_stuck_seconds: float = 120.0
    abandoned_max: int = 2
    start_attempts: int = 5

    @property
    def sessions_needed(self) -> int:
        """How many sessions one process opens at most, those of abandoned lanes included."""
        return self.lanes + self.abandoned_max + SESSIONS_BESIDE_LANES

    def check(self) -> None:
        """Raise MALFORMED where the numbers do not fit each other or the token's session limit."""
        if self.lanes < 1 or self.processes < 1 or self.queue_max < 1 or self.handles_max < 1:
            raise malformed("hsm", "expected at least one lane, one process, one place in the queue and one handle")
        needed = self.sessions_needed * self.processes
        if self.sessions_max < needed:
            raise malformed(
                "hsm.sessions_max",
                f"expected at least {needed}: {self.processes} process(es) of {self.lanes} lane(s) with "
                f"{self.abandoned_max} that may be abandoned and {SESSIONS_BESIDE_LANES} sessions beside",
            )
