"""Fixtures of all tests: each test has a database cloned from a template and a token directory of its own."""

import importlib.util
import os
import signal
from typing import Final

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
