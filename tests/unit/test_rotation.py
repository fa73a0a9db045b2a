"""The values of a rotation: what its request is bound to, and the rows that it leaves."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest

from kms.domain.algorithms import KeyType, Purpose, key_spec
from kms.domain.errors import KmsError, Reason
from kms.domain.ids import KeyId, KeyName, UserId
from kms.domain.key_row import AUTHENTICATED
from kms.domain.keys import Custody, KeyIdentity, KeyMaterial, KeyRecord
from kms.domain.lifecycle import State
from kms.rotation.rotation import (
    RotationRequest,
    check_still_wanted,
    is_successor,
    predecessor_name,
    successor,
    superseded,
)

MOMENT = datetime(2026, 11, 29, 12, tzinfo=UTC)
REQUEST = RotationRequest(UUID(int=1), UserId(UUID(int=2)), KeyId(UUID(int=3)), "yearly", UserId(UUID(int=2)), False, MOMENT)
ROW: dict[str, Any] = {
    **dict.fromkeys(AUTHENTICATED),
    "id": UUID(int=3),
    "user_id": UUID(int=2),
    "key_name": "k",
    "key_type": "aes",
    "key_status": "compromised",
    "public_key": "kcv:000000",
    "max_usage_count": 7,
    "metadata": {"team": "payments"},
    "custody": "WRAPPED",
    "version": 5,
    "created_at": MOMENT - timedelta(days=10),
    "compromised_at": MOMENT,
    "compromise_occurred_at": MOMENT,
    "expires_at": MOMENT + timedelta(days=20),
}
MATERIAL = KeyMaterial(Custody.WRAPPED, "kcv:111111", "ZW52ZWxvcGU=")


@pytest.mark.parametrize(
    "changed",
    [
        {"rotation_id": UUID(int=9)},
        {"owner_id": UserId(UUID(int=9))},
        {"key_id": KeyId(UUID(int=9))},
        {"reason": "monthly"},
        {"initiated_by": UserId(UUID(int=9))},
        {"initiated_by": None},
        {"allows_compromised": True},
        {"created_at": MOMENT + timedelta(microseconds=1)},
    ],
    ids=str,
)
def test_the_mac_of_a_request_covers_each_of_its_parts(changed: dict[str, Any]) -> None:
    assert replace(REQUEST, **changed).authenticated_bytes() != REQUEST.authenticated_bytes()


def test_the_predecessor_changes_its_name_and_nothing_else_but_that_it_is_superseded() -> None:
    after = superseded(ROW, KeyName("k@1"), MOMENT)
    assert {column for column in ROW if after[column] != ROW[column]} == {"key_name", "superseded_at", "version"}
    assert (after["key_name"], after["superseded_at"], after["version"]) == ("k@1", MOMENT, 6)


def test_the_successor_is_the_same_but_for_its_material_and_its_moments() -> None:
    after = successor(ROW, KeyId(UUID(int=4)), MATERIAL, MOMENT)
    assert {column for column in ROW if after[column] == ROW[column]} >= {
        *("user_id", "key_name", "key_type", "max_usage_count", "metadata", "custody"),
    }
    assert (after["id"], after["public_key"], after["version"]) == (UUID(int=4), "kcv:111111", 1)
    assert (after["key_status"], after["created_at"], after["compromised_at"]) == ("active", MOMENT, None)
    assert after["compromise_occurred_at"] is None
    assert after["expires_at"] == MOMENT + timedelta(days=30), "it lives as long as its predecessor was to"


def test_the_lifetime_counts_from_the_activation() -> None:
    row = {**ROW, "activated_at": MOMENT - timedelta(days=5)}
    assert successor(row, KeyId(UUID(int=4)), MATERIAL, MOMENT)["expires_at"] == MOMENT + timedelta(days=25)
    assert successor({**ROW, "expires_at": None}, KeyId(UUID(int=4)), MATERIAL, MOMENT)["expires_at"] is None


def test_a_lifetime_that_ends_before_the_activation_or_after_the_last_year_is_a_lifetime_too() -> None:
    early = {**ROW, "activated_at": MOMENT, "expires_at": MOMENT - timedelta(days=4)}
    assert successor(early, KeyId(UUID(int=4)), MATERIAL, MOMENT)["expires_at"] == MOMENT + timedelta(days=6)
    for_ever = {**ROW, "expires_at": datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)}
    assert successor(for_ever, KeyId(UUID(int=4)), MATERIAL, MOMENT)["expires_at"] == for_ever["expires_at"]


def record(**fields: Any) -> KeyRecord:  # noqa: ANN401
    identity = KeyIdentity(KeyId(UUID(int=3)), UserId(UUID(int=2)), key_spec(KeyType.AES, Purpose.ENCRYPTION, None))
    key = KeyRecord(identity, KeyName("k"), State.ACTIVE, Custody.WRAPPED, "kcv:000000", 1, 0, MOMENT - timedelta(days=10), {})
    return replace(key, **fields)


def test_a_request_is_acted_on_for_a_day_and_not_after_the_key_was_deactivated() -> None:
    check_still_wanted(record(), MOMENT, MOMENT + timedelta(hours=23))
    check_still_wanted(record(deactivated_at=MOMENT - timedelta(seconds=1)), MOMENT, MOMENT)
    for key, now, reason in (
        (record(), MOMENT + timedelta(hours=25), Reason.DEADLINE_EXCEEDED),
        (record(deactivated_at=MOMENT + timedelta(seconds=1)), MOMENT + timedelta(hours=1), Reason.KEY_INACTIVE),
    ):
        with pytest.raises(KmsError) as caught:
            check_still_wanted(key, MOMENT, now)
        assert caught.value.reason is reason


def test_the_records_of_both_keys_prove_a_switch() -> None:
    old, new = record(name=KeyName("k@1"), superseded_at=MOMENT), record(created_at=MOMENT)
    assert is_successor(new, old)
    assert is_successor(replace(new, name=KeyName("k@2"), superseded_at=MOMENT + timedelta(days=1)), old), "rotated on"
    for another in (
        (new, replace(old, superseded_at=None)),
        (new, replace(old, name=KeyName("k"))),
        (new, replace(old, superseded_at=MOMENT + timedelta(microseconds=1))),
        (replace(new, name=KeyName("other")), old),
        (record(), old),
    ):
        assert not is_successor(*another)


def test_predecessors_are_numbered_from_one() -> None:
    assert [predecessor_name(KeyName("k"), number) for number in (0, 1, 9)] == ["k@1", "k@2", "k@10"]
