"""Processor time from /proc, and what machine it is: time survives what else runs on a machine, requests per second do not."""

import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

_TICK_SECONDS: Final = 1 / os.sysconf("SC_CLK_TCK")
_PROC: Final = Path("/proc")


def tree_seconds(roots: Mapping[str, Iterable[int]]) -> dict[str, float]:
    """Return the processor time so far of each group of processes: all threads, all descendants, those that ended too."""
    stats = {pid: fields for pid in _pids() if (fields := _stat(pid)) is not None}
    children: dict[int, list[int]] = {}
    for pid, fields in stats.items():
        children.setdefault(int(fields[1]), []).append(pid)
    return {name: _TICK_SECONDS * sum(_ticks(pid, stats, children) for pid in group) for name, group in roots.items()}


def _ticks(pid: int, stats: Mapping[int, list[str]], children: Mapping[int, list[int]]) -> int:
    if pid not in stats:
        return 0
    own = sum(map(int, stats[pid][11:15]))  # utime, stime, and both of the children that were waited for
    return own + sum(_ticks(child, stats, children) for child in children.get(pid, ()))


def machine_seconds() -> tuple[float, float]:
    """Return how long all cores together have been busy and how long they have been there, in seconds."""
    ticks = list(map(int, (_PROC / "stat").read_text().splitlines()[0].split()[1:9]))
    idle = ticks[3] + ticks[4]
    return (sum(ticks) - idle) * _TICK_SECONDS, sum(ticks) * _TICK_SECONDS


def machine() -> dict[str, str | int]:
    """Return processor, cores, memory and kernel."""
    lines = (_PROC / "cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "processor": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(pages / 2**30),
        "kernel": platform.release(),
    }


def commit() -> str:
    """Return the commit that is checked out, with a plus where files differ from it."""
    directory = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=directory, capture_output=True, text=True, check=True).stdout.strip()

    return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def _pids() -> list[int]:
    return [int(entry.name) for entry in _PROC.iterdir() if entry.name.isdigit()]


def _stat(pid: int) -> list[str] | None:
    """Return the fields of /proc/PID/stat behind the name, which may hold spaces: the state is the first."""
    try:
        return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
