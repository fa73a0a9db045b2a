"""When Python looks for cycles of garbage: seldom while a process starts, as ever while it serves, and not once it ends.

A start makes a hundred thousand objects, nearly all of which live as long as the process. To look through them again and again
took a fifth of it, and to look once more at the end as much again.
"""

import gc
from typing import Final

_USUAL: Final = gc.get_threshold()
_SELDOM: Final = 50_000


def begin() -> None:
    """Look seldom from now on: a command does its work so, and a service starts so."""
    gc.set_threshold(_SELDOM)


def serve() -> None:
    """Look as often as Python does by itself, though never again at what the start has made."""
    gc.freeze()
    gc.set_threshold(*_USUAL)


def end() -> None:
    """Look at nothing that is there now: the process ends, and all of it goes."""
    gc.freeze()
