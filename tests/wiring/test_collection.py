import gc
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from kms.wiring import collection


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    thresholds = gc.get_threshold()
    yield
    gc.set_threshold(*thresholds)
    gc.unfreeze()


def test_a_service_looks_for_garbage_as_python_does_once_it_has_started() -> None:
    usual = gc.get_threshold()
    collection.begin()
    assert gc.get_threshold()[0] > usual[0]
    collection.serve()
    assert gc.get_threshold() == usual
    assert gc.isenabled()


@pytest.mark.parametrize("moment", [collection.serve, collection.end])
def test_what_was_made_before_is_not_looked_at_again(moment: Callable[[], None]) -> None:
    before = gc.get_freeze_count()
    moment()
    assert gc.get_freeze_count() > before


def test_a_command_looks_seldom_and_not_at_its_end() -> None:
    script = (
        "import atexit, gc, sys; sys.argv = ['kms', 'version']\n"
        "from kms.cli.main import main\n"
        "atexit.register(lambda: print(gc.get_freeze_count() > 10_000, gc.get_threshold()[0] > 10_000))\n"
        "main()\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=30)
    assert (ended.returncode, ended.stdout.splitlines()[1:]) == (0, ["True True"]), ended.stderr
