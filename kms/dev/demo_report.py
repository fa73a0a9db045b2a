"""What a demonstration saw."""

import time
from dataclasses import dataclass, field


@dataclass(slots=True)
class Report:
    """What the demonstration saw; grows as it goes, and prints each line at once unless *quiet*."""

    quiet: bool = False
    checks: list[tuple[str, bool]] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    def heading(self, text: str) -> None:
        """Begin a part, with the seconds since the start."""
        self.line(f"\n[{time.monotonic() - self.began:5.1f} s] {text}")

    def line(self, text: str) -> None:
        """Say *text*."""
        if not self.quiet:
            print(text, flush=True)

    def check(self, passed: bool, text: str) -> None:
        """Note whether something that must hold does."""
        self.checks.append((text, passed))
        self.line(f"  {'ok    ' if passed else 'FAILED'}  {text}")

    @property
    def failed(self) -> list[str]:
        """What did not hold."""
        return [text for text, passed in self.checks if not passed]
