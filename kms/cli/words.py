"""Wire messages in the words of the command line: the shapes that `--json` prints."""

from collections.abc import Mapping
from typing import Any, TypeVar, cast

from kms.rpc import enums
from kms.v1 import keys_pb2

N = TypeVar("N", bound=int)
T = TypeVar("T")


def word(table: Mapping[N, str], number: N) -> str:
    """Return the word for *number*; a number that a newer server sends and we do not know stays one."""
    return str(table.get(number, number)) if number else ""


def number(table: Mapping[N, T], value: T | None) -> N:
    """Return the wire's number for *value*; None is UNSPECIFIED."""
    return enums.number_of(table, value) if value is not None else cast("N", 0)


def key_fields(key: keys_pb2.Key) -> dict[str, Any]:
    """Return *key* as `--json` shows it. What a key of this type does not have is absent."""
    fields = {
        "id": key.id,
        "name": key.name,
        "type": word(enums.KEY_TYPES, key.type),
        "purpose": word(enums.PURPOSES, key.purpose),
        "size_bits": key.size_bits,
        "state": word(enums.STATES, key.state),
        "custody": word(enums.CUSTODIES, key.custody),
        "origin": key.origin,
        "usage_count": key.usage_count,
        "version": key.version,
        "created_at": key.created_at.ToJsonString(),
        "metadata": dict(key.metadata),
    }
    if key.HasField("max_usage_count"):
        fields["max_usage_count"] = key.max_usage_count
    for name in ("activated_at", "expires_at", "destruction_scheduled_at", "superseded_at"):
        if key.HasField(name):
            fields[name] = getattr(key, name).ToJsonString()
    for name in ("predecessor_id", "successor_id"):
        if getattr(key, name):
            fields[name] = getattr(key, name)
    if key.HasField("rotation_policy"):
        fields["rotation_policy"] = policy_fields(key.rotation_policy)
    if key.HasField("next_rotation_at"):
        fields["next_rotation_at"] = key.next_rotation_at.ToJsonString()
    if key.check_value:
        fields["check_value"] = key.check_value
    if key.public_key_pem:
        fields["public_key_pem"] = key.public_key_pem
    return fields


def policy_fields(policy: keys_pb2.RotationPolicy) -> dict[str, Any]:
    """Return the policy of a key as `--json` shows it. What does not rotate the key is absent."""
    fields: dict[str, Any] = {"version": policy.version, "paused": policy.paused}
    for name in ("every", "before_expiry"):
        if policy.HasField(name):
            fields[f"{name}_seconds"] = getattr(policy, name).seconds
    if policy.at_usage_percent:
        fields["at_usage_percent"] = policy.at_usage_percent
    if policy.on_compromise:
        fields["on_compromise"] = True
    return fields
