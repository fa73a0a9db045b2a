"""Fixtures of all tests: each test has a database cloned from a template and a token directory of its own."""

import importlib.util
from typing import Final

_FIXTURES: Final = ("tests.fixtures.postgres", "tests.fixtures.softhsm", "tests.fixtures.server", "tests.fixtures.containers")

pytest_plugins = [name for name in _FIXTURES if importlib.util.find_spec(name) is not None]
