"""File descriptors of a process that serves."""

import resource
from typing import Final

_DESCRIPTORS_MAX: Final = 1 << 20  # where there is no limit


def raise_descriptor_limit() -> None:
    """Raise the soft limit of this process to the hard one: each connection is a descriptor, and the usual limit is low."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def connections_that_fit() -> int:
    """Return how many connections leave enough file descriptors for the token and the database."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return (_DESCRIPTORS_MAX if soft == resource.RLIM_INFINITY else min(soft, _DESCRIPTORS_MAX)) // 2
