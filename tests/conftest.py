"""Fixtures of all tests: each test has a database cloned from a template and a token directory of its own."""

import importlib.util
import os
import signal
import tempfile
from typing import Final

_MEMORY: Final = "/dev/shm"  # noqa: S108  # what is below it has names of its own
_ROOM_BYTES: Final = 4 << 30


def _is_roomy(directory: str) -> bool:
    """Whether we can have gigabytes in *directory*, and programs too."""
    try:
        found = os.statvfs(directory)
    except OSError:
        return False
    may_run = not found.f_flag & getattr(os, "ST_NOEXEC", 0)
    return may_run and os.access(directory, os.W_OK) and found.f_bavail * found.f_frsize >= _ROOM_BYTES


# Each database is a thousand files, each token some more: on a disk they cost ten times the processor time.
if "TMPDIR" not in os.environ and _is_roomy(_MEMORY):
    os.environ["TMPDIR"] = tempfile.tempdir = _MEMORY

# Tests start processes from one that has grpc's threads: its fork handlers would now and then crash the child.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

# A shell starts what runs in the background without SIGINT, and every process that a test starts would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

_FIXTURES: Final = (
    "tests.fixtures.clusters",
    "tests.fixtures.postgres",
    "tests.fixtures.softhsm",
    "tests.fixtures.server",
    "tests.fixtures.containers",
)

pytest_plugins = [name for name in _FIXTURES if importlib.util.find_spec(name) is not None]
