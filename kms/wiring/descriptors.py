"""File descriptors of a process that serves."""

import resource


def raise_descriptor_limit() -> None:
    """Raise the soft limit of this process to the hard one: each connection is a descriptor, and the usual limit is low."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
