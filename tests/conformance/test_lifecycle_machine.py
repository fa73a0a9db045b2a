"""Random sequences of calls and of passing time against a real server: none reaches what the table of states does not allow.

The table is written out here a second time, from the states' side, as the documentation of the API has it. Time passes by
moving the moments in the key's row; the clock stays.
"""

import time
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import product
from typing import Any, Final
from uuid import uuid4

import grpc
import psycopg
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from kms.v1 import crypto_pb2 as cpb
from kms.v1 import keys_pb2 as kpb
from tests.conformance.refusals import refusal_of
from tests.conformance.requests import create
from tests.fixtures.records import TokenMacs
from tests.fixtures.server import Caller, RunningServer

# state: may protect, may process (or only by a flag of the request), the moves out of it
STATES: Final[dict[str, tuple[bool, bool | str, set[str]]]] = {
    "PRE_ACTIVE": (False, False, {"activate", "compromise", "revoke", "schedule", "update"}),
    "ACTIVE": (True, True, {"deactivate", "compromise", "revoke", "update"}),
    "INACTIVE": (False, True, {"reactivate", "compromise", "revoke", "schedule", "update"}),
    "EXPIRED": (False, True, {"compromise", "revoke", "schedule"}),
    "COMPROMISED": (False, "allow_compromised", {"revoke", "schedule"}),
    "REVOKED": (False, "allow_revoked", {"schedule"}),
    "PENDING_DESTRUCTION": (False, False, {"cancel"}),
    "DESTROYED": (False, False, set()),
}
LEADS_TO: Final = {
    "activate": "ACTIVE",
    "deactivate": "INACTIVE",
    "reactivate": "ACTIVE",
    "compromise": "COMPROMISED",
    "revoke": "REVOKED",
    "schedule": "PENDING_DESTRUCTION",
}
# Time leads from these states to others; what is compromised, revoked or destroyed stays so.
ENDS_BY_TIME: Final = ("PRE_ACTIVE", "ACTIVE", "INACTIVE")
HOUR: Final = 3600
VERSIONS: Final = st.sampled_from(["any", "any", "any", "seen", "older", "ahead"])
FLAGS: Final = ((), ("allow_compromised",), ("allow_revoked",), ("allow_compromised", "allow_revoked"))
KINDS: Final = st.sampled_from(["aes", "secp256k1"])


def ahead(seconds: float) -> Timestamp:
    stamp = Timestamp()
    stamp.FromNanoseconds(time.time_ns() + int(seconds * 1e9))
    return stamp


@dataclass(slots=True)
class Expected:
    """What the API promises of the key; it follows the calls, so it changes. `before` is what cancelling restores."""

    state: str = "ACTIVE"
    before: str = ""
    version: int = 1
    count: int = 0
    limit: int | None = None
    expires_in: int | None = None
    is_pre_active_by_time: bool = False

    @property
    def is_spent(self) -> bool:
        return self.limit is not None and self.count >= self.limit

    def moved(self, move: str) -> None:
        self.before, self.state = self.state, self.before if move == "cancel" else LEADS_TO[move]
        self.version += 1

    def charged(self) -> None:
        self.count += 1
        if self.is_spent and self.state == "ACTIVE":
            self.state = "INACTIVE"

    def expired(self) -> None:
        if self.state in ENDS_BY_TIME:
            self.state = "EXPIRED"
        if self.state == "PENDING_DESTRUCTION" and self.before in ENDS_BY_TIME:
            self.before = "EXPIRED"
        self.expires_in = -1
        self.version += 1

    def activated(self) -> None:
        if self.state == "PRE_ACTIVE":
            self.state = "ACTIVE"
        if self.state == "PENDING_DESTRUCTION" and self.before == "PRE_ACTIVE":
            self.before = "ACTIVE"
        self.is_pre_active_by_time = False
        self.version += 1

    def use_refusals(self, *, protects: bool, flags: Collection[str] = ()) -> set[str]:
        """The reasons with which a use may be refused; none: it must succeed."""
        is_open = STATES[self.state][0 if protects else 1]
        if is_open is True or is_open in flags:
            return set()
        return {"USAGE_LIMIT_REACHED"} if protects and self.state == "INACTIVE" and self.is_spent else {f"KEY_{self.state}"}

    def move_refusals(self, move: str, *, is_stale: bool) -> set[str]:
        """The reasons with which a move may be refused; none: it must succeed."""
        refusals = {"STALE"} if is_stale else set()
        if move not in STATES[self.state][2]:
            refusals.add(f"KEY_{self.state}")
        elif move == "reactivate" and self.is_spent:
            refusals.add("USAGE_LIMIT_REACHED")
        return refusals


class Lifecycle(RuleBasedStateMachine):
    """One key of each example, on a server that all share."""

    def __init__(
        self, caller: Caller, database: "psycopg.Connection[Any]", macs: TokenMacs, tried: Counter[tuple[str, str, bool]]
    ) -> None:
        super().__init__()
        self.caller, self.database, self.macs, self.tried = caller, database, macs, tried
        self.name = f"k-{uuid4().hex}"
        self.ciphertexts: list[bytes] = []
        self.signatures: list[bytes] = []

    @initialize(
        kind=KINDS, begins=st.booleans(), ends=st.booleans(), limit=st.one_of(st.none(), st.integers(min_value=1, max_value=4))
    )
    def make(self, kind: str, begins: bool, ends: bool, limit: int | None) -> None:
        request = create(kind, name=self.name)
        self.expected = Expected(limit=limit, is_pre_active_by_time=begins, expires_in=2 * HOUR if ends else None)
        if begins:
            request.activated_at.CopyFrom(ahead(HOUR))
            self.expected.state = "PRE_ACTIVE"
        if ends:
            request.expires_at.CopyFrom(ahead(2 * HOUR))
        if limit is not None:
            request.max_usage_count = limit
        self.kind = kind
        self.id = self.caller.keys.CreateKey(request, timeout=20).key.id
        if kind == "aes":
            self._encrypt(makes_data_key=False)  # so that every state is asked to decrypt something

    @rule(move=st.sampled_from(["activate", "deactivate", "reactivate"]), seen=VERSIONS)
    def move_to_and_fro(self, move: str, seen: str) -> None:
        self._move(move, seen)

    @rule(move=st.sampled_from(["schedule", "cancel"]), seen=VERSIONS)
    def move_towards_destruction(self, move: str, seen: str) -> None:
        self._move(move, seen)

    # Nothing but destruction leads out of these: asked for less often, or every run would end here.
    @precondition(lambda self: self.expected.version > 3)
    @rule(move=st.sampled_from(["compromise", "revoke"]), seen=VERSIONS)
    def move_for_good(self, move: str, seen: str) -> None:
        self._move(move, seen)
        if self.ciphertexts:
            for flags in FLAGS:
                self._decrypt(flags)

    def _move(self, move: str, seen: str) -> None:
        is_stale = seen in ("older", "ahead")
        refusals = self.expected.move_refusals(move, is_stale=is_stale)
        rpc, request = self._call_of(move, self._version(seen))
        if self._outcome(rpc, request, refusals):
            self.expected.moved(move)

    def _call_of(self, move: str, version: int) -> tuple[Callable[..., Any], Any]:
        keys = self.caller.keys
        here: dict[str, Any] = {"key": self.name, "version": version}
        calls: dict[str, tuple[Callable[..., Any], Any]] = {
            "activate": (keys.ActivateKey, kpb.ActivateKeyRequest(**here)),
            "deactivate": (keys.DeactivateKey, kpb.DeactivateKeyRequest(**here)),
            "reactivate": (keys.ReactivateKey, kpb.ReactivateKeyRequest(**here)),
            "compromise": (keys.MarkKeyCompromised, kpb.MarkKeyCompromisedRequest(**here, reason="drawn")),
            "revoke": (keys.RevokeKey, kpb.RevokeKeyRequest(**here, reason="drawn")),
            "schedule": (keys.ScheduleKeyDestruction, kpb.ScheduleKeyDestructionRequest(**here)),
            "cancel": (keys.CancelKeyDestruction, kpb.CancelKeyDestructionRequest(**here)),
        }
        return calls[move]

    def _version(self, seen: str) -> int:
        # 0 says "any", so that the version before the first is one that is ahead.
        version = self.expected.version
        return {"any": 0, "seen": version, "older": version - 1 or version + 1, "ahead": version + 1}[seen]

    @rule(limit=st.integers(min_value=1, max_value=5), seen=VERSIONS)
    def lower_the_limit(self, limit: int, seen: str) -> None:
        refusals = self.expected.move_refusals("update", is_stale=seen in ("older", "ahead"))
        if limit < self.expected.count or (self.expected.limit is not None and limit > self.expected.limit):
            refusals = refusals or {"MALFORMED"}
        request = kpb.UpdateKeyRequest(key=self.name, version=self._version(seen), max_usage_count=limit)
        if self._outcome(self.caller.keys.UpdateKey, request, refusals):
            self.expected.limit = limit
            self.expected.version += 1
            if self.expected.state == "ACTIVE" and self.expected.is_spent:
                self.expected.state = "INACTIVE"

    @rule(hours=st.sampled_from([-1, 1, 3]))
    def bring_the_expiry_forward(self, hours: int) -> None:
        refusals = self.expected.move_refusals("update", is_stale=False)
        now = self.expected.expires_in
        if hours < 0 or (now is not None and hours * HOUR > now):
            refusals = refusals or {"MALFORMED"}
        request = kpb.UpdateKeyRequest(key=self.name, expires_at=ahead(hours * HOUR))
        if self._outcome(self.caller.keys.UpdateKey, request, refusals):
            self.expected.expires_in = hours * HOUR - 60  # the same hours again are later than this
            self.expected.version += 1

    @precondition(lambda self: self.kind == "secp256k1")
    @rule()
    def sign(self) -> None:
        request = cpb.SignRequest(key=self.name, message=b"m")
        if answer := self._outcome(self.caller.crypto.Sign, request, self.expected.use_refusals(protects=True)):
            self.signatures.append(answer.signature)
            self.expected.charged()

    @precondition(lambda self: self.kind == "aes")
    @rule(makes_data_key=st.booleans())
    def encrypt(self, makes_data_key: bool) -> None:
        self._encrypt(makes_data_key=makes_data_key)

    def _encrypt(self, *, makes_data_key: bool) -> None:
        crypto = self.caller.crypto
        refusals = self.expected.use_refusals(protects=True)
        if makes_data_key:
            answer = self._outcome(crypto.GenerateDataKey, cpb.GenerateDataKeyRequest(key=self.name), refusals)
        else:
            answer = self._outcome(crypto.Encrypt, cpb.EncryptRequest(key=self.name, plaintext=b"p"), refusals)
        if answer:
            self.ciphertexts.append(answer.ciphertext)
            self.expected.charged()

    @precondition(lambda self: self.ciphertexts)
    @rule(flags=st.sampled_from(FLAGS))
    def decrypt(self, flags: Collection[str]) -> None:
        self._decrypt(flags)

    def _decrypt(self, flags: Collection[str]) -> None:
        request = cpb.DecryptRequest(
            ciphertext=self.ciphertexts[-1],
            allow_compromised="allow_compromised" in flags,
            allow_revoked="allow_revoked" in flags,
        )
        self._outcome(self.caller.crypto.Decrypt, request, self.expected.use_refusals(protects=False, flags=flags))

    @precondition(lambda self: self.signatures)
    @rule()
    def verify(self) -> None:
        request = cpb.VerifyRequest(key=self.name, message=b"m", signature=self.signatures[-1])
        assert self.caller.crypto.Verify(request, timeout=20).valid
        assert self.caller.keys.GetPublicKey(kpb.GetPublicKeyRequest(key=self.name), timeout=20).public_key_der

    @precondition(
        lambda self: self.expected.is_pre_active_by_time and self.expected.state in ("PRE_ACTIVE", "PENDING_DESTRUCTION")
    )
    @rule()
    def its_time_comes(self) -> None:
        self._row("activated_at = clock_timestamp()")
        self.expected.activated()

    @precondition(lambda self: self.expected.version > 2 and (self.expected.expires_in or -1) > 0)
    @rule()
    def it_expires(self) -> None:
        self._row("created_at = '2020-01-01', activated_at = least(activated_at, '2020-01-01'), expires_at = clock_timestamp()")
        self.expected.expired()

    @precondition(lambda self: self.expected.version > 3 and self.expected.state == "PENDING_DESTRUCTION")
    @rule()
    def its_destruction_falls_due(self) -> None:
        self._row("destruction_scheduled_at = clock_timestamp()")
        self.expected.state = "DESTROYED"
        self.expected.version += 1

    def _row(self, change: str) -> None:
        self.macs.edit(self.database, f"UPDATE cryptography.keys SET {change} WHERE id = %s", self.id)

    @invariant()
    def the_key_is_what_the_calls_made_of_it(self) -> None:
        key = self.caller.keys.GetKey(kpb.GetKeyRequest(key=self.name), timeout=20).key
        shown = kpb.KeyState.Name(key.state).removeprefix("KEY_STATE_")
        assert (shown, key.usage_count) == (self.expected.state, self.expected.count)
        # The server itself ends what is due, which is one move more.
        assert key.version - self.expected.version in ((0, 1) if shown == "DESTROYED" else (0,))

    def teardown(self) -> None:
        query = """
            SELECT usage_counter, version,
                (SELECT count(*) FROM audit.security_events AS e WHERE e.resource_id = k.id AND e.outcome = 'success'
                    AND e.action IN ('sign', 'encrypt', 'generate_data_key')),
                (SELECT array_agg(d.aggregate_version ORDER BY d.aggregate_version) FROM audit.domain_events AS d
                    WHERE d.aggregate_id = k.id)
            FROM cryptography.keys AS k WHERE k.key_name = %s
        """
        for counter, version, records, events in self.database.execute(query, (self.name,)).fetchall():
            assert counter == records == self.expected.count
            assert events == list(range(1, version + 1))

    def _outcome(self, call: Callable[..., Any], request: object, refusals: set[str]) -> Any:  # noqa: ANN401  # any response
        """Return the response, or None for a refusal; it must be one of *refusals*, or a success where there are none."""
        self.tried[self.expected.state, type(request).__name__.removesuffix("Request"), not refusals] += 1
        try:
            answer = call(request, timeout=20)
        except grpc.RpcError as error:
            assert refusal_of(error).reason in refusals, f"{refusal_of(error)}, expected {refusals or 'success'}: {self.expected}"
            return None
        assert not refusals, f"expected {refusals}: {self.expected}"
        return answer


def run(server: RunningServer, examples: int, steps: int) -> Counter[tuple[str, str, bool]]:
    """Return how often each call was tried in each state, apart by whether it had to succeed."""
    caller = server.caller(server.deployment.new_user(role="recovery"))  # with no role no flag would open anything
    tried: Counter[tuple[str, str, bool]] = Counter()
    with psycopg.connect(server.deployment.database.admin_dsn, autocommit=True) as database:
        run_state_machine_as_test(
            lambda: Lifecycle(caller, database, server.deployment.macs, tried),  # type: ignore[arg-type]  # hypothesis calls it, class or not
            settings=settings(
                max_examples=examples,
                stateful_step_count=steps,
                deadline=None,
                derandomize=True,
                database=None,
                phases=(Phase.generate,),
                suppress_health_check=list(HealthCheck),
            ),
        )
    return tried


def test_no_sequence_of_calls_reaches_what_the_table_of_states_does_not_allow(server: RunningServer) -> None:
    tried = run(server, examples=30, steps=20)
    print(
        *sorted((*key, n) for key, n in tried.items() if key[1] in ("Decrypt", "Encrypt", "RevokeKey", "MarkKeyCompromised")),
        sep="\n",
    )
    assert len({state for state, _, _ in tried}) > 5


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_no_long_sequence_of_calls_reaches_what_the_table_of_states_does_not_allow(server: RunningServer) -> None:
    tried = run(server, examples=400, steps=60)
    moves = {
        "Activate",
        "Deactivate",
        "Reactivate",
        "Revoke",
        "MarkKeyCompromised",
        "ScheduleKeyDestruction",
        "CancelKeyDestruction",
    }
    for state, move in product(STATES, moves):
        assert any(tried[state, name, succeeds] for name in (move, f"{move}Key") for succeeds in (True, False)), (state, move)
    for state, succeeds in product(("COMPROMISED", "REVOKED"), (True, False)):
        assert tried[state, "Decrypt", succeeds], (state, succeeds)
    print(*sorted((*key, number) for key, number in tried.items()), sep="\n")
