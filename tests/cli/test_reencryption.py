"""`kms reencrypt`: one ciphertext, and a list of files with failures, interruptions and a terminal."""

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

from kms.cli.failures import CallError
from kms.cli.file_list import ListedFile
from kms.cli.reencryption import Work
from kms.v1 import crypto_pb2
from tests.cli.conftest import NewConfig
from tests.cli.running import Kms
from tests.conformance.test_outages import soon

TREE = {"a": b"", "b/c": b"\x01\x02", "b/d e": b""}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def files(as_ada: Kms, here: Path) -> Path:
    """The list of `TREE`: ciphertexts of a key of Ada's that got a successor since."""
    assert as_ada("key", "create", "k", "--type", "aes").code == 0
    for name, aad in TREE.items():
        path = here / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(as_ada("encrypt", "k", "--aad-hex", aad.hex(), stdin=name.encode()).out)
    assert as_ada("key", "rotate", "k", "--reason", "yearly").code == 0
    here.joinpath("list").write_text("".join(f"{name}\t{aad.hex()}\n" if aad else f"{name}\n" for name, aad in TREE.items()))
    return here / "list"


def uses(as_ada: Kms, key: str = "k") -> int:
    return int(as_ada("key", "show", key, "--json").json["usage_count"])


def test_a_ciphertext_is_moved_to_the_current_key_or_to_another(as_ada: Kms, here: Path) -> None:
    for name in ("k", "other"):
        as_ada("key", "create", name, "--type", "aes")
    old = as_ada("encrypt", "k", "--aad", "row", stdin=b"secret").out
    as_ada("key", "rotate", "k", "--reason", "yearly")
    current, other, first = (as_ada("key", "show", name, "--json").json["id"] for name in ("k", "other", "k@1"))
    moved = as_ada("reencrypt", "--aad", "row", "--out", "moved", "--json", stdin=old).json
    assert moved == {"key_id": current, "source_key_id": first, "ciphertext_file": "moved"}
    assert as_ada("decrypt", "--in", "moved", "--aad", "row").out == b"secret"
    command = ("reencrypt", "--key", "other", "--aad", "row", "--new-aad", "", "--source-key", "k")
    elsewhere = as_ada(*command, stdin=old).out
    assert as_ada("decrypt", "--json", stdin=elsewhere).json["key_id"] == other
    in_text = as_ada("reencrypt", "--aad", "row", "--in-encoding", "hex", "--encoding", "hex", stdin=old.hex().encode()).out
    assert as_ada("decrypt", "--aad", "row", stdin=bytes.fromhex(in_text.decode())).out == b"secret"
    refused = as_ada("reencrypt", "--json", stdin=old)
    assert (refused.code, refused.failure["reason"]) == (1, "CIPHERTEXT_INVALID")
    refused = as_ada("reencrypt", "--aad", "row", "--source-key", "other", "--json", stdin=old)
    assert (refused.code, refused.failure["reason"]) == (1, "INCORRECT_KEY")


def test_a_list_of_files_is_moved_and_what_is_done_is_not_done_again(as_ada: Kms, files: Path) -> None:
    command = ("reencrypt", "--in-list", files, "--out-dir", "moved")
    ended = as_ada(*command)
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.decode().splitlines() == ["3 of 3 done, 0 failed", "moved        3", "done before  0", "failed       0"]
    for name, aad in TREE.items():
        opened = as_ada("decrypt", "--key", "k", "--aad-hex", aad.hex(), "--in", Path("moved") / name, "--json").json
        assert opened["key_id"] == as_ada("key", "show", "k", "--json").json["id"]
    assert uses(as_ada) == 3
    (files.parent / "moved/b/c").unlink()
    again = as_ada(*command, "--json")
    assert (again.code, again.json) == (0, {"moved": 1, "done_before": 2, "failed": []})
    assert uses(as_ada) == 4
    assert sorted(each.name for each in Path("moved").rglob("*")) == ["a", "b", "c", "d e"], "no half-written file is left"


def test_files_that_fail_are_named_and_keep_no_other_from_being_moved(as_ada: Kms, files: Path) -> None:
    damaged = (files.parent / "a").read_bytes()
    (files.parent / "bad\x1b").write_bytes(damaged[:-1] + bytes((damaged[-1] ^ 1,)))
    (files.parent / "long").write_bytes(b"\x01" * 300_000)
    files.write_text(files.read_text() + "bad\x1b\nnone\nlong\n")
    ended = as_ada("reencrypt", "--in-list", files, "--out-dir", "moved")
    assert ended.code == 1
    lines = sorted(line.split(": ")[1:3] for line in ended.err.splitlines())
    assert lines == [["CIPHERTEXT_INVALID", "bad\\u001b"], ["FILE", "none"], ["MALFORMED", "long"]]
    assert sorted(each.name for each in Path("moved").rglob("*") if each.is_file()) == ["a", "c", "d e"]
    found = as_ada("reencrypt", "--in-list", "-", "--out-dir", "moved", "--json", stdin=files.read_bytes())
    assert (found.code, found.json["moved"], found.json["done_before"]) == (1, 0, 3)
    assert {each["file"]: each["reason"] for each in found.json["failed"]} == {
        "none": "FILE",
        "long": "MALFORMED",
        "bad\x1b": "CIPHERTEXT_INVALID",
    }


def test_a_command_that_is_interrupted_goes_on_where_it_stopped(as_ada: Kms, ada: Path, files: Path) -> None:
    command = ["--config", str(ada), "reencrypt", "--in-list", str(files), "--out-dir", "moved", "--rate", "0.02"]
    process = subprocess.Popen([sys.executable, "-m", "kms", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    first = Path("moved/a")
    soon(first.exists)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "kms: INTERRUPTED: stopped\n")
    assert "moved        1" in out
    before = first.read_bytes()
    again = as_ada("reencrypt", "--in-list", files, "--out-dir", "moved", "--json")
    assert (again.code, again.json) == (0, {"moved": 2, "done_before": 1, "failed": []})
    assert (first.read_bytes(), uses(as_ada)) == (before, 3)


def test_a_terminal_gets_a_bar(ada: Path, files: Path) -> None:
    ours, terminal = pty.openpty()
    command = [sys.executable, "-m", "kms", "--config", str(ada), "reencrypt", "--in-list", str(files), "--out-dir", "moved"]
    environment = {**os.environ, "COLUMNS": "120", "NO_COLOR": "1", "TERM": "xterm"}
    subprocess.run(command, stdout=terminal, env=environment, check=True, timeout=60)
    os.close(terminal)
    shown = os.read(ours, 65_536).decode(errors="replace")
    os.close(ours)
    assert "━" in shown
    assert "3/3" in shown
    assert "3 of 3 done" not in shown


def test_where_the_service_does_not_answer_the_command_ends_and_says_how_to_go_on(
    kms: Kms, new_config: NewConfig, files: Path
) -> None:
    ended = kms("--config", new_config("127.0.0.1:1"), "reencrypt", "--in-list", files, "--out-dir", "moved")
    assert ended.code == 5
    assert "run the command again" in ended.err
    assert not Path("moved").exists()


def test_an_item_that_is_refused_for_want_of_the_hsm_ends_the_command_after_its_batch(here: Path) -> None:
    info = any_pb2.Any()
    info.Pack(error_details_pb2.ErrorInfo(reason="HSM_UNAVAILABLE", domain="kms"))
    away = status_pb2.Status(code=14, message="the HSM does not answer", details=[info])
    answer = crypto_pb2.BatchReEncryptResponse()
    answer.items.add().error.CopyFrom(away)
    answer.items.add().result.ciphertext = b"new"
    client: Any = SimpleNamespace(call=lambda method, request: answer, crypto=SimpleNamespace(BatchReEncrypt=None))
    work = Work(client, crypto_pb2.ReEncryptRequest(), None)
    batch = [(ListedFile(Path(name), here / "moved" / name, None), crypto_pb2.ReEncryptRequest()) for name in ("a", "b")]
    with pytest.raises(CallError) as caught:
        work.move(batch)
    assert (caught.value.code, caught.value.reason) == ("UNAVAILABLE", "HSM_UNAVAILABLE")
    assert (work.moved, work.failed, (here / "moved/b").read_bytes()) == (1, [], b"new")
