"""Rows that the tables take and rows that they refuse."""

from typing import Final

Row = dict[str, object]
OWNER: Final = "00000000-0000-4000-8000-000000000001"
OTHER: Final = "00000000-0000-4000-8000-000000000002"
AES: Final[Row] = {
    "user_id": OWNER,
    "key_name": "good",
    "key_type": "aes",
    "key_purpose": "encryption",
    "public_key": "kcv:0a1b2c",
    "encrypted_private_key": "envelope",
    "key_strength": 256,
    "custody": "SEALED",
    "origin": "GENERATED",
}
USER: Final[Row] = {"username": "carol", "email": "carol@example.org", "password_hash": "!", "salt": "!"}
ROTATION: Final[Row] = {"user_id": OWNER, "old_key_id": OWNER, "rotation_reason": "age"}
CERTIFICATE: Final[Row] = {
    "user_id": OWNER,
    "key_id": OWNER,
    "certificate_type": "x509",
    "certificate_data": "MII",
}
SESSION: Final[Row] = {
    "user_id": OWNER,
    "session_token": "0" * 64,
    "refresh_token": "1" * 64,
    "expires_at": "2030-01-01",
}
WRAPPING: Final[Row] = {"id": OWNER, "kind": "kek", "generation": 1, "token_serial": "1"}
PAST, FUTURE = "2020-01-01", "2999-01-01"

GOOD: Final[list[tuple[str, Row]]] = [
    ("cryptography.keys", AES),
    ("cryptography.keys", {**AES, "usage_counter": 2**62, "max_usage_count": None}),
    ("cryptography.keys", {**AES, "usage_counter": 5, "max_usage_count": 5}),
    ("cryptography.keys", {**AES, "key_name": "a" * 90 + "@999999999"}),
    ("cryptography.keys", {**AES, "expires_at": FUTURE}),
    ("cryptography.keys", {**AES, "key_status": "revoked", "revoked_at": PAST}),
    ("cryptography.keys", {**AES, "key_status": "compromised", "compromised_at": PAST, "compromise_occurred_at": PAST}),
    ("cryptography.keys", {**AES, "destroyed_at": PAST, "encrypted_private_key": ""}),
    ("cryptography.keys", {**AES, "custody": "RESIDENT", "hsm_key_id": "00ff"}),
    ("authentication.users", USER),
    ("authentication.user_sessions", SESSION),
    ("cryptography.key_rotations", ROTATION),
    ("cryptography.certificates", CERTIFICATE),
    ("cryptography.wrapping_keys", WRAPPING),
]
BAD_KEYS: Final[tuple[Row, ...]] = (
    {"usage_counter": -1},
    {"usage_counter": -1, "max_usage_count": 5},
    {"usage_counter": 6, "max_usage_count": 5},
    {"max_usage_count": 0},
    {"max_usage_count": -1, "usage_counter": -2},
    {"key_name": ""},
    {"key_name": "-a"},
    {"key_name": "a b"},
    {"key_name": "a" * 91},
    {"key_name": "a@0"},
    {"key_name": "a\n"},
    {"key_name": OWNER},
    {"key_name": "AAAAAAAA-0000-4000-8000-00000000000A"},
    {"key_type": "dsa"},
    {"key_type": "rsa"},
    {"key_purpose": "anything"},
    {"key_curve": "secp256k1"},
    {"key_strength": 512},
    {"public_key": "-----BEGIN PUBLIC KEY-----"},
    {"public_key": "kcv:0A1B2C"},
    {"encrypted_private_key": ""},
    {"destroyed_at": PAST},
    {"key_status": "pending"},
    {"key_status": "revoked"},
    {"revoked_at": PAST},
    {"key_status": "compromised"},
    {"compromise_occurred_at": PAST},
    {"expires_at": PAST},
    {"custody": "PLAIN"},
    {"custody": "RESIDENT"},
    {"hsm_key_id": "00ff"},
    {"custody": "RESIDENT", "hsm_key_id": "xyz"},
    {"origin": "FOUND"},
    {"bound_to": "b" * 51},
    {"version": 0},
    {"metadata": "[]"},
    {"record_mac": b"short"},
)
BAD: Final[list[tuple[str, Row, Row]]] = [
    *(("cryptography.keys", AES, change) for change in BAD_KEYS),
    ("authentication.users", USER, {"username": "ab"}),
    ("authentication.users", USER, {"email": "nobody"}),
    ("authentication.users", USER, {"email": "a@b.c|d"}),
    ("authentication.users", USER, {"password_changed_at": None}),
    ("authentication.user_sessions", SESSION, {"session_token": "plain"}),
    ("authentication.user_sessions", SESSION, {"refresh_token": "plain"}),
    ("cryptography.key_rotations", ROTATION, {"new_key_id": OWNER}),
    ("cryptography.key_rotations", ROTATION, {"migration_status": "completed", "completed_at": PAST}),
    ("cryptography.key_rotations", ROTATION, {"migration_status": "completed"}),
    ("cryptography.key_rotations", ROTATION, {"completed_at": PAST}),
    ("cryptography.key_rotations", ROTATION, {"migration_status": "begun"}),
    ("cryptography.certificates", CERTIFICATE, {"certificate_type": "pgp"}),
    ("cryptography.certificates", CERTIFICATE, {"revocation_status": "lost"}),
    ("cryptography.wrapping_keys", WRAPPING, {"kind": "other"}),
    ("cryptography.wrapping_keys", WRAPPING, {"generation": 0}),
]
FOREIGN: Final[list[tuple[str, Row]]] = [
    ("cryptography.keys", {**AES, "user_id": "00000000-0000-4000-8000-00000000dead"}),
    ("cryptography.keys", {**AES, "user_id": OTHER, "parent_key_id": OWNER}),
    ("cryptography.key_rotations", {**ROTATION, "user_id": OTHER}),
    ("cryptography.key_rotations", {**ROTATION, "new_key_id": OTHER}),
    ("cryptography.certificates", {**CERTIFICATE, "user_id": OTHER}),
    ("authentication.user_sessions", {**SESSION, "user_id": "00000000-0000-4000-8000-00000000dead"}),
]

# One row of every table, in an order in which they can be inserted; the ids are those of what the later rows refer to.
NEO_N3: Final = "6e656f00-006e-4033-8000-000000000001"
KEY: Final = "00000000-0000-4000-8000-0000000000a1"
SECOND_KEY: Final = "00000000-0000-4000-8000-0000000000a2"
THIRD_KEY: Final = "00000000-0000-4000-8000-0000000000a3"
ONE: Final = "00000000-0000-4000-8000-000000000011"
TRANSACTION: Final[Row] = {"id": ONE, "network_id": NEO_N3, "user_id": OWNER, "tx_hash": "0x1"}
CONTRACT: Final[Row] = {"id": ONE, "network_id": NEO_N3, "contract_address": "0x1"}
INVOCATION: Final[Row] = {"id": ONE, "network_id": NEO_N3, "contract_id": ONE, "transaction_id": ONE}
CONFIG: Final[Row] = {
    "id": ONE,
    "service_name": "kms",
    "config_key": "size",
    "config_value": "1",
    "environment": "staging",
    "created_by": OWNER,
}
EVENT: Final[Row] = {
    "id": ONE,
    "event_type": "sign",
    "severity": "low",
    "user_id": OWNER,
    "created_at": "2026-01-01 00:00+00",
}
DOMAIN_EVENT: Final[Row] = {
    "id": ONE,
    "aggregate_id": ONE,
    "aggregate_type": "key",
    "aggregate_version": 1,
    "event_type": "created",
    "event_data": "{}",
    "occurred_at": "2026-01-01 00:00+00",
}
EPOCH: Final[Row] = {
    "number": 1,
    "cause": "FIRST_START",
    "system_identifier": 1,
    "timeline": "00000001",
    "database_oid": 1,
}
RESTORED_KEY: Final[Row] = {
    "key_id": KEY,
    "user_id": OWNER,
    "epoch": 1,
    "status_before": "active",
    "deactivated_by_restore": True,
    "confirmed_at": PAST,
    "confirmed_count": 1,
    "confirmed_by": OWNER,
}
GRANT: Final[Row] = {
    "id": ONE,
    "owner_id": OWNER,
    "key_id": KEY,
    "grantee_id": OTHER,
    "operations": ["sign"],
    "granted_by": OWNER,
}
CHECKPOINT: Final[Row] = {
    "tree_size": 1,
    "root_hash": bytes(32),
    "horizon": 1,
    "frontier": [bytes(32)],
    "epoch": 1,
    "note": "note",
}
ONE_OF_EACH: Final[dict[str, Row]] = {
    "authentication.users": {**USER, "id": OWNER},
    "authentication.user_profiles": {"user_id": OWNER},
    "authentication.roles": {"id": ONE, "name": "signer"},
    "authentication.user_roles": {"user_id": OWNER, "role_id": ONE, "granted_by": OWNER},
    "authentication.user_sessions": {**SESSION, "id": ONE},
    "authentication.login_history": {"id": ONE, "user_id": OWNER, "login_method": "password", "success": True},
    "cryptography.keys": {**AES, "id": KEY, "parent_key_id": None, "custody": "RESIDENT", "hsm_key_id": "00ff"},
    "cryptography.key_rotations": {**ROTATION, "id": ONE, "old_key_id": KEY, "new_key_id": None, "initiated_by": OWNER},
    "cryptography.certificates": {**CERTIFICATE, "id": ONE, "key_id": KEY},
    "cryptography.wrapping_keys": WRAPPING,
    "cryptography.epochs": EPOCH,
    "cryptography.restored_keys": RESTORED_KEY,
    "cryptography.key_grants": GRANT,
    "blockchain.networks": {"id": ONE, "name": "private", "network_type": "private", "native_currency": "{}"},
    "blockchain.addresses": {
        "id": ONE,
        "user_id": OWNER,
        "network_id": NEO_N3,
        "address": "N1",
        "key_id": KEY,
        "is_primary": True,
    },
    "blockchain.transactions": TRANSACTION,
    "blockchain.smart_contracts": CONTRACT,
    "blockchain.contract_invocations": INVOCATION,
    "configuration.service_configs": CONFIG,
    "configuration.config_history": {"id": ONE, "config_id": ONE, "change_type": "created", "changed_by": OWNER},
    "configuration.environments": {"id": ONE, "name": "production"},
    "audit.aggregate_heads": {"aggregate_id": ONE, "aggregate_type": "key", "aggregate_version": 1, "user_id": OWNER},
    "audit.domain_events": DOMAIN_EVENT,
    "audit.aggregate_snapshots": {
        "aggregate_id": ONE,
        "aggregate_type": "key",
        "aggregate_version": 1,
        "snapshot_data": "{}",
    },
    "audit.security_events": EVENT,
    "audit.checkpoints": CHECKPOINT,
    "audit.archived_partitions": {"name": "security_events_2020_01", "last_order": 1},
    "audit.data_access_log": {"id": ONE, "user_id": OWNER, "table_name": "keys", "operation": "SELECT"},
    "cryptography.request_records": {
        "user_id": OWNER,
        "rpc": "Sign",
        "request_id": "1",
        "body_mac": b"mac",
        "result": b"result",
        "event_id": ONE,
        "created_at": PAST,
    },
    "cryptography.ledger_writers": {"writer_id": ONE, "batch": 1, "written_at": PAST},
    "schema_migrations": {"version": "9"},
}
# What a second row has instead, where a value of its type is not enough.
SECOND: Final[dict[str, Row]] = {
    "authentication.users": {"username": "dave", "email": "dave@example.org"},
    "authentication.user_profiles": {"user_id": OTHER},
    "authentication.user_roles": {"user_id": OTHER},
    "authentication.user_sessions": {"session_token": "2" * 64, "refresh_token": "3" * 64},
    "cryptography.keys": {"id": SECOND_KEY, "key_name": "second", "hsm_key_id": "00fe"},
    "cryptography.restored_keys": {"key_id": OTHER, "user_id": OTHER},
    "cryptography.key_grants": {"key_id": THIRD_KEY},
    "cryptography.wrapping_keys": {"kind": "sealing"},
    "cryptography.request_records": {"user_id": OTHER},
    "configuration.service_configs": {"environment": "testing"},
    "blockchain.addresses": {"address": "N2", "user_id": OTHER, "key_id": OTHER},
}
BAD_REST: Final[list[tuple[str, Row]]] = [
    ("audit.aggregate_heads", {"aggregate_version": 0}),
    ("audit.aggregate_snapshots", {"aggregate_version": 0}),
    ("audit.checkpoints", {"tree_size": 0, "frontier": []}),
    ("audit.checkpoints", {"tree_size": 3}),
    ("audit.checkpoints", {"root_hash": b"short"}),
    ("audit.data_access_log", {"operation": "TRUNCATE"}),
    ("audit.domain_events", {"processing_status": "lost"}),
    ("audit.domain_events", {"commit_order": -1}),
    ("audit.domain_events", {"event_version": 0}),
    ("audit.domain_events", {"aggregate_version": 0}),
    ("audit.domain_events", {"occurred_at": "infinity"}),
    ("audit.domain_events", {"occurred_at": "0001-01-01 BC"}),
    ("audit.security_events", {"commit_order": -1}),
    ("audit.security_events", {"commit_order": 2**62}),
    ("audit.security_events", {"created_at": "infinity"}),
    ("audit.security_events", {"outcome": "perhaps"}),
    ("audit.security_events", {"risk_score": 101}),
    ("audit.security_events", {"risk_score": -1}),
    ("audit.security_events", {"severity": "none"}),
    ("audit.security_events", {"session_id": ONE, "user_id": None}),
    ("blockchain.addresses", {"address_type": "other"}),
    ("blockchain.contract_invocations", {"execution_status": "unknown"}),
    ("blockchain.networks", {"network_type": "devnet"}),
    ("blockchain.transactions", {"value": -1}),
    ("blockchain.transactions", {"status": "done"}),
    ("configuration.config_history", {"change_type": "renamed"}),
    ("configuration.service_configs", {"version": 0}),
    ("configuration.service_configs", {"environment": "laptop"}),
    ("cryptography.ledger_writers", {"batch": 0}),
    ("cryptography.epochs", {"number": 0}),
    ("cryptography.epochs", {"cause": "WHIM"}),
    ("cryptography.epochs", {"timeline": "1"}),
    ("cryptography.epochs", {"backup_created_at": PAST}),
    ("cryptography.epochs", {"record_mac": b"short"}),
    ("cryptography.restored_keys", {"confirmed_count": None}),
    ("cryptography.restored_keys", {"confirmed_count": -1}),
    ("cryptography.restored_keys", {"confirmed_at": None, "confirmed_count": None}),
    ("cryptography.keys", {"id": KEY, "parent_key_id": KEY}),
    ("cryptography.keys", {"hsm_key_id": None}),
    ("cryptography.keys", {"custody": "PLAIN", "hsm_key_id": None}),
    ("cryptography.keys", {"key_type": "dsa", "key_curve": "dsa", "public_key": "-----BEGIN PUBLIC KEY-----"}),
    ("cryptography.key_rotations", {"new_key_id": KEY}),
    ("cryptography.key_grants", {"grantee_id": OWNER}),
    ("cryptography.key_grants", {"granted_by": OTHER}),
    ("cryptography.key_grants", {"operations": []}),
    ("cryptography.key_grants", {"operations": ["rotate"]}),
    ("cryptography.key_grants", {"operations": [["sign"]]}),
    ("cryptography.key_grants", {"expires_at": PAST}),
    ("cryptography.key_grants", {"revoked_at": PAST}),
]
