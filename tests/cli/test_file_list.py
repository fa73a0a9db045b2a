"""A list of files to work on: what is left, in batches, at a rate."""

from pathlib import Path

import pytest
import typer

from kms.cli.file_list import ListedFile, Pace, batches, read_list


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def listed(text: str, out_dir: str = "moved") -> list[ListedFile]:
    Path("list").write_bytes(text.encode(errors="surrogateescape"))
    return read_list(Path("list"), Path(out_dir))


def test_each_file_is_listed_once_with_its_result_below_the_directory(here: Path) -> None:
    assert listed("a\n./b/c d\r\n\na\nü\udcff\n") == [
        ListedFile(Path(path), Path("moved") / path, None) for path in ("a", "b/c d", "ü\udcff")
    ]
    assert listed("a\t0aFF\nb\t\n") == [
        ListedFile(Path("a"), Path("moved/a"), b"\x0a\xff"),
        ListedFile(Path("b"), Path("moved/b"), b""),
    ]


@pytest.mark.parametrize("line", ["/etc/passwd", "../a", "a/../../b", "\t00", "a\tno hex", "a\0b"])
def test_a_line_that_is_no_path_below_is_refused_by_its_number(here: Path, line: str) -> None:
    with pytest.raises(typer.BadParameter, match="--in-list, line 2"):
        listed(f"first\n{line}\n")


@pytest.mark.parametrize("out_dir", [".", "link", "-"])
def test_a_file_is_never_its_own_result(here: Path, out_dir: str) -> None:
    (here / "a").write_bytes(b"old")
    (here / "link").symlink_to(here)
    with pytest.raises(typer.BadParameter, match="--out-dir"):
        listed("a\n", out_dir)


def test_a_file_is_done_when_its_result_is_a_file(here: Path) -> None:
    (here / "moved/b").mkdir(parents=True)
    (here / "moved/a").write_bytes(b"")
    assert [each.is_done for each in listed("a\nb\nc\n")] == [True, False, False]


def test_batches_are_as_large_as_they_may_be() -> None:
    sizes = [3, 3, 3, 1, 20, 1, 1, 1, 1, 1]
    pairs = ((number, size) for number, size in enumerate(sizes))
    assert list(batches(pairs, items_max=4, bytes_max=9)) == [[0, 1, 2], [3], [4], [5, 6, 7, 8], [9]]
    assert list(batches(iter([]), items_max=4, bytes_max=9)) == []


def test_a_pace_lets_no_more_pass_than_its_rate_and_makes_up_for_no_pause() -> None:
    now, slept = 100.0, []

    def sleep(seconds: float) -> None:
        nonlocal now
        slept.append(seconds)
        now += seconds

    pace = Pace(10.0, lambda: now, sleep)
    pace.wait(5)
    pace.wait(20)
    pace.wait(5)
    assert slept == [0.5, 2.0]
    now += 60
    pace.wait(5)
    pace.wait(5)
    assert slept == [0.5, 2.0, 0.5]
    Pace(None, lambda: now, sleep).wait(10**9)
    assert len(slept) == 3
