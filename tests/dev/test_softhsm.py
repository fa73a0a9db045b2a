"""The development token: made once, its PINs nowhere but in their files."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kms.dev.softhsm import SoftToken, find_softhsm, soft_token
from kms.domain.errors import KmsError, Reason
from kms.domain.secret import Secret
from kms.hsm.new_token import new_token

LOGIN = """
import sys, pkcs11
token = pkcs11.lib(sys.argv[1]).get_token(token_label=sys.argv[2])
with token.open(user_pin=sys.stdin.read()) as session:
    print(len(list(session.get_objects())), "objects")
"""


def slots(token: SoftToken) -> str:
    command = ["softhsm2-util", "--show-slots"]
    return subprocess.run(command, env=environment(token), capture_output=True, text=True, check=True).stdout


def login(token: SoftToken, pin: str) -> subprocess.CompletedProcess[str]:
    # A process of its own: the binding initialises the module for as long as the process lives.
    command = [sys.executable, "-c", LOGIN, str(token.module), token.label]
    return subprocess.run(command, env=environment(token), input=pin, capture_output=True, text=True, check=False)


def environment(token: SoftToken) -> dict[str, str]:
    return {**os.environ, **token.environment}


def test_other_programs_find_the_token_and_log_in_with_its_pin(tmp_path: Path) -> None:
    token = soft_token(tmp_path / "a token", "neo-kms dev")
    assert re.search(r"User PIN init.: +yes\s+Label: +neo-kms dev", slots(token))
    assert login(token, token.pin_file.read_text()).stdout == "0 objects\n"
    assert "PinIncorrect" in login(token, "wrong-pin").stderr


def test_a_second_call_finds_the_same_token(tmp_path: Path) -> None:
    first = soft_token(tmp_path / "token", "dev")
    pin, files = first.pin_file.read_bytes(), sorted(first.token_directory.iterdir())
    assert soft_token(tmp_path / "token", "dev") == first
    assert first.pin_file.read_bytes() == pin
    assert sorted(first.token_directory.iterdir()) == files


def test_a_token_works_after_its_directory_was_moved(tmp_path: Path) -> None:
    soft_token(tmp_path / "before", "dev")
    (tmp_path / "before").rename(tmp_path / "after")
    moved = soft_token(tmp_path / "after", "dev")
    assert login(moved, moved.pin_file.read_text()).returncode == 0


def test_an_interrupted_first_start_is_begun_again(tmp_path: Path) -> None:
    (tmp_path / "token.unfinished").mkdir()
    (tmp_path / "token.unfinished" / "pin").write_text("left over")
    token = soft_token(tmp_path / "token", "dev")
    assert token.pin_file.read_text() != "left over"
    assert not (tmp_path / "token.unfinished").exists()


def test_nobody_else_can_read_the_pins_or_the_objects(tmp_path: Path) -> None:
    token = soft_token(tmp_path / "token", "dev")
    assert token.directory.stat().st_mode & 0o777 == 0o700
    assert {path.name: path.stat().st_mode & 0o777 for path in token.directory.iterdir() if path.name.endswith("pin")} == {
        "pin": 0o400,
        "so.pin": 0o400,
    }


def test_a_second_token_of_one_label_is_refused(tmp_path: Path) -> None:
    token = soft_token(tmp_path / "token", "dev")
    pin = Secret(b"another-pin")
    with pytest.raises(KmsError, match="a token of that label exists") as caught:
        new_token(token.module, "dev", so_pin=pin, pin=pin, environment=token.environment)
    assert caught.value.reason is Reason.HSM_UNAVAILABLE


def test_a_pin_that_the_token_refuses_is_an_error_that_does_not_show_it(tmp_path: Path) -> None:
    token = soft_token(tmp_path / "token", "dev")
    with pytest.raises(KmsError, match="C_InitPIN returned") as caught:
        new_token(token.module, "two", so_pin=Secret(b"so-pin-long"), pin=Secret(b"q7"), environment=token.environment)
    assert "q7" not in caught.value.message


def test_a_module_that_is_not_there_is_named_by_its_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KMS_HSM_MODULE", "/nowhere/module.so")
    with pytest.raises(KmsError, match="KMS_HSM_MODULE"):
        find_softhsm()


def test_the_module_is_not_loaded_into_this_process(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from kms.dev.softhsm import soft_token; soft_token(pathlib.Path(sys.argv[1]), 'dev');"
        "print('softhsm' in pathlib.Path('/proc/self/maps').read_text())"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "token")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "False\n"
