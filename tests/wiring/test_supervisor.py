"""The supervisor where the host has nothing left for a worker. What it does with workers that run: tests/conformance."""

import asyncio
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kms.config import Config, ServerConfig
from kms.wiring import supervisor


@contextmanager
def no_descriptor_left() -> Iterator[None]:
    """Let this process open nothing more within the block."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_first_worker_for_which_the_host_has_no_room_is_told() -> None:
    unread = Path("unread")
    config = Config(server=ServerConfig(workers=2, tls_cert_file=unread, tls_key_file=unread, client_ca_file=unread))

    async def run() -> None:
        with no_descriptor_left():
            await asyncio.wait_for(supervisor._Supervisor(config, None).run(), 5)

    with pytest.raises(OSError, match="Too many open files"):
        asyncio.run(run())
