"""The client commands against a real server: what they print, write and end with."""

import base64
import json
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from coincurve import PublicKey
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa

from kms.cli.client import Client
from kms.domain.ids import UserId, identity_uri
from kms.v1.crypto_pb2 import GenerateDataKeyRequest
from tests.cli.conftest import NewConfig
from tests.cli.running import Ended, Kms
from tests.fixtures.server import DEPLOYMENT, RunningServer

MESSAGE = "pay 5 to Bob"
SECRET = b"\x00\xff a secret \xfe of any bytes\n"


def made(as_user: Kms, name: str, key_type: str, *options: object) -> str:
    """Make a key and return its id."""
    ended = as_user("key", "create", name, "--type", key_type, "--json", *options)
    assert ended.code == 0, ended.err
    return str(ended.json["id"])


def test_a_key_is_created_listed_and_shown_in_one_shape(as_ada: Kms) -> None:
    created = as_ada("key", "create", "payments", "--type", "secp256k1", "--metadata", "team=billing", "--json").json
    assert {name: created[name] for name in ("name", "type", "purpose", "size_bits", "state", "usage_count", "metadata")} == {
        "name": "payments",
        "type": "secp256k1",
        "purpose": "signing",
        "size_bits": 256,
        "state": "active",
        "usage_count": 0,
        "metadata": {"team": "billing"},
    }
    assert created["custody"] in {"SEALED", "WRAPPED"}
    assert created["public_key_pem"].startswith("-----BEGIN PUBLIC KEY-----")
    assert as_ada("key", "show", "payments", "--json").json == created
    assert as_ada("key", "show", created["id"], "--json").json == created
    assert as_ada("key", "list", "--json").json == {"keys": [created]}


def test_an_aes_key_encrypts_by_default_and_shows_its_check_value(as_ada: Kms) -> None:
    created = as_ada("key", "create", "backups", "--type", "aes", "--json").json
    assert (created["purpose"], created["size_bits"], len(created["check_value"])) == ("encryption", 256, 6)
    assert "public_key_pem" not in created


def test_a_list_into_a_pipe_is_one_line_of_tabs_for_each_key(as_ada: Kms) -> None:
    for name, key_type in (("b", "aes"), ("a", "ed25519"), ("pay/1", "aes")):
        made(as_ada, name, key_type)
    rows = [line.split("\t") for line in as_ada("key", "list").out.decode().splitlines()]
    assert [row[:4] for row in rows] == [
        ["a", "ed25519", "256", "signing"],
        ["b", "aes", "256", "encryption"],
        ["pay/1", "aes", "256", "encryption"],
    ]
    assert [key["name"] for key in as_ada("key", "list", "--type", "aes", "--json").json["keys"]] == ["b", "pay/1"]
    assert [key["name"] for key in as_ada("key", "list", "--prefix", "pay", "--json").json["keys"]] == ["pay/1"]
    assert [key["name"] for key in as_ada("key", "list", "--limit", "2", "--json").json["keys"]] == ["a", "b"]


def test_all_pages_of_a_list_are_fetched(as_ada: Kms, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kms.cli.keys._PAGE", 2)
    for number in range(5):
        made(as_ada, f"k{number}", "ed25519")
    assert [key["name"] for key in as_ada("key", "list", "--json").json["keys"]] == [f"k{number}" for number in range(5)]
    assert len(as_ada("key", "list", "--limit", "3", "--json").json["keys"]) == 3


def test_a_public_key_is_written_as_pem_and_as_der(as_ada: Kms, tmp_path: Path) -> None:
    key_id = made(as_ada, "web", "secp256r1")
    pem = as_ada("key", "public", "web").out
    der_file = tmp_path / "web.der"
    assert as_ada("key", "public", "web", "--format", "der", "--out", der_file).out == b""
    assert serialization.load_der_public_key(der_file.read_bytes()) == serialization.load_pem_public_key(pem)
    assert as_ada("key", "public", "web", "--json").json == {"key_id": key_id, "public_key_pem": pem.decode()}
    assert base64.b64decode(as_ada("key", "public", "web", "--format", "der", "--json").json["public_key_der"]) == (
        der_file.read_bytes()
    )


def test_a_signature_goes_raw_into_a_pipe_and_verifies_from_a_file(as_ada: Kms, tmp_path: Path) -> None:
    made(as_ada, "web", "secp256r1")
    signature = as_ada("sign", "web", stdin=MESSAGE.encode()).out
    key = serialization.load_pem_public_key(as_ada("key", "public", "web").out)
    assert isinstance(key, ec.EllipticCurvePublicKey)
    key.verify(signature, MESSAGE.encode(), ec.ECDSA(hashes.SHA256()))
    file = tmp_path / "signature"
    file.write_bytes(signature)
    valid = as_ada("verify", "web", "--message", MESSAGE, "--signature", file)
    assert (valid.code, valid.out) == (0, b"valid\n")
    assert as_ada("verify", "web", "--message", MESSAGE, "--signature", "-", stdin=signature).code == 0
    assert as_ada("verify", "web", "--message", MESSAGE, "--signature-hex", signature.hex()).code == 0
    assert as_ada("verify", "web", "--message", MESSAGE, "--signature-base64", base64.b64encode(signature).decode()).code == 0


def test_a_signature_that_does_not_match_ends_with_6(as_ada: Kms) -> None:
    key_id = made(as_ada, "release", "ed25519")
    signature = as_ada("sign", "release", "--message", MESSAGE, "--encoding", "hex").out.decode().strip()
    ended = as_ada("verify", "release", "--message", "pay 50 to Bob", "--signature-hex", signature)
    assert (ended.code, ended.out, ended.err) == (6, b"not valid\n", "")
    ended = as_ada("verify", "release", "--message", "pay 50 to Bob", "--signature-hex", signature, "--json")
    assert (ended.code, ended.json) == (6, {"key_id": key_id, "valid": False})


def test_a_signature_that_has_no_form_is_refused_and_not_called_invalid(as_ada: Kms) -> None:
    made(as_ada, "web", "secp256r1")
    ended = as_ada("verify", "web", "--message", MESSAGE, "--signature-hex", "00")
    assert ended.code == 1
    assert ended.err.startswith("kms: MALFORMED: ")


def test_a_recoverable_signature_of_a_digest_recovers_to_the_key(as_ada: Kms) -> None:
    made(as_ada, "eth", "secp256k1")
    digest = bytes(range(32))
    options = ("--digest", digest.hex(), "--hash", "keccak-256", "--format", "recoverable")
    found = as_ada("sign", "eth", *options, "--json").json
    assert (found["scheme"], found["hash"], found["encoding"]) == ("ecdsa", "keccak-256", "base64")
    key = serialization.load_pem_public_key(as_ada("key", "public", "eth").out)
    point = key.public_bytes(serialization.Encoding.X962, serialization.PublicFormat.CompressedPoint)
    recovered = PublicKey.from_signature_and_message(base64.b64decode(found["signature"]), digest, hasher=None)
    assert recovered.format() == point
    assert as_ada("verify", "eth", *options, "--signature-base64", found["signature"]).code == 0


@pytest.mark.parametrize("encoding", ["raw", "base64", "hex"])
def test_what_was_encrypted_decrypts_from_every_encoding(as_ada: Kms, tmp_path: Path, encoding: str) -> None:
    made(as_ada, "backups", "aes")
    sealed = tmp_path / "sealed"
    assert as_ada("encrypt", "backups", "--aad", "row", "--encoding", encoding, "--out", sealed, stdin=SECRET).code == 0
    opened = as_ada("decrypt", "--in", sealed, "--in-encoding", encoding, "--aad-hex", b"row".hex())
    assert (opened.code, opened.out, opened.err) == (0, SECRET, "")


def test_bytes_pass_through_pipes_unchanged(as_ada: Kms) -> None:
    made(as_ada, "backups", "aes")
    every_byte = bytes(range(256)) + b"\r\n"
    sealed = as_ada("encrypt", "backups", "--in", "-", stdin=every_byte).out
    assert as_ada("decrypt", "--in", "-", stdin=sealed).out == every_byte


def test_a_decrypted_file_is_private_and_replaces_the_old_one_whole(as_ada: Kms, tmp_path: Path) -> None:
    made(as_ada, "backups", "aes")
    sealed = as_ada("encrypt", "backups", stdin=SECRET).out
    clear = tmp_path / "clear"
    clear.write_text("old")
    clear.chmod(0o644)
    assert as_ada("decrypt", "--out", clear, stdin=sealed).out == b""
    assert clear.read_bytes() == SECRET
    assert stat.S_IMODE(clear.stat().st_mode) == 0o600
    assert as_ada("decrypt", "--out", clear, stdin=sealed[:-1]).code == 1
    assert clear.read_bytes() == SECRET
    assert [path.name for path in tmp_path.iterdir()] == ["clear"]


def test_a_damaged_ciphertext_ends_with_1_and_writes_nothing(as_ada: Kms, tmp_path: Path) -> None:
    made(as_ada, "backups", "aes")
    sealed = as_ada("encrypt", "backups", stdin=SECRET).out
    ended = as_ada("decrypt", "--out", tmp_path / "clear", stdin=sealed[:-1] + bytes((sealed[-1] ^ 1,)))
    assert (ended.code, ended.out) == (1, b"")
    assert ended.err.startswith("kms: CIPHERTEXT_INVALID: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("state", "move"), [("compromised", "compromise"), ("revoked", "revoke")])
def test_what_a_compromised_or_revoked_key_protects_is_moved_to_another_by_who_has_the_role(
    kms: Kms, server: RunningServer, tmp_path: Path, state: str, move: str
) -> None:
    out = tmp_path / "rescuer"
    name = f"rescuer-{state}"
    add = ("--config", server.deployment.config_file, "user", "add-service", name, "--role", "recovery", "--out", out)
    assert kms(*add, "--server", server.address).code == 0

    def as_rescuer(*arguments: object, stdin: bytes = b"") -> Ended:
        return kms("--config", out / "client.toml", *arguments, stdin=stdin)

    for key in ("old", "new"):
        made(as_rescuer, key, "aes")
    sealed = as_rescuer("encrypt", "old", stdin=SECRET).out
    assert as_rescuer("key", move, "old", "--reason", "seen elsewhere").code == 0
    refused = as_rescuer("decrypt", "--json", stdin=sealed)
    assert (refused.code, refused.failure["reason"]) == (1, f"KEY_{state.upper()}")
    opened = as_rescuer("decrypt", f"--allow-{state}", stdin=sealed)
    assert opened.out == SECRET
    moved = as_rescuer("encrypt", "new", stdin=opened.out).out
    assert as_rescuer("decrypt", stdin=moved).out == SECRET


def test_without_the_role_the_flag_that_a_key_asks_for_is_not_permitted(as_ada: Kms) -> None:
    made(as_ada, "old", "aes")
    sealed = as_ada("encrypt", "old", stdin=SECRET).out
    as_ada("key", "revoke", "old", "--reason", "left")
    refused = as_ada("decrypt", "--allow-revoked", "--json", stdin=sealed)
    assert (refused.code, refused.failure["metadata"]) == (4, {"permission": "keys:use-revoked"})


def test_rsa_made_elsewhere_decrypts(as_ada: Kms) -> None:
    made(as_ada, "inbox", "rsa", "--purpose", "encryption")
    key = serialization.load_pem_public_key(as_ada("key", "public", "inbox").out)
    assert isinstance(key, rsa.RSAPublicKey)
    sha1 = hashes.SHA1()  # noqa: S303 - the only one that SoftHSM decrypts with
    bare = key.encrypt(SECRET, padding.OAEP(padding.MGF1(sha1), sha1, None))
    assert as_ada("decrypt", "--raw-oaep", "--key", "inbox", "--oaep-hash", "sha-1", stdin=bare).out == SECRET


def test_a_data_key_stays_wrapped_unless_asked_for(as_ada: Kms, tmp_path: Path) -> None:
    made(as_ada, "backups", "aes")
    found = as_ada("datakey", "backups", "--json").json
    assert found.keys() == {"key_id", "ciphertext", "encoding"}
    wrapped, clear = tmp_path / "key.kms", tmp_path / "key"
    ended = as_ada("datakey", "backups", "--size", "16", "--aad", "x", "--out", wrapped, "--plaintext-out", clear)
    assert (ended.code, ended.out, ended.err) == (0, b"", "")
    assert len(clear.read_bytes()) == 16
    assert stat.S_IMODE(clear.stat().st_mode) == 0o600
    assert as_ada("decrypt", "--in", wrapped, "--aad", "x").out == clear.read_bytes()


def test_a_data_key_that_was_not_asked_for_does_not_leave_the_server(as_ada: Kms, monkeypatch: pytest.MonkeyPatch) -> None:
    made(as_ada, "backups", "aes")
    requests: list[GenerateDataKeyRequest] = []
    call = Client.call

    def recorded(client: Client, method: Any, request: Any) -> Any:  # noqa: ANN401 - of every call
        requests.append(request)
        return call(client, method, request)

    monkeypatch.setattr(Client, "call", recorded)
    assert as_ada("datakey", "backups").code == 0
    assert [request.without_plaintext for request in requests] == [True]


def test_a_data_key_in_the_clear_comes_alone_on_standard_output(as_ada: Kms, tmp_path: Path) -> None:
    made(as_ada, "backups", "aes")
    wrapped = tmp_path / "key.kms"
    ended = as_ada("datakey", "backups", "--out", wrapped, "--plaintext-out", "-")
    assert ended.out == as_ada("decrypt", "--in", wrapped).out
    assert len(ended.out) == 32
    found = as_ada("datakey", "backups", "--plaintext-out", "-", "--json").json
    assert as_ada("decrypt", stdin=base64.b64decode(found["ciphertext"])).out == base64.b64decode(found["plaintext"])


def test_random_bytes_have_the_length_asked_for(as_ada: Kms) -> None:
    assert len(as_ada("random", "100").out) == 100
    assert len(bytes.fromhex(as_ada("random", "100", "--encoding", "hex").out.decode())) == 100
    assert len(base64.b64decode(as_ada("random", "100", "--json").json["random"])) == 100


def test_json_of_every_answer_is_one_object_on_standard_output(as_ada: Kms, tmp_path: Path) -> None:
    made(as_ada, "s", "ed25519")
    made(as_ada, "e", "aes")
    sealed = as_ada("encrypt", "e", "--message", "m", "--json").json
    assert sealed.keys() == {"key_id", "ciphertext", "encoding"}
    opened = as_ada("decrypt", "--in-encoding", "base64", "--json", stdin=sealed["ciphertext"].encode()).json
    assert set(opened) == {"key_id", "plaintext", "encoding"}
    assert base64.b64decode(opened["plaintext"]) == b"m"
    assert as_ada("sign", "s", "--message", "m", "--json").json.keys() == {"key_id", "scheme", "hash", "signature", "encoding"}
    out = tmp_path / "out"
    assert as_ada("sign", "s", "--message", "m", "--out", out, "--json").json["signature_file"] == str(out)
    assert len(out.read_bytes()) == 64


def test_a_key_that_is_not_there_ends_with_3(as_ada: Kms) -> None:
    ended = as_ada("key", "show", "nothing")
    assert (ended.code, ended.out, ended.err) == (3, b"", "kms: KEY_NOT_FOUND: you have no such key\n")
    failure = as_ada("sign", "nothing", "--message", "m", "--json").failure
    assert failure == {"code": "NOT_FOUND", "reason": "KEY_NOT_FOUND", "message": "you have no such key", "metadata": {}}


def test_anothers_key_is_not_there_either(as_ada: Kms, kms: Kms, new_config: NewConfig) -> None:
    key_id = made(as_ada, "mine", "ed25519")
    of_bob = new_config()
    assert kms("--config", of_bob, "key", "show", key_id).code == 3
    assert kms("--config", of_bob, "key", "list", "--json").json == {"keys": []}


def test_a_refusal_ends_with_1_and_carries_its_metadata(as_ada: Kms) -> None:
    made(as_ada, "twice", "ed25519")
    ended = as_ada("key", "create", "twice", "--type", "aes", "--json")
    assert (ended.code, ended.out) == (1, b"")
    assert ended.failure.keys() == {"code", "reason", "message", "metadata"}
    assert (ended.failure["code"], ended.failure["reason"], ended.failure["metadata"]) == (
        "ALREADY_EXISTS",
        "NAME_TAKEN",
        {"field": "name"},
    )


def test_a_message_that_is_too_long_is_refused_before_it_is_sent(as_ada: Kms) -> None:
    ended = as_ada("sign", "any", stdin=bytes(65_537))
    assert ended.code == 1
    assert "sign its digest" in ended.err


def test_a_file_that_cannot_be_read_or_written_is_named(as_ada: Kms, tmp_path: Path) -> None:
    made(as_ada, "backups", "aes")
    ended = as_ada("encrypt", "backups", "--in", tmp_path / "absent")
    assert (ended.code, ended.err) == (1, f"kms: FILE: {tmp_path / 'absent'}: No such file or directory\n")
    ended = as_ada("encrypt", "backups", "--message", "m", "--out", tmp_path / "no" / "file")
    assert (ended.code, ended.err) == (1, f"kms: FILE: {tmp_path / 'no' / 'file'}: No such file or directory\n")


def test_a_server_that_is_not_there_ends_with_5(kms: Kms, new_config: NewConfig) -> None:
    nobody = "127.0.0.1:1"
    ended = kms("--config", new_config(nobody), "key", "list", "--json")
    assert ended.code == 5
    assert (ended.failure["code"], ended.failure["reason"]) == ("UNAVAILABLE", "SERVER_UNAVAILABLE")
    assert nobody in ended.failure["message"]


def test_a_whole_pipeline_of_processes_keeps_bytes_and_says_nothing_else(as_ada: Kms, ada: Path) -> None:
    made(as_ada, "backups", "aes")
    command = f"{sys.executable} -m kms --config {ada}"
    script = f"printf 'a\\0b' | {command} encrypt backups | {command} decrypt"
    ended = subprocess.run(["/bin/sh", "-c", script], capture_output=True, check=False, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, b"a\0b", b"")


def test_no_answer_but_the_one_asked_for_holds_a_plaintext(as_ada: Kms) -> None:
    made(as_ada, "backups", "aes")
    number = "4111-1111-1111-1111"
    outputs = [as_ada("encrypt", "backups", "--message", number), as_ada("encrypt", "backups", "--message", number, "--json")]
    outputs += [as_ada("encrypt", "absent", "--message", number), as_ada("key", "show", "backups")]
    for ended in outputs:
        assert number not in ended.err
        assert number.encode() not in ended.out
        assert base64.b64encode(number.encode()).rstrip(b"=") not in ended.out
    assert json.dumps(number) not in outputs[1].out.decode()


def test_a_caller_whose_user_is_unknown_ends_with_4(kms: Kms, server: RunningServer, ada: Path) -> None:
    issued = server.deployment.certificate(identity_uri(DEPLOYMENT, UserId(UUID(int=1))))
    for name in ("client.crt", "client.key"):
        (ada.parent / name).unlink()
    issued.write(ada.parent / "client.crt", ada.parent / "client.key")
    ended = kms("--config", ada, "key", "list")
    assert ended.code == 4
    assert ended.err.startswith("kms: CREDENTIALS_INVALID: ")


def test_a_certificate_that_is_none_ends_without_a_traceback(kms: Kms, ada: Path) -> None:
    (ada.parent / "client.crt").write_text("not a certificate")
    ended = kms("--config", ada, "key", "list")
    assert (ended.code, ended.err.count("\n")) == (5, 1)
    assert ended.err.startswith("kms: SERVER_UNAVAILABLE: ")
