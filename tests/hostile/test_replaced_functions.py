"""Functions of ours that a superuser replaces by ones that raise: calls that need them are refused, and none ends as a bug."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

import grpc
import pytest
from google.protobuf.message import Message

from kms.v1 import audit_pb2 as apb
from kms.v1 import crypto_pb2 as cpb
from kms.v1 import keys_pb2 as kpb
from kms.v1 import rotation_pb2 as rpb
from tests.conformance.refusals import refusal_of
from tests.conformance.requests import create, made
from tests.fixtures.server import Caller, RunningServer
from tests.hostile.conftest import Superuser

FUNCTIONS: Final = """
    SELECT p.oid::regproc::text AS name, pg_get_functiondef(p.oid) AS definition, format(
            'CREATE OR REPLACE FUNCTION %%s(%%s) RETURNS %%s LANGUAGE plpgsql AS '
            '$$ BEGIN RAISE EXCEPTION ''replaced'' USING ERRCODE = ''{}''; END $$',
            p.oid::regproc, pg_get_function_arguments(p.oid), pg_get_function_result(p.oid)
        ) AS replaced
    FROM pg_proc AS p
    WHERE p.pronamespace::regnamespace::text = ANY (%s) AND p.prokind = 'f'
"""
SCHEMAS: Final = ["audit", "authentication", "cryptography"]
# Of each class one: what a plain RAISE says, what our own functions say elsewhere, what PostgreSQL says by itself.
STATES: Final = ("P0001", "P0002", "22023", "23514", "28000", "40001", "42501", "42P01", "55000", "XX000")
CALLS: Final[dict[str, Callable[[Caller, Caller], tuple[Any, Message]]]] = {
    "Sign": lambda c, _: (c.crypto.Sign, cpb.SignRequest(key="s", message=b"m")),
    "Sign again": lambda c, _: (c.crypto.Sign, cpb.SignRequest(key="s", message=b"m", request_id="once")),
    "BatchSign": lambda c, _: (c.crypto.BatchSign, cpb.BatchSignRequest(items=[cpb.SignRequest(key="s", message=b"m")])),
    "Encrypt": lambda c, _: (c.crypto.Encrypt, cpb.EncryptRequest(key="e", plaintext=b"p")),
    "GetKey": lambda c, _: (c.keys.GetKey, kpb.GetKeyRequest(key="s")),
    "ListKeys": lambda c, _: (c.keys.ListKeys, kpb.ListKeysRequest()),
    "CreateKey": lambda c, _: (c.keys.CreateKey, create("aes", name="new")),
    "UpdateKey": lambda c, _: (c.keys.UpdateKey, kpb.UpdateKeyRequest(key="s", max_usage_count=1_000_000)),
    "RotateKey": lambda c, _: (c.rotation.RotateKey, rpb.RotateKeyRequest(key="e", reason="old", request_id="once")),
    "ListRotations": lambda c, _: (c.rotation.ListRotations, rpb.ListRotationsRequest()),
    "SearchEvents": lambda _, a: (a.audit.SearchEvents, apb.SearchEventsRequest()),
}
# The functions that calls need, each with one of them; the slow set replaces every function, and makes every call.
NEEDED: Final = {
    "authentication.find_user_by_uri": "GetKey",
    "authentication.current_user_id": "ListKeys",
    "cryptography.settle": "Sign",
    "cryptography.effective_status": "ListKeys",
    "cryptography.move_key": "UpdateKey",
    "cryptography.request_rotation": "RotateKey",
    "audit.append_event": "CreateKey",
    "audit.record_reading": "SearchEvents",
}


@pytest.fixture(scope="module")
def callers(attacked: RunningServer) -> tuple[Caller, Caller]:
    """Somebody with the keys s and e, and an auditor."""
    caller = attacked.caller()
    made(caller, "ed25519", name="s")
    made(caller, "aes", name="e")
    return caller, attacked.auditor()


@contextmanager
def replaced(superuser: Superuser, function: dict[str, Any]) -> Iterator[None]:
    superuser(function["replaced"])
    try:
        yield
    finally:
        superuser(function["definition"])


def functions(superuser: Superuser, state: str) -> list[dict[str, Any]]:
    return superuser(FUNCTIONS.replace("{}", state), parameters=(SCHEMAS,))


def outcome(call: Any, request: Message) -> str:  # noqa: ANN401
    try:
        call(request, timeout=30)
    except grpc.RpcError as error:
        return refusal_of(error).reason
    return "OK"


@pytest.mark.parametrize("state", STATES)
def test_a_function_that_raises_refuses_the_call_that_needs_it(
    superuser: Superuser, callers: tuple[Caller, Caller], state: str
) -> None:
    found = {each["name"]: each for each in functions(superuser, state)}
    for name, call in NEEDED.items():
        with replaced(superuser, found[name]):
            assert outcome(*CALLS[call](*callers)) not in ("INTERNAL", "OK", ""), name
    assert outcome(*CALLS["Sign"](*callers)) == "OK"


def test_a_user_who_is_locked_while_they_ask_for_a_rotation_is_told_so(
    superuser: Superuser, callers: tuple[Caller, Caller]
) -> None:
    """The function says so by an error that the driver takes for one of the connection."""
    [function] = [each for each in functions(superuser, "28000") if each["name"] == "cryptography.request_rotation"]
    with replaced(superuser, function):
        assert outcome(*CALLS["RotateKey"](*callers)) == "CREDENTIALS_INVALID"


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("state", ["P0001", "23514"])
def test_no_function_that_raises_makes_a_call_end_as_a_bug(
    superuser: Superuser, callers: tuple[Caller, Caller], state: str
) -> None:
    wrong = []
    for function in functions(superuser, state):
        # Some are used by indexes and constraints, and keep what they return.
        with suppress(Exception), replaced(superuser, function):
            outcomes = {name: outcome(*call(*callers)) for name, call in CALLS.items()}
            wrong += [(function["name"], name) for name, word in outcomes.items() if word in ("INTERNAL", "")]
    assert wrong == []
    assert outcome(*CALLS["Sign"](*callers)) == "OK"
