"""Fixtures of all tests: each test has a database cloned from a template and a token directory of its own."""

import importlib.util
import os
from typing import Final

# Tests start processes from one that has grpc's threads: its fork handlers would now and then crash the child.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

_FIXTURES: Final = ("tests.fixtures.postgres", "tests.fixtures.softhsm", "tests.fixtures.server", "tests.fixtures.containers")

pytest_plugins = [name for name in _FIXTURES if importlib.util.find_spec(name) is not None]
