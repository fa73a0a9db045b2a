"""`kms hsm init` and what every start demands of the token's own keys."""

import hmac
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pkcs11
import pytest
from pkcs11 import Attribute, ObjectClass

from kms.dev.softhsm import SoftToken
from kms.dev.softhsm import soft_token as make_soft_token
from kms.domain.errors import KmsError, Reason
from kms.domain.secret import Secret
from kms.hsm import connection, provision, token_hsm
from kms.hsm.module import Module
from kms.hsm.settings import HsmSettings
from kms.hsm.token_hsm import open_hsm
from kms.hsm.wrapping_keys import Kind
from tests.fixtures.softhsm import LABEL, OpenHsm, settings_of
from tests.hsm.tokens import KnownKey, prepare, put_canary, put_canary_text, put_kek, put_mac_key, put_sealing_key, session_on

OPERATIONS = ("WRAP", "UNWRAP", "ENCRYPT", "DECRYPT", "SIGN", "VERIFY", "DERIVE")


def token_keys(session: pkcs11.Session) -> dict[str, dict[str, object]]:
    names = ("SENSITIVE", "EXTRACTABLE", "MODIFIABLE", "COPYABLE", "PRIVATE", "NEVER_EXTRACTABLE", "ALWAYS_SENSITIVE", "LOCAL")
    found = list(session.get_objects({Attribute.CLASS: ObjectClass.SECRET_KEY}))
    return {key[Attribute.LABEL]: {name: key[Attribute[name]] for name in (*names, *OPERATIONS)} for key in found}


def test_each_key_has_one_purpose_and_never_leaves(blank_token: SoftToken) -> None:
    provision.init(settings_of(blank_token))
    with session_on(blank_token) as session:
        keys = token_keys(session)
    common = {"SENSITIVE": True, "EXTRACTABLE": False, "MODIFIABLE": False, "COPYABLE": False, "PRIVATE": True}
    common |= {"NEVER_EXTRACTABLE": True, "ALWAYS_SENSITIVE": True, "LOCAL": True}
    assert keys == {
        "neo-kms kek 1": common | {name: name in ("WRAP", "UNWRAP") for name in OPERATIONS},
        "neo-kms seal 1": common | {name: name in ("ENCRYPT", "DECRYPT") for name in OPERATIONS},
        "neo-kms mac 1": common | {name: name in ("SIGN", "VERIFY") for name in OPERATIONS},
    }


@pytest.mark.parametrize("label", ["neo-kms kek 1", "neo-kms seal 1", "neo-kms mac 1"])
def test_no_session_can_give_a_token_key_another_purpose(soft_token: SoftToken, label: str) -> None:
    with session_on(soft_token) as session:
        key = session.get_key(label=label)
        for change in (lambda: key.__setitem__(Attribute.DECRYPT, True), lambda: key.copy({Attribute.DECRYPT: True})):
            with pytest.raises(pkcs11.PKCS11Error):
                change()
        with pytest.raises(pkcs11.PKCS11Error):
            key[Attribute.VALUE]


def test_a_second_run_is_refused_and_changes_nothing(blank_token: SoftToken) -> None:
    first = provision.init(settings_of(blank_token))
    with pytest.raises(KmsError) as caught:
        provision.init(settings_of(blank_token))
    assert caught.value.reason is Reason.NAME_TAKEN
    assert provision.describe(settings_of(blank_token)) == first
    assert [(key.kind, key.generation) for key in first.wrapping_keys] == [(Kind.KEK, 1), (Kind.SEALING, 1)]
    assert [key.generation for key in first.mac_keys] == [1]
    assert first.generations == (1,)


def test_an_interrupted_run_is_completed(blank_token: SoftToken) -> None:
    kek = KnownKey()
    with session_on(blank_token) as session:
        put_kek(session, kek)
    made = provision.init(settings_of(blank_token))
    assert made.wrapping_keys[0].key_id == kek.key_id
    assert provision.check_copy(settings_of(blank_token)) == made


@pytest.fixture
def older_token(blank_token: SoftToken) -> SoftToken:
    """A token from before there were MAC keys."""
    kek, sealing = KnownKey(), KnownKey()
    with session_on(blank_token) as session:
        put_kek(session, kek)
        put_sealing_key(session, sealing)
        put_canary(session, kek, sealing)
    return blank_token


def test_a_token_from_before_mac_keys_gets_one_and_nothing_else_changes(older_token: SoftToken) -> None:
    before = provision.describe(settings_of(older_token))
    objects = {path: path.read_bytes() for path in older_token.token_directory.rglob("*-*.object")}
    assert len(objects) == 3
    made = provision.init(settings_of(older_token))
    assert replace(made, mac_keys=()) == before
    assert len(made.mac_keys) == 1
    assert {path: path.read_bytes() for path in objects} == objects
    assert provision.check_copy(settings_of(older_token)) == made


async def test_a_token_without_keys_is_not_served_and_says_what_to_do(
    blank_token: SoftToken, enter_blank: Callable[[], None]
) -> None:
    enter_blank()
    with pytest.raises(KmsError, match=r"configure the token that has them .*hsm\.token_label.*kms hsm init") as caught:
        await open_hsm(settings_of(blank_token))
    assert caught.value.reason is Reason.HSM_KEK_MISSING


async def test_a_token_without_a_mac_key_is_not_served_and_says_what_to_run(older_token: SoftToken) -> None:
    with pytest.raises(KmsError, match=r"MAC key.*kms hsm init") as caught:
        await open_hsm(settings_of(older_token))
    assert caught.value.reason is Reason.HSM_KEK_MISSING


def test_a_copy_without_the_mac_key_is_no_copy(older_token: SoftToken) -> None:
    with pytest.raises(KmsError, match="MAC key") as caught:
        provision.check_copy(settings_of(older_token))
    assert caught.value.reason is Reason.HSM_KEK_MISSING


def test_a_copy_of_the_token_directory_opens_its_canary(soft_token: SoftToken, enter_token: Callable[[SoftToken], None]) -> None:
    copy = soft_token.directory.with_name("copy")
    shutil.copytree(soft_token.directory, copy)
    original = provision.describe(settings_of(soft_token))
    copied = make_soft_token(copy, LABEL)
    enter_token(copied)
    assert provision.check_copy(settings_of(copied)) == original


def test_a_token_without_keys_is_no_copy(blank_token: SoftToken) -> None:
    with pytest.raises(KmsError) as caught:
        provision.check_copy(settings_of(blank_token))
    assert caught.value.reason is Reason.HSM_KEK_MISSING


def test_a_copy_with_another_key_under_the_same_id_is_no_copy(blank_token: SoftToken) -> None:
    kek, sealing = KnownKey(), KnownKey()
    with session_on(blank_token) as session:
        put_kek(session, KnownKey(kek.key_id))
        put_sealing_key(session, sealing)
        put_mac_key(session, KnownKey())
        put_canary(session, kek, sealing)
    with pytest.raises(KmsError, match="canary") as caught:
        provision.check_copy(settings_of(blank_token))
    assert caught.value.reason is Reason.HSM_UNAVAILABLE


async def test_a_token_that_was_not_initialised_says_what_to_run(blank_token: SoftToken) -> None:
    with pytest.raises(KmsError, match="kms hsm init") as caught:
        await open_hsm(settings_of(blank_token))
    assert caught.value.reason is Reason.HSM_KEK_MISSING


@pytest.mark.parametrize("name", ["DECRYPT", "ENCRYPT", "SIGN", "DERIVE", "EXTRACTABLE", "MODIFIABLE", "COPYABLE"])
async def test_a_kek_that_could_do_more_than_wrap_is_not_used(blank_token: SoftToken, name: str) -> None:
    kek, sealing = KnownKey(), KnownKey()
    with session_on(blank_token) as session:
        put_kek(session, kek, **{name: True})
        put_sealing_key(session, sealing)
        put_canary(session, kek, sealing)
    with pytest.raises(KmsError, match=name) as caught:
        await open_hsm(settings_of(blank_token, start_attempts=1))
    assert caught.value.reason is Reason.HSM_UNAVAILABLE


@pytest.mark.parametrize("name", ["ENCRYPT", "WRAP", "DERIVE", "EXTRACTABLE", "MODIFIABLE", "COPYABLE"])
async def test_a_mac_key_that_could_do_more_is_not_used(older_token: SoftToken, name: str) -> None:
    with session_on(older_token) as session:
        put_mac_key(session, KnownKey(), **{name: True})
    with pytest.raises(KmsError, match=f"MAC key .*{name}") as caught:
        await open_hsm(settings_of(older_token, start_attempts=1))
    assert caught.value.reason is Reason.HSM_UNAVAILABLE


async def test_two_mac_keys_of_one_generation_are_refused(older_token: SoftToken) -> None:
    with session_on(older_token) as session:
        put_mac_key(session, KnownKey())
        put_mac_key(session, KnownKey())
    with pytest.raises(KmsError, match="one generation"):
        await open_hsm(settings_of(older_token, start_attempts=1))


@pytest.mark.parametrize("inline_p99_seconds", [0.0, 1.0])
async def test_a_mac_is_hmac_sha_256_under_the_newest_mac_key(
    older_token: SoftToken, opened: OpenHsm, enter_blank: Callable[[], None], inline_p99_seconds: float
) -> None:
    older, newest = KnownKey(), KnownKey()
    enter_blank()
    with session_on(older_token) as session:
        put_mac_key(session, newest, 2)
        put_mac_key(session, older, 1)
    hsm = await opened(pin=settings_of(older_token).pin, inline_p99_seconds=inline_p99_seconds)
    for data in (b"x", b"a body" * 1000):
        assert await hsm.mac(data) == hmac.digest(newest.value, data, "sha256")


async def test_a_token_that_lost_a_canary_is_not_used(blank_token: SoftToken) -> None:
    kek, sealing = KnownKey(), KnownKey()
    with session_on(blank_token) as session:
        put_kek(session, KnownKey())
        put_sealing_key(session, KnownKey())
        put_kek(session, kek, 2)
        put_sealing_key(session, sealing, 2)
        put_mac_key(session, KnownKey())
        put_canary(session, kek, sealing, 2)
    with pytest.raises(KmsError) as caught:
        await open_hsm(settings_of(blank_token))
    assert caught.value.reason is Reason.HSM_KEK_MISSING


@pytest.mark.parametrize("text", ["", "nonsense", "AAAA kcv:000000"])
async def test_a_damaged_canary_is_said_to_be_damaged(blank_token: SoftToken, text: str) -> None:
    kek, sealing = KnownKey(), KnownKey()
    prepare(blank_token, kek, sealing)
    with session_on(blank_token) as session:
        put_canary_text(session, text, 2)
    with pytest.raises(KmsError, match="canary 2") as caught:
        await open_hsm(settings_of(blank_token, start_attempts=1))
    assert caught.value.reason is Reason.HSM_UNAVAILABLE


async def test_two_keys_of_one_generation_are_refused(blank_token: SoftToken) -> None:
    kek, sealing = KnownKey(), KnownKey()
    prepare(blank_token, kek, sealing)
    with session_on(blank_token) as session:
        put_kek(session, KnownKey())
    with pytest.raises(KmsError, match="one generation"):
        await open_hsm(settings_of(blank_token, start_attempts=1))


async def test_a_wrong_pin_is_tried_once_and_shown_nowhere(soft_token: SoftToken, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts: list[HsmSettings] = []

    def counted(module: Module, settings: HsmSettings) -> connection.Connection:
        attempts.append(settings)
        return connection.connect(module, settings)

    monkeypatch.setattr(token_hsm, "connect", counted)
    settings = replace(settings_of(soft_token), pin=Secret(b"wrong-pin-1234"))
    assert "wrong-pin" not in repr(settings)
    with pytest.raises(KmsError, match="PIN is wrong") as caught:
        await open_hsm(settings)
    assert caught.value.reason is Reason.HSM_UNAVAILABLE
    assert "wrong-pin" not in repr(caught.value)
    assert len(attempts) == 1  # a token locks after a few
    hsm = await open_hsm(settings_of(soft_token))
    await hsm.close()


@pytest.mark.parametrize(("change", "words"), [({"token_label": "nobody's"}, "no token of the configured label")])
async def test_a_label_that_no_token_has_is_an_error(soft_token: SoftToken, change: dict[str, str], words: str) -> None:
    with pytest.raises(KmsError, match=words):
        await open_hsm(settings_of(soft_token, start_attempts=1, **change))


def test_objects_of_others_in_the_token_do_not_matter(soft_token: SoftToken, hsm_settings: HsmSettings) -> None:
    before = provision.check_copy(hsm_settings)
    with session_on(soft_token) as session:
        session.generate_key(pkcs11.KeyType.AES, 256, label="somebody else's", store=True)
        session.generate_key(pkcs11.KeyType.AES, 256, label="neo-kms kek 01", store=True)
    assert provision.check_copy(hsm_settings) == before


def test_opensc_sees_what_we_made(soft_token: SoftToken) -> None:
    command = ["pkcs11-tool", "--module", str(soft_token.module), "--token-label", LABEL, "-O", "--login"]
    pin = soft_token.pin_file.read_text()
    listing = subprocess.run([*command, "--pin", pin], capture_output=True, text=True, check=True).stdout
    assert listing.count("Secret Key Object; AES length 32") == 2
    assert listing.count("Secret Key Object; Generic secret length 32") == 1
    assert "neo-kms canary 1" in listing


def test_several_runs_at_once_make_one_set_of_keys(blank_token: SoftToken) -> None:
    config_file = blank_token.directory / "kms.toml"
    config_file.write_text(
        f'[hsm]\nmodule = "{blank_token.module}"\ntoken_label = "{blank_token.label}"\npin_file = "{blank_token.pin_file}"\n'
    )
    command = [sys.executable, "-m", "kms", "--config", str(config_file), "hsm", "init"]
    environment = {**os.environ, **blank_token.environment}
    runs = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(4)]
    said = [run.communicate(timeout=60)[1].decode() for run in runs]
    assert sorted(run.returncode for run in runs) == [0, 1, 1, 1], said
    assert len(provision.check_copy(settings_of(blank_token)).wrapping_keys) == 2
