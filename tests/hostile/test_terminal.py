"""Nothing that a server sends, or that an old row holds, steers the terminal on which it is shown.

The server here is an attacker's: every text in each of its answers and errors is hostile. The service is a real one whose trail
holds a row from before texts were checked.
"""

import json
import os
import pty
import subprocess
import sys
import unicodedata
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import grpc
import psycopg
import pytest
import structlog
from google.protobuf import any_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from kms.cli.invocation import Invocation
from kms.domain.errors import KmsError, Reason
from kms.domain.ids import identity_uri
from kms.pki.authority import issue_client, issue_server, make_authority
from kms.v1 import audit_pb2
from kms.wiring.log import configure_log
from tests.cli.running import Ended, run_kms
from tests.fixtures.server import DEPLOYMENT, RunningServer
from tests.hostile.test_fields import METHODS
from tests.hostile.values import HIDDEN

HOSTILE: Final = "harmless" + "".join(HIDDEN.values()) + "\x1b]0;title\x07\x9b2Jend"
ESCAPED: Final = ("\\u001b", "\\u009b", "\\u202e", "\\u2028", "\\udb40\\udc01")
# What is parsed by the client, or decides how it goes on.
PARSED: Final[dict[str, str]] = {
    "details_json": json.dumps({"request_id": HOSTILE, HOSTILE: [HOSTILE]}, ensure_ascii=False),
    "next_page_token": "",
    "next_after": "",
}
DIFFERENCES: Final = {"TrailFinding": "ROW_CHANGED", "KeyFinding": "KEY_DIFFERS"}
OUT: Final = {
    "key list": ("key", "list"),
    "key show": ("key", "show", "k"),
    "key create": ("key", "create", "k", "--type", "aes"),
    "key revoke": ("key", "revoke", "k", "--reason", "test"),
    "audit search": ("audit", "search"),
    "audit verify": ("audit", "verify"),
    "status": ("status",),
    "sign": ("sign", "k", "--message", "m"),
    "decrypt": ("decrypt", "--in", "CIPHERTEXT", "--out", "PLAINTEXT"),
    "verify": ("verify", "k", "--message", "m", "--signature-hex", "00"),
}


def steering(text: str) -> list[str]:
    """Return the characters of *text* that steer a terminal or cannot be seen; here said once more, without our own rule."""
    found = (character for character in text if character not in "\n\t")
    return [c for c in found if unicodedata.category(c)[0] == "C" or unicodedata.category(c) in ("Zl", "Zp")]


def _filled(descriptor: Descriptor) -> Message:
    """Return a message with every field set, each text being hostile."""
    message = GetMessageClass(descriptor)()
    for field in descriptor.fields:
        inner = field.message_type
        if inner is not None and inner.GetOptions().map_entry:
            getattr(message, field.name)[HOSTILE] = HOSTILE
        elif inner is not None and inner.name in ("Timestamp", "Status"):
            continue
        elif inner is not None and field.is_repeated:
            getattr(message, field.name).append(_filled(inner))
        elif inner is not None:
            getattr(message, field.name).CopyFrom(_filled(inner))
        elif field.is_repeated:
            getattr(message, field.name).append(_value(descriptor, field))
        else:
            setattr(message, field.name, _value(descriptor, field))
    return message


def _value(descriptor: Descriptor, field: FieldDescriptor) -> Any:  # noqa: ANN401 - of the field's type
    if field.type == FieldDescriptor.TYPE_STRING:
        return DIFFERENCES[descriptor.name] if field.name == "difference" else PARSED.get(field.name, HOSTILE)
    return HOSTILE.encode() if field.type == FieldDescriptor.TYPE_BYTES else 1


def _error() -> Any:  # noqa: ANN401 - what grpc's stubs do not name
    detail = any_pb2.Any()
    detail.Pack(error_details_pb2.ErrorInfo(reason=HOSTILE, domain="kms", metadata={HOSTILE: HOSTILE}))
    return rpc_status.to_status(status_pb2.Status(code=code_pb2.INVALID_ARGUMENT, message=HOSTILE, details=[detail]))


if TYPE_CHECKING:  # generic in the stubs only
    _Handler = grpc.GenericRpcHandler[Any, Any]
else:
    _Handler = grpc.GenericRpcHandler


class _Attacker(_Handler):
    """Answers every method of ours with hostile texts, and every call for the key `refused` with a hostile error."""

    def service(self, handler_call_details: Any) -> Any:  # noqa: ANN401 - as grpc has it
        path = handler_call_details.method
        method = next(each for each in METHODS if path == f"/{each.containing_service.full_name}/{each.name}")
        answer = _filled(method.output_type).SerializeToString()

        def unary(body: bytes, context: Any) -> bytes:  # noqa: ANN401 - as grpc has it
            if b"refused" in body:
                context.abort_with_status(_error())
            return answer

        def stream(_: bytes, context: Any) -> Iterator[bytes]:  # noqa: ANN401 - as grpc has it
            yield answer
            context.abort_with_status(_error())

        if method.server_streaming:
            return grpc.unary_stream_rpc_method_handler(stream)
        return grpc.unary_unary_rpc_method_handler(unary)


@contextmanager
def _attacking(directory: Path) -> Iterator[Path]:
    """Run the attacker's server, and yield a client's configuration that leads to it."""
    now = datetime.now(UTC)
    authority = make_authority(directory, now=now)
    issue_server(authority, ["localhost"], now=now).write(directory / "server.crt", directory / "server.key")
    issue_client(authority, "kms://test/user/x", now=now).write(directory / "client.crt", directory / "client.key")
    server = grpc.server(ThreadPoolExecutor(4))
    server.add_generic_rpc_handlers((_Attacker(),))
    pair = ((directory / "server.key").read_bytes(), (directory / "server.crt").read_bytes())
    port = server.add_secure_port("localhost:0", grpc.ssl_server_credentials([pair]))
    server.start()
    config = directory / "client.toml"
    config.write_text(
        f'[client]\nserver = "localhost:{port}"\nca_file = "authority.crt"\ncert_file = "client.crt"\nkey_file = "client.key"\n'
    )
    try:
        yield config
    finally:
        server.stop(None).wait()


@pytest.fixture(scope="module")
def attacker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with _attacking(tmp_path_factory.mktemp("attacker")) as config:
        yield config


def _arguments(name: str, directory: Path) -> list[str]:
    (directory / "ciphertext").write_bytes(b"c")
    given = {"CIPHERTEXT": str(directory / "ciphertext"), "PLAINTEXT": str(directory / "plaintext")}
    return [given.get(each, each) for each in OUT[name]]


def _check_shown(shown: str) -> None:
    assert steering(shown) == []
    for escape in ESCAPED:
        assert escape in shown, (escape, shown)


def _on_terminal(config: Path, *arguments: str) -> tuple[str, str]:
    """Run `kms` with a terminal as standard output and standard error; return what both show."""
    ours, terminal = pty.openpty()
    command = [sys.executable, "-m", "kms", "--config", str(config), *arguments]
    # To a dumb terminal rich sends no control sequences of its own. It takes a width only together with a height.
    environment = {**os.environ, "COLUMNS": "5000", "LINES": "100", "TERM": "dumb", "NO_COLOR": "1"}
    ended = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=terminal, stderr=subprocess.PIPE, env=environment)
    os.close(terminal)
    shown = bytearray()
    try:
        while piece := os.read(ours, 65_536):
            shown += piece
    except OSError:  # how a terminal says that nobody writes to it any more
        pass
    os.close(ours)
    assert ended.stderr is not None
    with ended:
        errors = ended.stderr.read().decode()
    return shown.decode().replace("\r\n", "\n"), errors


@pytest.mark.parametrize("name", [name for name in OUT if name not in ("sign", "decrypt", "verify")])
def test_what_a_server_answers_is_escaped_for_people(attacker: Path, tmp_path: Path, name: str) -> None:
    ended = run_kms("--config", attacker, *_arguments(name, tmp_path))
    assert steering(ended.err) == []
    _check_shown(ended.out.decode())


@pytest.mark.parametrize("name", OUT)
def test_what_a_server_answers_is_escaped_in_json_and_means_the_same(attacker: Path, tmp_path: Path, name: str) -> None:
    ended = run_kms("--config", attacker, *_arguments(name, tmp_path), "--json")
    _check_shown(ended.out.decode())
    assert HOSTILE in _texts(ended.json)


def _texts(value: Any) -> set[str]:  # noqa: ANN401 - JSON
    if isinstance(value, dict):
        return {*value, *(text for each in value.values() for text in _texts(each))}
    if isinstance(value, list):
        return {text for each in value for text in _texts(each)}
    return {str(value)}


@pytest.mark.parametrize("arguments", [("key", "list"), ("audit", "search"), ("key", "public", "k"), ("key", "show", "k")])
def test_what_a_server_answers_is_escaped_on_a_terminal(attacker: Path, arguments: tuple[str, ...]) -> None:
    shown, errors = _on_terminal(attacker, *arguments)
    assert errors == ""
    _check_shown(shown)


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_an_error_of_a_server_is_one_escaped_line(attacker: Path, form: tuple[str, ...]) -> None:
    ended: Ended = run_kms("--config", attacker, "key", "show", "refused", *form)
    assert (ended.code, ended.out) == (1, b"")
    assert ended.err.count("\n") == 1
    _check_shown(ended.err)
    if form:
        assert (ended.failure["message"], ended.failure["metadata"]) == (HOSTILE, {HOSTILE: HOSTILE})


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_a_followed_trail_is_escaped_line_by_line(attacker: Path, form: tuple[str, ...]) -> None:
    ended = run_kms("--config", attacker, "audit", "tail", *form)
    shown = ended.out.decode()
    assert shown.count("\n") == 1
    _check_shown(shown)
    _check_shown(ended.err)


@pytest.mark.parametrize(
    "arguments",
    [
        ("key", "show", "a\udc9b"),
        ("key", "create", "k", "--type", "aes", "--metadata", "a\udc9b=b"),
        ("key", "revoke", "k", "--reason", "\udc9b2J"),
        ("audit", "search", "--action", "\udcff"),
        ("audit", "search", "--since", "0001-01-01T00:00:00+1400"),
        ("key", "deactivate", "k", "--version", str(2**63)),
        ("key", "create", "k", "--type", "a\x1b\x9b"),
        ("key", "\x9b2J"),
    ],
    ids=ascii,
)
def test_a_hostile_argument_is_a_usage_error_of_one_line(attacker: Path, arguments: tuple[str, ...]) -> None:
    ended = run_kms("--config", attacker, *arguments)
    assert (ended.code, ended.out, ended.err.count("\n")) == (2, b"", 1)
    assert steering(ended.err) == []


def test_an_old_row_of_the_trail_is_escaped_and_means_the_same(server: RunningServer, tmp_path: Path) -> None:
    # jsonb holds every character except NUL, and so did the trail before texts were checked.
    text, action = HOSTILE.replace("\x00", ""), f"old-{uuid.uuid4()}"
    event_type = f"key.{HOSTILE.replace(chr(0), '')[:40]}"
    insert = """INSERT INTO audit.security_events (event_type, severity, action, outcome, event_details)
        VALUES (%s, 'low', %s, 'success', %s)"""
    with psycopg.connect(server.deployment.database.admin_dsn, autocommit=True) as connection:
        details = json.dumps({"request_id": text, "reason": text})
        connection.execute(insert, (event_type, action, details))
    user = server.deployment.new_user(role="auditor")
    server.deployment.certificate(identity_uri(DEPLOYMENT, user)).write(tmp_path / "client.crt", tmp_path / "client.key")
    config = tmp_path / "client.toml"
    config.write_text(
        f'[client]\nserver = "{server.address}"\nca_file = "{server.deployment.directory / "authority.crt"}"\n'
        'cert_file = "client.crt"\nkey_file = "client.key"\n'
    )
    search = ("--config", config, "audit", "search", "--action", action)
    _check_shown(run_kms(*search).out.decode())
    ended = run_kms(*search, "--json")
    _check_shown(ended.out.decode())
    (event,) = ended.json["events"]
    assert (event["event_type"], event["details"]["reason"]) == (event_type, text)
    raw = server.auditor().audit.SearchEvents
    (found,) = raw(audit_pb2.SearchEventsRequest(action=action), timeout=15).events
    _check_shown(found.details_json)


def test_the_log_of_the_service_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    written = StringIO()
    monkeypatch.setattr(sys, "stderr", written)
    try:
        configure_log("info")
        structlog.get_logger("hostile").warning(HOSTILE, value=HOSTILE, error=KmsError(Reason.MALFORMED, HOSTILE))
    finally:
        structlog.reset_defaults()
    assert written.getvalue().count("\n") == 1
    _check_shown(written.getvalue())
    assert json.loads(written.getvalue())["value"] == HOSTILE


def test_what_a_part_of_the_service_logs_beside_an_operators_command_is_escaped(
    capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    before = structlog.get_config()
    request.addfinalizer(lambda: structlog.configure(**before))
    Invocation().operator_config()
    structlog.get_logger("operator").warning("key not destroyed", reason=HOSTILE)
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    _check_shown(shown)


def test_a_traceback_is_escaped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "bug.py"
    script.write_text(
        "from kms.cli import main\n"
        f"def fail(*_: object) -> None:\n    raise RuntimeError({HOSTILE!a})\n"
        "main.typer.main.get_command = fail\nmain.main(['version'])\n"
    )
    ended = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == 1
    assert "Traceback" in ended.stderr
    _check_shown(ended.stderr)
