"""The disk of the database: what is free of it decides what strangers may have written."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kms.store.disk import Disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 10 MiB, in memory."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=10m", "tmpfs", str(tmp_path)], capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip("mounting needs root")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


async def seen(disk: Disk) -> tuple[bool, bool]:
    await disk.watch()
    return disk.is_low, disk.has_room_for_strangers()


async def test_a_disk_that_fills_is_low_at_a_fifth_and_closed_to_strangers_at_a_tenth(small_disk: Path) -> None:
    disk, mebibyte = Disk(small_disk), bytes(1024 * 1024)
    states = [await seen(disk)]
    for number in range(10):
        (small_disk / str(number)).write_bytes(mebibyte)
        states.append(await seen(disk))
    # Free: 10 to 2 MiB, then 1, then none. At 2 of 10 it is not yet less than a fifth, at 1 of 10 not less than a tenth.
    assert states == [(False, True)] * 9 + [(True, True), (True, False)]
    (small_disk / "0").unlink()
    (small_disk / "1").unlink()
    assert await seen(disk) == (False, True)


@pytest.mark.parametrize(("free", "expected"), [(20, (False, True)), (19, (True, True)), (10, (True, True)), (9, (True, False))])
async def test_the_bounds_are_a_fifth_and_a_tenth_of_what_the_database_may_use(free: int, expected: tuple[bool, bool]) -> None:
    def look(path: Path) -> os.statvfs_result:
        return os.statvfs_result((4096, 4096, 100, free + 50, free, 0, 0, 0, 0, 255))  # 50 blocks more are root's

    assert await seen(Disk(Path("/"), look=look)) == expected


async def test_a_disk_that_is_not_watched_or_not_seen_refuses_nothing(tmp_path: Path) -> None:
    assert await seen(Disk(None)) == (False, True)
    assert await seen(Disk(tmp_path / "missing")) == (False, True)
