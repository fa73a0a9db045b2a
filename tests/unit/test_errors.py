"""Errors on the wire, and secrets that stay unseen."""

import pickle
import re
from pathlib import Path

import pytest
from google.rpc import code_pb2, error_details_pb2

import kms
from kms.domain.errors import KmsError, Reason
from kms.domain.secret import Secret
from kms.rpc.status import code_of, internal_status, status_of


@pytest.mark.parametrize("reason", Reason)
def test_every_reason_has_a_code_and_none_is_internal(reason: Reason) -> None:
    assert code_of(reason) not in (code_pb2.OK, code_pb2.INTERNAL)


def test_a_status_carries_reason_domain_and_metadata() -> None:
    status = status_of(KmsError(Reason.MALFORMED, "name: expected something", field="name"))
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert (info.reason, info.domain, dict(info.metadata)) == ("MALFORMED", "kms", {"field": "name"})


def test_a_bug_is_told_as_its_request_id_alone() -> None:
    status = internal_status("abc")
    assert (status.code, status.message) == (code_pb2.INTERNAL, "internal error")


def test_abort_is_called_in_one_place() -> None:
    # An abort that is not awaited sends OK with the response; one place can be looked at.
    sources = Path(str(kms.__file__)).parent.rglob("*.py")
    calls = [str(path.name) for path in sources for _ in re.findall(r"context\.abort(?:_with_status)?\(", path.read_text())]
    assert calls == ["status.py"]


def test_a_secret_does_not_show_itself() -> None:
    secret = Secret(b"hunter2")
    assert "hunter2" not in f"{secret} {secret!r} {[secret]}"
    assert secret == Secret(b"hunter2")
    assert secret != Secret(b"hunter3")
    with pytest.raises(TypeError):
        pickle.dumps(secret)
    with pytest.raises(TypeError):
        hash(secret)
