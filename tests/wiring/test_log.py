"""Nothing secret is in the log, whatever somebody logs."""

import json
import logging
import sys
import threading
from collections.abc import Iterator
from io import StringIO

import pytest
import structlog
from pydantic import SecretStr

from kms.domain.keys import Custody, KeyMaterial
from kms.domain.secret import Secret
from kms.wiring.log import configure_log

HIDDEN = "correct-horse"


@pytest.fixture
def stderr(monkeypatch: pytest.MonkeyPatch) -> Iterator[StringIO]:
    """What the log writes to, configured as the service does."""
    handlers, level, written = logging.root.handlers[:], logging.root.level, StringIO()
    monkeypatch.setattr(sys, "stderr", written)
    for module, hook in ((sys, "unraisablehook"), (threading, "excepthook")):
        monkeypatch.setattr(module, hook, getattr(module, hook))  # put back at the end
    configure_log("info")
    yield written
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


def logged(stderr: StringIO, **values: object) -> str:
    try:
        raise ValueError(f"connecting to postgresql://kms_service:{HIDDEN}@db/kms failed")
    except ValueError:
        structlog.get_logger("other").exception("event", **values)
    return stderr.getvalue()


@pytest.mark.parametrize(
    "value",
    [
        Secret(HIDDEN.encode()),
        SecretStr(HIDDEN),
        KeyMaterial(Custody.WRAPPED, "public", HIDDEN),
        HIDDEN.encode(),
        [Secret(HIDDEN.encode()), HIDDEN.encode()],
        {"pin": HIDDEN, "inner": {"dsn": HIDDEN}},
        f"host=db user=kms_service password={HIDDEN} dbname=kms",
        f"host=db password = '{HIDDEN} and more' dbname=kms",
        f"postgresql://kms_service:{HIDDEN}@db/kms",
        f"postgresql://db/kms?user=kms_service&password={HIDDEN}",
        ConnectionError(f"password={HIDDEN}"),
    ],
)
def test_a_secret_that_is_logged_is_not_in_the_line(stderr: StringIO, value: object) -> None:
    line = logged(stderr, value=value, pin=HIDDEN)
    assert HIDDEN not in line
    assert "and more" not in line
    assert json.loads(line)["event"] == "event"


def test_what_is_no_secret_is_in_the_line_as_it_is(stderr: StringIO) -> None:
    structlog.contextvars.bind_contextvars(request_id="order-1")
    structlog.get_logger("other").info("call", method="CryptoService/Sign", milliseconds=1.5, user=None, ok=True, names=["a"])
    line = json.loads(stderr.getvalue())
    line.pop("timestamp")
    assert line == {
        "event": "call",
        "level": "info",
        "request_id": "order-1",
        "method": "CryptoService/Sign",
        "milliseconds": 1.5,
        "user": None,
        "ok": True,
        "names": ["a"],
    }


class _Failing:
    def __del__(self) -> None:
        raise ValueError(f"password={HIDDEN}")


def test_an_exception_that_nobody_can_catch_is_a_line_of_the_log(stderr: StringIO) -> None:
    _Failing()
    line = json.loads(stderr.getvalue())
    assert (line["event"], line["level"]) == ("exception ignored", "warning")
    assert "_Failing.__del__" in line["at"]
    assert line["exception"].endswith("ValueError: password=<redacted>")


def test_an_exception_that_ends_a_thread_is_a_line_of_the_log(stderr: StringIO) -> None:
    def fail() -> None:
        raise ValueError("why")

    thread = threading.Thread(target=fail, name="lane")
    thread.start()
    thread.join()
    line = json.loads(stderr.getvalue())
    assert (line["event"], line["level"], line["thread"]) == ("a thread has ended", "error", "lane")
    assert line["exception"].endswith("ValueError: why")
