"""Loading modules that are none, and what the process does to protect itself."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest

from kms.dev.softhsm import SoftToken
from kms.domain.algorithms import Hash, KeyType, Purpose
from kms.domain.errors import KmsError, Reason
from kms.domain.keys import Custody
from kms.hsm import probe
from kms.hsm.module import load_module
from kms.hsm.settings import HsmSettings
from kms.hsm.token_hsm import open_hsm
from tests.fixtures.softhsm import settings_of

NSS = sorted(Path("/usr/lib").glob("**/libsoftokn3.so"))


@pytest.mark.parametrize("kind", ["absent", "text", "directory", "another library"])
def test_what_is_no_module_is_an_error_not_a_crash(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "module.so"
    if kind == "text":
        path.write_text("not a library")
    elif kind == "directory":
        path.mkdir()
    elif kind == "another library":
        import _ctypes

        path = Path(_ctypes.__file__)
    with pytest.raises(KmsError, match="cannot be loaded") as caught:
        load_module(path)
    assert caught.value.reason is Reason.HSM_UNAVAILABLE


@pytest.mark.skipif(not NSS, reason="the softoken of NSS is not installed")
def test_a_module_that_wants_arguments_is_said_to_want_them() -> None:
    with pytest.raises(KmsError, match="does not start without arguments") as caught:
        load_module(NSS[0])
    assert caught.value.reason is Reason.HSM_UNAVAILABLE


def test_a_module_is_loaded_once_whatever_its_path_is_called(soft_token: SoftToken, tmp_path: Path) -> None:
    link = tmp_path / "link.so"
    link.symlink_to(soft_token.module)
    assert load_module(link) is load_module(soft_token.module)


LOCKED_DOWN = """
import asyncio, ctypes, json, resource, sys
from pathlib import Path
from kms.domain.secret import Secret
from kms.hsm.settings import HsmSettings
from kms.hsm.token_hsm import open_hsm

async def main():
    module, label, pin = sys.argv[1:]
    hsm = await open_hsm(HsmSettings(Path(module), label, Secret(Path(pin).read_bytes())))
    status = hsm.status()
    await hsm.close()
    locked = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmLck")]
    print(json.dumps({
        "core": resource.getrlimit(resource.RLIMIT_CORE)[0],
        "dumpable": ctypes.CDLL(None).prctl(3, 0, 0, 0, 0),
        "is_memory_locked": status.is_memory_locked,
        "locked_kib": int(locked[0]),
    }))

asyncio.run(main())
"""


def test_a_process_that_uses_the_token_leaves_no_core_dump_and_says_whether_its_memory_is_locked(soft_token: SoftToken) -> None:
    arguments = [str(soft_token.module), soft_token.label, str(soft_token.pin_file)]
    done = subprocess.run([sys.executable, "-c", LOCKED_DOWN, *arguments], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert (found["core"], found["dumpable"]) == (0, 0)
    assert found["is_memory_locked"] == (found["locked_kib"] > 0)


async def test_the_start_finds_out_what_the_token_does(hsm_settings: HsmSettings) -> None:
    hsm = await open_hsm(hsm_settings)
    status = hsm.status()
    await hsm.close()
    signing, encryption = Purpose.SIGNING, Purpose.ENCRYPTION
    wrapped, sealed = frozenset({Custody.WRAPPED, Custody.RESIDENT}), frozenset({Custody.SEALED, Custody.RESIDENT})
    assert {
        name: status.custodies[name]
        for name in [(KeyType.SECP256K1, signing), (KeyType.SECP256R1, signing), (KeyType.AES, encryption)]
    } == dict.fromkeys([(KeyType.SECP256K1, signing), (KeyType.SECP256R1, signing), (KeyType.AES, encryption)], wrapped)
    # SoftHSM wraps Ed25519 from 2.7.0 on.
    assert status.custodies[KeyType.ED25519, signing] in (wrapped, sealed)
    assert status.custodies[KeyType.RSA, signing] == status.custodies[KeyType.RSA, encryption] == wrapped
    assert status.oaep_hashes == {Hash.SHA_1}
    assert len(hsm.capabilities.rsa_signatures) == 6
    assert status.token_label == hsm_settings.token_label
    assert [key.generation for key in status.wrapping_keys] == [1, 1]


def test_a_probe_says_what_was_tried_and_leaves_nothing_in_the_token(soft_token: SoftToken) -> None:
    before = sorted(path.name for path in soft_token.token_directory.rglob("*.object"))
    report = probe.examine(settings_of(soft_token, allow_sealed=False))
    assert sorted(path.name for path in soft_token.token_directory.rglob("*.object")) == before
    tried = {key.key_type: key.milliseconds for key in report.keys}
    assert tried[KeyType.SECP256K1][Custody.WRAPPED] is not None
    assert tried[KeyType.RSA][Custody.RESIDENT] is not None
    assert "AES_GCM" in report.mechanisms
    assert any("SoftHSM" in warning for warning in report.warnings)
    assert "secp256k1 signing" in str(report)
    assert json.loads(json.dumps(report.as_json()))["token_label"] == soft_token.label


def test_many_openings_of_one_process_do_not_disturb_each_other(soft_token: SoftToken) -> None:
    async def open_and_close() -> None:
        hsm = await open_hsm(settings_of(soft_token))
        assert len(await hsm.random(16)) == 16
        await hsm.close()

    for _ in range(3):
        asyncio.run(open_and_close())
