"""What `plans.py` sends with each statement: rows that are there, others in every execution.

A statement without an entry here is sent with values that find nothing.
"""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from uuid import UUID, uuid4

from psycopg.types.json import Jsonb

from benchmarks.plans_rows import DUE, ROTATOR_NUMBER, UNCONFIRMED, Size, certificate_id, key_id, key_name, rotation_id, user_id
from kms.store.keys import WALKED_MAX
from kms.store.trail import SCANNED_MAX

_USABLE_FROM: Final = 1 + max(DUE, UNCONFIRMED)
_A_DAY: Final = timedelta(days=1)
_AHEAD: Final = timedelta(milliseconds=20)  # a move waits for its moment, so this is in its time
_PEM: Final = "-----BEGIN PUBLIC KEY-----\n" + "A" * 124


@dataclass(frozen=True, slots=True)
class Sending:
    """The user for whom a statement is sent, and its parameters; and the role, if not the first that has the right."""

    user: UUID | None
    parameters: Mapping[str, Any] | Sequence[Any]
    role: str | None = None


Make = Callable[[Size], Sending]


def a_key(size: Size) -> int:
    """Return the number of some key that is active."""
    while True:
        number = random.randint(_USABLE_FROM, size.keys)  # noqa: S311  # no secret
        if number % 50 != 49 and number % 100 != 98:
            return number


def _by_id(size: Size) -> Sending:
    number = a_key(size)
    return Sending(size.owner(number), {"caller": size.owner(number), "ref": key_id(number)})


def _by_name(size: Size) -> Sending:
    number = a_key(size)
    return Sending(size.owner(number), {"caller": size.owner(number), "ref": key_name(number)})


def _insert(size: Size) -> Sending:
    owner = size.owner(a_key(size))
    new_id = uuid4()
    columns: dict[str, Any] = dict.fromkeys(("hsm_key_id", "max_usage_count", "activated_at", "expires_at"))
    columns |= {
        "id": new_id,
        "user_id": owner,
        "key_name": f"new-{new_id.hex}",
        "key_type": "secp256r1",
        "key_purpose": "signing",
    }
    columns |= {"key_curve": "secp256r1", "key_strength": 256, "bound_to": "", "origin": "GENERATED", "custody": "SEALED"}
    columns |= {"public_key": _PEM, "encrypted_private_key": "e" * 300, "metadata": Jsonb({}), "created_at": datetime.now(UTC)}
    columns |= {"key_status": "active", "record_mac": bytes(32)}
    return Sending(owner, columns)


def _page(*, of_the_many: bool, **wanted: str) -> Make:
    def make(size: Size) -> Sending:
        number = a_key(size)
        owner = user_id(0) if of_the_many else size.owner(number)
        parameters: dict[str, Any] = {"caller": owner, "after": key_name(number), "prefix": ""}
        parameters |= {"walked_max": WALKED_MAX, "rows_max": 101}
        if wanted:
            parameters["after"] = ""
        return Sending(owner, parameters | {"type": None, "purpose": None, "state": None} | wanted)

    return make


def _use(size: Size, n: int) -> dict[str, Any]:
    number = a_key(size)
    use = {"n": n, "user_id": str(size.owner(number)), "user_version": 0, "request_id": str(uuid4()), "peer": "192.0.2.7"}
    use |= {"action": "sign", "key_id": str(key_id(number)), "key_version": 1, "use": "protect", "is_charged": True}
    kept = {"rpc": "Sign", "repeat_id": str(uuid4()), "body_mac": "\\x" + "00" * 32, "result": "\\x" + "00" * 64}
    return use | {"details": {"message_bytes": 3}} | kept


def _settle(uses: int) -> Make:
    def make(size: Size) -> Sending:
        entries = json.dumps([_use(size, n) for n in range(1, uses + 1)])
        return Sending(None, {"writer": uuid4(), "number": 1, "entries": entries})

    return make


def _move(move: str, **change: object) -> Make:
    def make(size: Size) -> Sending:
        number = a_key(size)
        parameters = {"key": key_id(number), "move": move, "change": Jsonb(change), "user_version": 0, "version": 1}
        parameters |= {"moment": datetime.now(UTC) + _AHEAD, "mac": bytes(32)}
        return Sending(size.owner(number), parameters | {"request_id": str(uuid4()), "peer": "192.0.2.7"})

    return make


def _replay(subject: Callable[[int], UUID], last: Callable[[Size], int]) -> Make:
    def make(size: Size) -> Sending:
        subjects = [subject(number) for number in random.sample(range(1, last(size)), 16)]
        return Sending(None, {"subjects": subjects, "moments": [datetime.now(UTC)] * len(subjects)})

    return make


def _answer(size: Size) -> Sending:
    number = a_key(size) // 5 + 1
    return Sending(None, {"user": size.owner(number), "rpc": "Sign", "request_id": f"request-{number}"})


def _refusals(size: Size) -> Sending:
    row: dict[str, Any] = {"peer": "192.0.2.7", "action": "sign", "reason": "KEY_NOT_FOUND", "severity": "low", "age_seconds": 0}
    rows = [row | {"user_id": str(size.owner(a_key(size))), "outcome": "failure", "risk_score": 10} for _ in range(100)]
    return Sending(None, {"refusals": json.dumps(rows)})


def _keep_answer(size: Size) -> Sending:
    number = a_key(size)
    answer = {"rpc": "CreateKey", "request_id": str(uuid4()), "body_mac": bytes(32), "result": key_id(number).bytes}
    return Sending(size.owner(number), answer)


def _search(**wanted: str) -> Make:
    def make(size: Size) -> Sending:
        number = a_key(size)
        parameters: dict[str, Any] = {"since": datetime.min.replace(tzinfo=UTC), "before_at": datetime.max.replace(tzinfo=UTC)}
        parameters |= {"before_id": UUID(int=0), "severities": ["low", "medium", "high", "critical"]}
        parameters |= dict.fromkeys(("event_type", "action", "outcome", "request_id"))
        parameters |= {"user": size.owner(number), "resource": key_id(number), "limit": 101, "scanned_max": SCANNED_MAX}
        return Sending(None, parameters | wanted, role="auditor_users")

    return make


def _search_all(**wanted: str) -> Make:
    narrow = _search(**wanted)

    def make(size: Size) -> Sending:
        found = narrow(size)
        return Sending(None, {**dict(found.parameters), "user": None, "resource": None}, role=found.role)

    return make


def _append(_: Size) -> Sending:
    checkpoint = {"previous": 0, "size": 1, "root": bytes(32), "horizon": 1, "frontier": [bytes(32)], "epoch": 1}
    return Sending(None, checkpoint | {"note": "note"})


def _assign(size: Size) -> Sending:
    return Sending(user_id(0), {"user": user_id(random.randint(1, size.users - 1)), "role": "auditor"})  # noqa: S311  # no secret


def _fixed(**parameters: object) -> Make:
    return lambda _: Sending(None, parameters)


def _begin(_: Size) -> Sending:
    epoch = {"number": 2, "cause": "RECOVERED", "begun_at": datetime.now(UTC), "backup_created_at": None, "timeline": "00000001"}
    return Sending(None, epoch | {"system_identifier": 1, "database_oid": 1, "record_mac": bytes(32)})


def _confirm(_: Size) -> Sending:
    return Sending(None, {"key": key_id(random.randint(1, UNCONFIRMED)), "count": 5, "version": 1, "mac": bytes(32)})  # noqa: S311


def _claim(size: Size) -> Sending:
    claim = {"worker": uuid4(), "items_max": 4, "lease_seconds": 15.0, "attempts_max": 10, "item": None}
    return Sending(None, claim, role="job_runner")


def _claim_one(size: Size) -> Sending:
    return Sending(None, {**dict(_claim(size).parameters), "item": rotation_id(a_key(size))}, role="job_runner")


def _ask_for_rotation(size: Size) -> Sending:
    number = a_key(size)
    asked = {"rotation": uuid4(), "key": key_id(number), "reason": "age", "allows_compromised": False, "mac": bytes(32)}
    asked |= {"moment": datetime.now(UTC), "user_version": 0, "request_id": str(uuid4()), "peer": "192.0.2.7"}
    return Sending(size.owner(number), asked)


def _rotation(size: Size) -> Sending:
    number = a_key(size)
    return Sending(size.owner(number), {"caller": size.owner(number), "id": rotation_id(number)})


def _rotations(*, of_the_many: bool, status: str | None = None) -> Make:
    def make(size: Size) -> Sending:
        number = a_key(size)
        owner = user_id(0) if of_the_many else size.owner(number)
        parameters: dict[str, Any] = {"caller": owner, "created_at": None, "id": None, "status": status, "limit": 51}
        return Sending(owner, parameters | {"key": key_id(number)})

    return make


def _all_rotations(size: Size) -> Sending:
    parameters = {"created_at": None, "id": None, "status": None, "limit": 51, "key": key_id(a_key(size))}
    return Sending(user_id(ROTATOR_NUMBER), parameters)


def _claim_slice(_: Size) -> Sending:
    parameters = {"worker": uuid4(), "items_max": 1, "lease_seconds": 30.0, "item": None, "leavable": [uuid4()]}
    return Sending(None, parameters, role="job_runner")


def _store_rewrapped(size: Size) -> Sending:
    parameters = {"item": uuid4(), "worker": uuid4(), "claim": 1, "keys": [key_id(a_key(size))], "before": ["a"], "after": ["b"]}
    return Sending(None, parameters, role="job_runner")


def _uses(size: Size) -> Sending:
    number = a_key(size)
    parameters = {"keys": [key_id(number)], "superseded": [datetime.now(UTC) - _A_DAY], "since": None}
    parameters |= {"window": _A_DAY, "scanned_max": SCANNED_MAX}
    return Sending(size.owner(number), parameters)


_KEY_SUBJECTS: Final = _replay(key_id, lambda size: size.keys)
CASES: Final[Mapping[str, Mapping[str, Make]]] = {
    "batches.SETTLE": {"1 use": _settle(1), "64 uses": _settle(64)},
    "batches.SETTLED": {"": lambda _: Sending(None, {"writer": uuid4(), "number": 1})},
    "epoch.BEGIN": {"": _begin},
    "epoch.COMPROMISE_KEYS": {"16 keys": _KEY_SUBJECTS},
    "epoch.CONFIRM": {"": _confirm},
    "epoch.DESTROY_KEYS": {"16 keys": _KEY_SUBJECTS},
    "epoch.DISABLE_USERS": {"16 users": _replay(user_id, lambda size: size.users)},
    "epoch.REVOKE_CERTIFICATES": {"16 certificates": _replay(certificate_id, lambda size: size.keys // 10)},
    "epoch.REVOKE_KEYS": {"16 keys": _KEY_SUBJECTS},
    "keys.FIND_BY_ID": {"": _by_id},
    "keys.FIND_BY_NAME": {"": _by_name},
    "keys.FIND_USABLE_BY_ID": {"": _by_id},
    "keys.FIND_USABLE_BY_NAME": {"": _by_name},
    "keys.INSERT": {"": _insert},
    "keys.KEEP_ANSWER": {"": _keep_answer},
    "sealed_trail.APPEND": {"": _append},
    "trail.SEARCH_ALL": {"newest": _search_all(), "an action that nobody took": _search_all(action="none")},
    "trail.SEARCH_RESOURCE": {"": _search()},
    "trail.SEARCH_USER": {"": _search(), "an action that he never took": _search(action="none")},
    "users.ASSIGN_ROLE": {"": _assign},
    "keys.PAGE": {
        "a user": _page(of_the_many=False),
        "the user of a tenth": _page(of_the_many=True),
        "the user of a tenth, active keys": _page(of_the_many=True, state="active"),
        "the user of a tenth, a prefix": _page(of_the_many=True, prefix="key-000001"),
        "the user of a tenth, a type that he has not": _page(of_the_many=True, type="rsa"),
        "the user of a tenth, a state that no key has": _page(of_the_many=True, state="compromised"),
    },
    "keys.PAGE_OF_LINEAGE": {"": _page(of_the_many=True, lineage=key_name(1))},
    "lifecycle.OF_DESTROYED_KEYS": {"": _fixed(objects=["00ff", "00fe", "00fd", "00fc"])},
    "lifecycle.MOVE": {
        "update": _move("update", metadata={"a": "b"}),
        "deactivate": _move("deactivate", reason="a"),
        "revoke": _move("revoke", reason="a"),
    },
    "partitions.DETACH": {"": _fixed(parent="audit.security_events", name="security_events_2024_01")},
    "partitions.ENSURE": {"": _fixed(days=90)},
    "pool.ACT_AS": {"": lambda size: Sending(None, ["authenticated_users", str(size.owner(a_key(size)))])},
    "keys.PREDECESSORS": {"": lambda size: Sending(user_id(0), {"caller": user_id(0), "name": key_name(a_key(size))})},
    "refusals.RECORD": {"100 refusals": _refusals},
    "rotation.envelopes.CLAIM": {"": _claim_slice},
    "rotation.envelopes.STORE": {"": _store_rewrapped},
    "rotation.leases.CLAIM": {"4 of 100 that are due": _claim, "one": _claim_one},
    "rotation.postgres.FIND": {"": _rotation},
    "rotation.postgres.PAGE": {
        "a user": _rotations(of_the_many=False),
        "the user of a tenth": _rotations(of_the_many=True),
        "the user of a tenth, failed": _rotations(of_the_many=True, status="failed"),
        "the user of a tenth, a status that none has": _rotations(of_the_many=True, status="in_progress"),
    },
    "rotation.postgres.PAGE_OF_ALL": {"a rotator": _all_rotations},
    "rotation.postgres.PAGE_OF_ANY_KEY": {"a rotator": _all_rotations},
    "rotation.postgres.PAGE_OF_KEY": {"": _rotations(of_the_many=False)},
    "rotation.postgres.REQUEST": {"": _ask_for_rotation},
    "rotation.usage_postgres.USES": {"": _uses},
    "repeats.FIND": {"": _answer},
    "migrate.AS_ROLE": {"": _fixed(role="postgres")},
    "migrate.RECORD": {"": _fixed(version="V9999", description="", script_name="", checksum="")},
    "wrapping.REGISTER": {"": lambda _: Sending(None, {"id": uuid4(), "kind": "kek", "generation": 9, "serial": "1"})},
    "users.CREATE_SERVICE": {"": lambda _: Sending(None, {"name": f"service-{uuid4().hex}"})},
    "users.FIND_BY_URI": {"": lambda size: Sending(None, {"id": size.owner(a_key(size))})},
}
