"""Signals that ask a command to end, all of them heard as Ctrl-C is."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

_ENDING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def interruptible() -> Iterator[None]:
    """Make SIGINT, SIGTERM and SIGHUP end the block by KeyboardInterrupt, through every `finally`; once, so that these get done.

    What is ignored, as SIGHUP is under nohup, stays ignored.
    """

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        for number in heard:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    heard = {number: found for number in _ENDING if (found := signal.getsignal(number)) is not signal.SIG_IGN}
    for number in heard:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, before in heard.items():
            signal.signal(number, before)
