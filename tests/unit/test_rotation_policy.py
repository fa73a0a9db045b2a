"""When a policy has a key rotated, and which policies make no sense."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest

from kms.domain.algorithms import KeyType, Purpose, key_spec
from kms.domain.errors import KmsError, Reason
from kms.domain.ids import KeyId, KeyName, UserId
from kms.domain.keys import Custody, KeyIdentity, KeyRecord
from kms.domain.lifecycle import State
from kms.rotation.backlog import Backlog
from kms.rotation.policy import Due, RotationPolicy, Triggers, check_triggers, is_due, next_rotation
from kms.rotation.rotation import LAST_MOMENT

BEGAN = datetime(2026, 1, 1, tzinfo=UTC)
DAY = timedelta(days=1)
OWNER = UserId(UUID(int=2))


def policy(*, is_paused: bool = False, **triggers: Any) -> RotationPolicy:  # noqa: ANN401
    return RotationPolicy(OWNER, KeyName("k"), Triggers(**triggers), is_paused, 1)


def key(**fields: Any) -> KeyRecord:  # noqa: ANN401
    spec = key_spec(KeyType.ED25519, Purpose.SIGNING, None)
    identity = KeyIdentity(KeyId(UUID(int=3)), OWNER, spec, fields.pop("bound_to", ""))
    made = KeyRecord(identity, KeyName("k"), State.ACTIVE, Custody.WRAPPED, "", 1, 0, BEGAN, {})
    return replace(made, **fields)


EVERY = policy(every=90 * DAY)
LEAD = policy(before_expiry=7 * DAY)
CENTURY, LATE = policy(every=36_500 * DAY), datetime(9950, 1, 1, tzinfo=UTC)
SHARE = policy(at_usage_percent=80)
COMPROMISE = policy(on_compromise=True)


@pytest.mark.parametrize(
    ("asked", "of", "expected"),
    [
        (EVERY, key(), Due(BEGAN + 90 * DAY, "policy: every 90 days")),
        (EVERY, key(activated_at=BEGAN + DAY), Due(BEGAN + 91 * DAY, "policy: every 90 days")),
        (EVERY, key(activated_at=BEGAN + DAY, state=State.PRE_ACTIVE), Due(BEGAN + 91 * DAY, "policy: every 90 days")),
        (EVERY, key(state=State.INACTIVE), Due(BEGAN + 90 * DAY, "policy: every 90 days")),
        (EVERY, key(state=State.EXPIRED, expires_at=BEGAN + DAY), Due(BEGAN + 90 * DAY, "policy: every 90 days")),
        (policy(every=36 * timedelta(hours=1)), key(), Due(BEGAN + 1.5 * DAY, "policy: every 36 hours")),
        (LEAD, key(expires_at=BEGAN + 30 * DAY), Due(BEGAN + 23 * DAY, "policy: 7 days before expiry")),
        (LEAD, key(expires_at=BEGAN + 7 * DAY), Due(BEGAN + 7 * DAY, "policy: at expiry")),
        (CENTURY, key(activated_at=LATE, state=State.PRE_ACTIVE), Due(LAST_MOMENT, "policy: every 36500 days")),
        (LEAD, key(), None),
        (SHARE, key(max_usage_count=10, usage_counter=7), None),
        (SHARE, key(max_usage_count=10, usage_counter=8), Due(BEGAN, "policy: 80 % of its uses")),
        (SHARE, key(max_usage_count=10, usage_counter=10, state=State.INACTIVE), Due(BEGAN, "policy: 80 % of its uses")),
        (SHARE, key(max_usage_count=2**63 - 1, usage_counter=2**62), None),
        (policy(at_usage_percent=1), key(max_usage_count=1, usage_counter=0), None),
        (policy(at_usage_percent=99), key(max_usage_count=1, usage_counter=1), Due(BEGAN, "policy: 99 % of its uses")),
        (SHARE, key(usage_counter=8), None),
        (COMPROMISE, key(), None),
        (COMPROMISE, key(state=State.COMPROMISED, compromised_at=BEGAN + DAY), Due(BEGAN + DAY, "policy: compromised")),
        (EVERY, key(state=State.COMPROMISED, compromised_at=BEGAN + DAY), None),
        (replace(EVERY, is_paused=True), key(), None),
        (replace(COMPROMISE, is_paused=True), key(state=State.COMPROMISED, compromised_at=BEGAN), None),
        (EVERY, key(deactivated_at=BEGAN + DAY, state=State.INACTIVE), None),
        (EVERY, key(superseded_at=BEGAN + DAY, state=State.INACTIVE), None),
        (EVERY, key(bound_to="acme"), None),
        *((EVERY, key(state=state), None) for state in (State.REVOKED, State.PENDING_DESTRUCTION, State.DESTROYED)),
    ],
)
def test_the_next_rotation_follows_from_the_key(asked: RotationPolicy, of: KeyRecord, expected: Due | None) -> None:
    assert next_rotation(asked, of, BEGAN) == expected


def test_of_several_triggers_the_first_counts() -> None:
    both = policy(every=20 * DAY, before_expiry=7 * DAY, at_usage_percent=50)
    of = key(expires_at=BEGAN + 30 * DAY, max_usage_count=4)
    assert next_rotation(both, of, BEGAN) == Due(BEGAN + 20 * DAY, "policy: every 20 days")
    assert next_rotation(both, replace(of, expires_at=BEGAN + 26 * DAY), BEGAN) == Due(
        BEGAN + 19 * DAY, "policy: 7 days before expiry"
    )
    assert next_rotation(both, replace(of, usage_counter=2), BEGAN + DAY) == Due(BEGAN + DAY, "policy: 50 % of its uses")


def test_what_became_due_long_ago_is_due_once() -> None:
    """A successor begins its own period: of many periods that passed while nothing ran, one rotation is left."""
    now = BEGAN + 1000 * DAY
    assert is_due(next_rotation(EVERY, key(), now), key(), now)
    successor = key(created_at=now)
    assert not is_due(next_rotation(EVERY, successor, now), successor, now)


def test_a_key_is_due_from_its_moment_on_and_not_before_it_is_active() -> None:
    due = next_rotation(EVERY, key(), BEGAN)
    assert not is_due(due, key(), BEGAN + 90 * DAY - timedelta(microseconds=1))
    assert is_due(due, key(), BEGAN + 90 * DAY)
    assert not is_due(due, key(state=State.PRE_ACTIVE), BEGAN + 90 * DAY)
    assert not is_due(None, key(), BEGAN)


@pytest.mark.parametrize(
    ("triggers", "of", "field"),
    [
        ({}, key(), "policy"),
        ({"every": DAY - timedelta(seconds=1)}, key(), "every"),
        ({"every": 36_501 * DAY}, key(), "every"),
        ({"every": 30 * DAY}, key(expires_at=BEGAN + 30 * DAY), "every"),
        ({"before_expiry": timedelta(minutes=59)}, key(expires_at=BEGAN + 30 * DAY), "before_expiry"),
        ({"before_expiry": DAY}, key(), "before_expiry"),
        ({"before_expiry": 30 * DAY}, key(expires_at=BEGAN + 30 * DAY), "before_expiry"),
        ({"before_expiry": 8 * DAY, "every": 8 * DAY}, key(expires_at=BEGAN + 30 * DAY), "before_expiry"),
        ({"at_usage_percent": 0}, key(max_usage_count=9), "at_usage_percent"),
        ({"at_usage_percent": 100}, key(max_usage_count=9), "at_usage_percent"),
        ({"at_usage_percent": 80}, key(), "at_usage_percent"),
    ],
)
def test_a_senseless_policy_is_malformed_in_a_field(triggers: dict[str, Any], of: KeyRecord, field: str) -> None:
    with pytest.raises(KmsError) as caught:
        check_triggers(Triggers(**triggers), of)
    assert (caught.value.reason, caught.value.metadata) == (Reason.MALFORMED, {"field": field})


@pytest.mark.parametrize(
    ("of", "reason"),
    [
        (key(bound_to="acme"), Reason.WRONG_PURPOSE),
        (key(superseded_at=BEGAN, state=State.INACTIVE), Reason.KEY_INACTIVE),
        (key(state=State.REVOKED), Reason.KEY_REVOKED),
        (key(state=State.PENDING_DESTRUCTION), Reason.KEY_PENDING_DESTRUCTION),
        (key(state=State.DESTROYED), Reason.KEY_DESTROYED),
    ],
)
def test_a_key_that_is_never_rotated_has_no_policy(of: KeyRecord, reason: Reason) -> None:
    with pytest.raises(KmsError) as caught:
        check_triggers(Triggers(every=90 * DAY), of)
    assert caught.value.reason is reason


def test_a_policy_that_makes_sense_passes() -> None:
    aes = replace(key(), identity=replace(key().identity, spec=key_spec(KeyType.AES, Purpose.ENCRYPTION, None)))
    check_triggers(Triggers(every=DAY), key(state=State.PRE_ACTIVE))
    check_triggers(Triggers(on_compromise=True), key(state=State.COMPROMISED))
    check_triggers(Triggers(at_usage_percent=80), aes)
    check_triggers(Triggers(20 * DAY, 7 * DAY, 99, on_compromise=True), key(expires_at=BEGAN + 30 * DAY, max_usage_count=1))


@pytest.mark.parametrize(
    "changed",
    [
        {"owner_id": UserId(UUID(int=9))},
        {"name": KeyName("k2")},
        {"is_paused": True},
        {"version": 2},
        *({"triggers": Triggers(**each)} for each in ({"every": DAY}, {"before_expiry": 90 * DAY}, {"at_usage_percent": 90})),
        {"triggers": Triggers(every=90 * DAY, on_compromise=True)},
    ],
    ids=str,
)
def test_the_mac_of_a_policy_covers_each_field(changed: dict[str, Any]) -> None:
    assert replace(EVERY, **changed).authenticated_bytes() != EVERY.authenticated_bytes()


@pytest.mark.parametrize(("count", "words"), [(1, "1 key is due"), (2, "2 keys are due")])
def test_a_warning_counts_the_keys_that_are_due_in_vain(count: int, words: str) -> None:
    [warning] = Backlog(policies_overdue=count).warnings
    assert warning.startswith(f"{words} by policy and not rotated")
