import gc
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
