"""Row security and rights, seen from outside as the service's own login, and found from the catalog.

Tables, partitions and functions are looked up, so that a new one without its rule fails here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final
from uuid import UUID

import psycopg
import pytest
from psycopg import errors, sql
from psycopg.types.json import Jsonb

from tests.fixtures.postgres import Database
from tests.store.access_matrix import BEGIN, BEGIN_DIAGRAM, END, END_DIAGRAM, README, diagram, matrix
from tests.store.acting import add_user

ALICE: Final = UUID("aaaaaaaa-0000-4000-8000-000000000001")
BOB: Final = UUID("bbbbbbbb-0000-4000-8000-000000000002")
CAROL: Final = UUID("cccccccc-0000-4000-8000-000000000003")  # to whom the others grant their keys
ROLES: Final = ("authenticated_users", "admin_users", "auditor_users", "job_runner")
DEFINERS: Final = {"kms_login", "kms_lifecycle", "kms_ledger", "kms_partitions"}
# The one owner of functions that owns tables too: only an owner attaches a partition. Its policies show it their rows.
OWNER_OF_PARTITIONED: Final = "kms_partitions"
NOT_PROTECTED: Final = {"schema_migrations"}
# Tables without a column that names a user, and the roles that see their rows.
NOBODYS: Final = {
    "audit.aggregate_snapshots": {"auditor_users", "job_runner"},
    "audit.domain_events": {"auditor_users", "job_runner"},
    "audit.checkpoints": {"auditor_users", "job_runner"},
    "audit.archived_partitions": {"auditor_users", "job_runner"},
    "blockchain.contract_invocations": {"authenticated_users", "admin_users", "auditor_users", "job_runner"},
    "blockchain.networks": {"authenticated_users", "admin_users", "auditor_users", "job_runner"},
    "blockchain.smart_contracts": {"authenticated_users", "admin_users", "auditor_users", "job_runner"},
    "configuration.config_history": {"admin_users", "auditor_users"},
    "configuration.environments": {"admin_users", "auditor_users", "job_runner"},
    "configuration.service_configs": {"admin_users", "job_runner"},
    "authentication.roles": {"authenticated_users", "admin_users", "auditor_users"},
    "cryptography.certificate_authorities": {"authenticated_users", "admin_users", "auditor_users", "job_runner"},
    "cryptography.acme_nonces": set(),
    "cryptography.acme_orders": {"job_runner"},
    "cryptography.crls": {"job_runner"},
    "cryptography.ledger_writers": set(),
    "cryptography.ocsp_answers": {"job_runner"},
    "cryptography.epochs": {"job_runner", "admin_users"},
    "cryptography.rewrapping": {"job_runner"},
    "cryptography.wrapping_keys": {"job_runner"},
}
# Of a row that names no user, the table whose row does.
SEEN_THROUGH: Final = {"blockchain.contract_invocations": "blockchain.transactions"}
UNSEEN_BY_THEIR_USER: Final = {"audit.aggregate_heads", "cryptography.request_records"}
# Who may call what runs as a role that can append to the trail: nothing that takes the lines themselves from its caller.
TRAIL_TABLES: Final = ["aggregate_heads", "checkpoints", "data_access_log", "domain_events", "security_events"]
ENTRANCES: Final = {
    "audit.append_checkpoint": {"job_runner"},
    "audit.drain_default": {"job_runner"},
    "audit.ensure_partitions": {"job_runner"},
    "audit.record_history_event": {"job_runner"},
    "audit.record_reading": {"auditor_users"},
    "audit.record_refusals": {"kms_service"},
    "authentication.assign_role": {"admin_users"},
    "authentication.create_service_user": {"admin_users"},
    "cryptography.abandon_certificate": {"job_runner"},
    "cryptography.add_acme_order": {"job_runner"},
    "cryptography.add_certificate": {"authenticated_users", "job_runner"},
    "cryptography.adopt_child": {"job_runner"},
    "cryptography.begin_first_epoch": {"job_runner"},
    "cryptography.certificates_without_ocsp_answer": {"job_runner"},
    "cryptography.certificates_without_outcome": {"job_runner"},
    "cryptography.change_acme_account": {"authenticated_users", "job_runner"},
    "cryptography.change_acme_order": {"job_runner"},
    "cryptography.change_authority": {"authenticated_users"},
    "cryptography.claim_rewrapping": {"job_runner"},
    "cryptography.claim_rotations": {"job_runner"},
    "cryptography.clear_rotation_policy": {"authenticated_users"},
    "cryptography.complete_certificate": {"authenticated_users", "job_runner"},
    "cryptography.complete_rewrapping": {"job_runner"},
    "cryptography.complete_rotation": {"job_runner"},
    "cryptography.confirm_restored_key": {"admin_users"},
    "cryptography.copy_grants": {"job_runner"},
    "cryptography.create_acme_account": {"authenticated_users"},
    "cryptography.create_authority": {"authenticated_users"},
    "cryptography.crls_to_look_at": {"job_runner"},
    "cryptography.destroy_keys": {"job_runner"},
    "cryptography.extend_rewrapping_lease": {"job_runner"},
    "cryptography.extend_rotation_lease": {"job_runner"},
    "cryptography.fail_rewrapping": {"job_runner"},
    "cryptography.fail_rotation": {"job_runner"},
    "cryptography.finish_rewrapping_step": {"job_runner"},
    "cryptography.finish_rotation_step": {"job_runner"},
    "cryptography.forget_acme": {"job_runner"},
    "cryptography.forget_answers": {"job_runner"},
    "cryptography.forget_ocsp_answers": {"job_runner"},
    "cryptography.grant_key": {"authenticated_users"},
    "cryptography.keep_answer": {"authenticated_users"},
    "cryptography.look_at_policy_later": {"job_runner"},
    "cryptography.mark_addresses": {"job_runner"},
    "cryptography.move_key": {"authenticated_users"},
    "cryptography.note_wrapping_keys_destroyed": {"job_runner"},
    "cryptography.plan_rewrapping": {"job_runner"},
    "cryptography.release_rewrapping": {"job_runner"},
    "cryptography.policies_reached": {"job_runner"},
    "cryptography.policies_to_look_at": {"job_runner"},
    "cryptography.release_rotation": {"job_runner"},
    "cryptography.request_due_rotation": {"job_runner"},
    "cryptography.request_rotation": {"authenticated_users"},
    "cryptography.retire_wrapping_keys": {"job_runner"},
    "cryptography.retry_rotation": {"authenticated_users"},
    "cryptography.revoke_grant": {"authenticated_users"},
    "cryptography.revoke_certificate": {"authenticated_users", "job_runner"},
    "cryptography.rotation_backlog": {"job_runner"},
    "cryptography.set_rotation_policy": {"authenticated_users"},
    "cryptography.settle": {"kms_service"},
    "cryptography.settled": {"kms_service"},
    "cryptography.spend_acme_nonce": {"job_runner"},
    "cryptography.store_crl": {"job_runner"},
    "cryptography.store_ocsp_answer": {"job_runner"},
    "cryptography.store_rewrapped": {"job_runner"},
    "cryptography.supersede_certificate": {"authenticated_users", "job_runner"},
    "cryptography.switch_key": {"job_runner"},
}
HIDDEN: Final = {
    "authentication.users": {"password_hash", "salt", "mfa_secret"},
    "authentication.user_profiles": {"two_factor_backup_codes"},
    "authentication.user_sessions": {"session_token", "refresh_token"},
    "cryptography.keys": {"encrypted_private_key"},
}
_PROFILE: Final = {
    "first_name",
    "last_name",
    "display_name",
    "avatar_url",
    "preferred_language",
    "timezone",
    "date_format",
    "time_format",
    "theme",
    "notifications_enabled",
    "marketing_emails",
    "metadata",
}
_NEW_KEY: Final = {
    "created_at",
    "key_status",
    "record_mac",
    "id",
    "user_id",
    "key_name",
    "key_type",
    "key_purpose",
    "key_curve",
    "public_key",
    "encrypted_private_key",
    "key_derivation_path",
    "parent_key_id",
    "hsm_key_id",
    "encryption_algorithm",
    "key_strength",
    "metadata",
    "custody",
    "origin",
    "bound_to",
    "max_usage_count",
    "activated_at",
    "expires_at",
}
_NETWORK: Final = {
    "chain_id",
    "network_magic",
    "rpc_endpoints",
    "websocket_endpoints",
    "explorer_urls",
    "native_currency",
    "block_time_seconds",
    "confirmation_blocks",
    "is_active",
    "configuration",
}
_ADDRESS: Final = {
    "id",
    "user_id",
    "network_id",
    "address",
    "address_type",
    "key_id",
    "derivation_path",
    "label",
    "is_primary",
    "is_watch_only",
}
_CONFIG: Final = {"config_value", "value_type", "is_encrypted", "is_sensitive", "is_active", "schema_validation", "description"}
_ENVIRONMENT: Final = {
    "display_name",
    "description",
    "is_production",
    "deployment_config",
    "health_check_urls",
    "monitoring_config",
}
# Of these the job writes every column.
FILLED_BY_THE_JOB: Final = {"blockchain.transactions", "blockchain.smart_contracts", "blockchain.contract_invocations"}
MAY_INSERT: Final = {
    ("admin_users", "blockchain.networks"): _NETWORK | {"id", "name", "network_type"},
    ("authenticated_users", "blockchain.addresses"): _ADDRESS,
    ("admin_users", "configuration.service_configs"): _CONFIG | {"id", "service_name", "config_key", "environment"},
    ("admin_users", "configuration.environments"): _ENVIRONMENT | {"id", "name"},
    ("job_runner", "audit.aggregate_snapshots"): {
        "aggregate_id",
        "aggregate_type",
        "aggregate_version",
        "snapshot_data",
        "created_at",
    },
    ("authenticated_users", "authentication.user_profiles"): _PROFILE | {"user_id"},
    ("authenticated_users", "cryptography.keys"): _NEW_KEY,
    ("job_runner", "cryptography.wrapping_keys"): {"id", "kind", "generation", "token_serial"},
}
MAY_UPDATE: Final = {
    ("admin_users", "blockchain.networks"): _NETWORK,
    ("authenticated_users", "blockchain.addresses"): {"label", "is_primary"},
    ("job_runner", "blockchain.addresses"): {"balance_cache", "last_balance_update"},
    ("job_runner", "blockchain.transactions"): {
        "tx_index",
        "block_number",
        "block_hash",
        "block_timestamp",
        "gas_used",
        "status",
        "confirmation_count",
        "receipt",
        "logs",
        "error_message",
        "confirmed_at",
    },
    ("job_runner", "blockchain.smart_contracts"): {
        "contract_name",
        "contract_symbol",
        "decimals",
        "total_supply",
        "contract_type",
        "abi",
        "bytecode",
        "source_code",
        "compiler_version",
        "is_verified",
        "is_proxy",
        "implementation_address",
    },
    ("admin_users", "configuration.service_configs"): _CONFIG,
    ("admin_users", "configuration.environments"): _ENVIRONMENT,
    ("job_runner", "audit.aggregate_snapshots"): {"aggregate_version", "snapshot_data", "created_at"},
    ("job_runner", "audit.domain_events"): {"processed_at", "processing_status", "retry_count", "error_message"},
    ("authenticated_users", "authentication.user_profiles"): _PROFILE,
    ("authenticated_users", "cryptography.keys"): {"key_name", "metadata"},
    ("job_runner", "cryptography.wrapping_keys"): {"token_serial", "backup_confirmed_at"},
}

ROWS_OF_A_USER: Final = """
    INSERT INTO authentication.users (id, username, email, password_hash, salt)
        VALUES (%(user)s, %(name)s, %(name)s || '@example.org', '!', '!');
    INSERT INTO authentication.user_profiles (user_id) VALUES (%(user)s);
    INSERT INTO authentication.user_roles (user_id, role_id)
        SELECT %(user)s, id FROM authentication.roles WHERE name <> 'rotator'; -- whose policy opens the rotations of all users
    INSERT INTO authentication.user_sessions (user_id, session_token, refresh_token, expires_at)
        VALUES (%(user)s, repeat('0', 64), repeat('1', 64), now() + interval '1 hour');
    INSERT INTO authentication.login_history (user_id, login_method, success) VALUES (%(user)s, 'password', true);
    INSERT INTO cryptography.keys (
        id, user_id, key_name, key_type, key_purpose, public_key, encrypted_private_key, key_strength, custody, origin
    ) VALUES
        (%(key)s, %(user)s, 'old', 'aes', 'encryption', 'kcv:000000', 'x', 256, 'SEALED', 'GENERATED'),
        (gen_random_uuid(), %(user)s, 'new', 'aes', 'encryption', 'kcv:000000', 'x', 256, 'SEALED', 'GENERATED');
    INSERT INTO cryptography.key_rotations (user_id, old_key_id, rotation_reason) VALUES (%(user)s, %(key)s, 'age');
    INSERT INTO cryptography.rotation_policies (user_id, key_name, on_compromise, is_paused, version, policy_mac)
        VALUES (%(user)s, 'old', true, false, 1, decode(repeat('00', 32), 'hex'));
    INSERT INTO cryptography.certificate_authorities (
        id, name, generation, manager_id, key_id, key_owner_id, status, subject, created_at, version, record_mac
    ) VALUES (
        %(key)s, %(name)s, 1, %(user)s, %(key)s, %(user)s, 'pending', 'CN=root', now(), 1, sha256('')
    );
    INSERT INTO cryptography.crls (issuer_id, shard, number, crl, entries, this_update, next_update)
    SELECT id, 0, 1, 'der', 0, now(), now() + interval '1 day' FROM cryptography.certificate_authorities
    ON CONFLICT DO NOTHING;
    INSERT INTO cryptography.ocsp_answers (issuer_id, serial_number, hash_name, answer, is_revoked, this_update, next_update)
    SELECT id, '1', 'sha1', 'der', FALSE, now(), now() + interval '1 day' FROM cryptography.certificate_authorities
    ON CONFLICT DO NOTHING;
    INSERT INTO cryptography.acme_accounts (id, authority, user_id, status, created_at, bind_before, version, record_mac)
        VALUES (%(key)s, %(name)s, %(user)s, 'pending', now(), now(), 1, sha256(''));
    INSERT INTO cryptography.acme_orders (id, account_id, content, created_at, expires_at, version, record_mac)
        VALUES (%(key)s, %(key)s, '{}', now(), now(), 1, sha256(''));
    INSERT INTO cryptography.acme_nonces (nonce, expires_at) VALUES (uuid_send(%(key)s), now());
    INSERT INTO cryptography.certificates (
        user_id, key_id, certificate_type, certificate_data, fingerprint, profile, issuance_status, tbs_sha256, spki_sha256,
        record_mac
    ) VALUES (
        %(user)s, %(key)s, 'x509', 'x', '00', 'server', 'imported', sha256(''), sha256(''), sha256('')
    );
    INSERT INTO cryptography.key_grants (owner_id, key_id, grantee_id, operations, granted_by)
        VALUES (%(user)s, %(key)s, %(carol)s, '{sign}', %(user)s);
    INSERT INTO cryptography.epochs (number, cause, system_identifier, timeline, database_oid)
        VALUES (1, 'RESTORED', 1, '00000001', 1) ON CONFLICT DO NOTHING;
    INSERT INTO cryptography.restored_keys VALUES (%(key)s, %(user)s, 1, 'active', true);
    INSERT INTO audit.aggregate_heads VALUES (gen_random_uuid(), 'account', 1, %(user)s);
    INSERT INTO cryptography.request_records VALUES (%(user)s, 'Sign', '1', '', '', gen_random_uuid(), now());
    INSERT INTO cryptography.ledger_writers VALUES (gen_random_uuid(), 1, '{OK}', now());
    INSERT INTO audit.domain_events (aggregate_id, aggregate_type, aggregate_version, event_type, event_data)
        VALUES (%(key)s, 'key', 1, 'created', '{}');
    INSERT INTO audit.aggregate_snapshots VALUES (%(key)s, 'key', 1, '{}');
    INSERT INTO audit.security_events (event_type, severity, user_id) VALUES ('sign', 'low', %(user)s);
    INSERT INTO audit.security_events (event_type, severity, user_id, created_at) VALUES ('sign', 'low', %(user)s, '1999-01-01');
    INSERT INTO audit.data_access_log (user_id, table_name, operation) VALUES (%(user)s, 'keys', 'SELECT');
    INSERT INTO blockchain.addresses (user_id, network_id, address, key_id)
        SELECT %(user)s, id, %(name)s, %(key)s FROM blockchain.networks;
    INSERT INTO blockchain.smart_contracts (network_id, contract_address) SELECT id, %(name)s FROM blockchain.networks;
    INSERT INTO blockchain.transactions (user_id, network_id, tx_hash) SELECT %(user)s, id, %(name)s FROM blockchain.networks;
    INSERT INTO blockchain.contract_invocations (network_id, contract_id, transaction_id)
        SELECT c.network_id, c.id, t.id
        FROM blockchain.smart_contracts AS c JOIN blockchain.transactions AS t USING (network_id)
        WHERE t.user_id = %(user)s AND c.contract_address = %(name)s;
"""


@pytest.fixture
def admin(database: Database) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(database.admin_dsn, autocommit=True) as connection:
        yield connection


@pytest.fixture
def service(database: Database, admin: psycopg.Connection[Any]) -> Iterator[psycopg.Connection[Any]]:
    """The service's login, on a database with rows of two users in every table."""
    admin.execute(b"INSERT INTO authentication.roles (name) VALUES ('signer')")
    add_user(database.admin_dsn, CAROL, "carol")
    for user, name in ((ALICE, "alice"), (BOB, "bob")):
        psycopg.ClientCursor(admin).execute(ROWS_OF_A_USER, {"user": user, "name": name, "key": user, "carol": CAROL})
    admin.execute(b"""
        INSERT INTO cryptography.wrapping_keys VALUES (gen_random_uuid(), 'kek', 1, 'serial');
        INSERT INTO cryptography.rewrapping (sealing_key_id, slice) SELECT id, 0 FROM cryptography.wrapping_keys;
        INSERT INTO audit.checkpoints SELECT 1, hash, 1, ARRAY[hash], 1, '' FROM sha256('') AS hash;
        INSERT INTO audit.archived_partitions VALUES ('security_events_2020_01', 1);
        INSERT INTO blockchain.networks (name, network_type, native_currency) VALUES ('another', 'private', '{}');
        INSERT INTO configuration.service_configs (service_name, config_key, config_value) VALUES ('kms', 'size', '{}');
        INSERT INTO configuration.environments (name) VALUES ('production');
    """)
    with psycopg.connect(database.dsn) as connection:
        yield connection


@contextmanager
def acting(service: psycopg.Connection[Any], role: str, user: UUID | str) -> Iterator[None]:
    with service.transaction(force_rollback=True):
        service.execute("SELECT set_config('role', %s, true), set_config('app.user_id', %s, true)", (role, str(user)))
        yield


def refusal(service: psycopg.Connection[Any], statement: sql.Composed | bytes) -> type[psycopg.Error] | None:
    """Run the statement in a savepoint and return how it was refused."""
    try:
        with service.transaction(force_rollback=True):
            service.execute(statement)
    except psycopg.Error as error:
        return type(error)
    return None


def is_denied(service: psycopg.Connection[Any], statement: sql.Composed | bytes) -> bool:
    """Whether the right is missing. A row that a policy refuses has the same SQLSTATE, but was let in by the rights."""
    try:
        with service.transaction(force_rollback=True):
            service.execute(statement)
    except psycopg.Error as error:
        return (error.diag.message_primary or "").startswith("permission denied")
    return False


def tables(admin: psycopg.Connection[Any], *, partitions: bool = False) -> dict[str, list[str]]:
    """Return each table with its columns, but not the record of migrations."""
    found: dict[str, list[str]] = {}
    query = b"""
        SELECT c.oid::regclass::text, a.attname FROM pg_class AS c JOIN pg_attribute AS a ON a.attrelid = c.oid
        WHERE c.relkind IN ('r', 'p') AND c.relnamespace::regnamespace::text !~ '^(pg_|information_schema)'
            AND a.attnum > 0 AND NOT a.attisdropped AND (NOT c.relispartition OR %s)
        ORDER BY 1, a.attnum
    """
    for table, column in admin.execute(query, (partitions,)):
        if table not in NOT_PROTECTED:
            found.setdefault(table, []).append(column)
    return found


def owner_column(table: str, columns: list[str]) -> str | None:
    if table == "authentication.users":
        return "id"
    return next((name for name in ("user_id", "owner_id") if name in columns), None)


def named(table: str) -> sql.Identifier:
    return sql.Identifier(*table.split("."))


def unprotected(admin: psycopg.Connection[Any]) -> set[str]:
    query = b"SELECT relrowsecurity AND relforcerowsecurity FROM pg_class WHERE oid = %s::regclass"
    return {name for name in tables(admin, partitions=True) if admin.execute(query, (name,)).fetchone() != (True,)}


def test_row_security_is_forced_on_every_table_and_partition(admin: psycopg.Connection[Any]) -> None:
    assert len(tables(admin, partitions=True)) >= 14
    assert unprotected(admin) == set()
    admin.execute(b"CREATE TABLE cryptography.forgotten (user_id uuid)")
    assert unprotected(admin) == {"cryptography.forgotten"}


def test_partitions_have_the_policies_of_their_parents_and_no_rights(admin: psycopg.Connection[Any]) -> None:
    query = b"""
        WITH policies (relation, found) AS (
            SELECT polrelid, array_agg((
                polname, polcmd, polroles, pg_get_expr(polqual, polrelid), pg_get_expr(polwithcheck, polrelid)
            )::text ORDER BY polname)
            FROM pg_policy GROUP BY polrelid
        )
        SELECT c.oid::regclass::text, own.found = parents.found
        FROM pg_class AS c
            JOIN pg_inherits AS i ON i.inhrelid = c.oid
            LEFT JOIN policies AS own ON own.relation = c.oid
            LEFT JOIN policies AS parents ON parents.relation = i.inhparent
        WHERE c.relispartition AND c.relkind = 'r'
    """
    found = admin.execute(query).fetchall()
    assert len(found) >= 60
    assert [row for row in found if row[1] is not True] == []
    rights = b"""
        SELECT c.oid::regclass, r.rolname FROM pg_class AS c CROSS JOIN pg_roles AS r
        WHERE c.relispartition AND c.relkind = 'r' AND r.oid <> c.relowner
            AND (r.rolname ~ '^kms_' AND r.rolname <> 'kms_migrator' OR r.rolname = ANY (%s))
            AND (has_any_column_privilege(r.oid, c.oid, 'SELECT, INSERT, UPDATE')
                OR has_table_privilege(r.oid, c.oid, 'DELETE, TRUNCATE, REFERENCES, TRIGGER'))
    """
    assert admin.execute(rights, (list(ROLES),)).fetchall() == []
    admin.execute(b"GRANT SELECT (id) ON audit.security_events_2026_01 TO job_runner")
    assert len(admin.execute(rights, (list(ROLES),)).fetchall()) == 1


def test_every_policy_says_which_rows_may_be_written(admin: psycopg.Connection[Any]) -> None:
    query = b"""
        SELECT polrelid::regclass, polname FROM pg_policy
        WHERE polcmd IN ('*', 'w', 'a') AND polwithcheck IS NULL OR polcmd <> 'a' AND polqual IS NULL OR polroles = '{0}'
    """
    assert admin.execute(query).fetchall() == []


def test_the_services_login_owns_nothing_and_is_only_what_it_should_be(admin: psycopg.Connection[Any]) -> None:
    owned = b"SELECT classid::regclass, objid FROM pg_shdepend WHERE refobjid = 'kms_service'::regrole AND deptype = 'o'"
    assert admin.execute(owned).fetchall() == []
    member = b"""
        SELECT roleid::regrole::text, inherit_option, set_option, admin_option FROM pg_auth_members
        WHERE member = 'kms_service'::regrole ORDER BY 1
    """
    assert admin.execute(member).fetchall() == [(role, False, True, False) for role in sorted(ROLES)]
    power = b"""
        SELECT rolsuper, rolbypassrls, rolcreaterole, rolcreatedb, rolreplication, rolinherit FROM pg_roles
        WHERE rolname = 'kms_service'
    """
    assert admin.execute(power).fetchone() == (False,) * 6


def test_definer_functions_belong_to_roles_that_own_no_table(admin: psycopg.Connection[Any]) -> None:
    query = b"""
        SELECT p.oid::regprocedure::text, pg_get_userbyid(p.proowner)::text,
            EXISTS (SELECT FROM pg_class AS c WHERE c.relowner = p.proowner),
            'search_path=pg_catalog, pg_temp' = ANY (p.proconfig)
        FROM pg_proc AS p WHERE p.prosecdef AND p.pronamespace::regnamespace::text !~ '^(pg_|information_schema)'
    """
    found = admin.execute(query).fetchall()
    assert len(found) >= 2
    assert {owner for _, owner, _, _ in found} <= DEFINERS
    assert [row for row in found if (row[2] and row[1] != OWNER_OF_PARTITIONED) or not row[3]] == []


def test_the_owner_of_partitioned_tables_owns_nothing_else_and_sees_their_rows(admin: psycopg.Connection[Any]) -> None:
    query = b"""
        SELECT c.oid::regclass::text, c.relispartition, EXISTS (
            SELECT FROM pg_policy WHERE polrelid = c.oid AND polcmd = '*' AND polroles = ARRAY[c.relowner]
                AND pg_get_expr(polqual, polrelid) = 'true' AND pg_get_expr(polwithcheck, polrelid) = 'true'
        )
        FROM pg_class AS c WHERE c.relowner = %s::regrole AND c.relkind IN ('r', 'p', 'v', 'm', 'S')
    """
    found = admin.execute(query, (OWNER_OF_PARTITIONED,)).fetchall()
    assert {name for name, is_partition, _ in found if not is_partition} == {"audit.domain_events", "audit.security_events"}
    assert [name for name, _, sees in found if not sees] == []


def test_definer_roles_cannot_log_in_and_nobody_becomes_one(admin: psycopg.Connection[Any]) -> None:
    for role in DEFINERS:
        query = b"""
            SELECT rolcanlogin OR rolsuper OR rolbypassrls OR rolinherit OR EXISTS (
                SELECT FROM pg_auth_members WHERE roleid = r.oid AND set_option AND member::regrole::text <> 'kms_migrator'
            ) FROM pg_roles AS r WHERE rolname = %s
        """
        assert admin.execute(query, (role,)).fetchone() == (False,)


def test_no_function_may_be_called_by_everybody(admin: psycopg.Connection[Any]) -> None:
    query = b"""
        SELECT p.oid::regprocedure FROM pg_proc AS p
        WHERE p.pronamespace::regnamespace::text !~ '^(pg_|information_schema)'
            AND EXISTS (SELECT FROM aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) WHERE grantee = 0)
            AND NOT EXISTS (SELECT FROM pg_depend WHERE objid = p.oid AND deptype = 'e')
    """
    assert admin.execute(query).fetchall() == []


def entrances(admin: psycopg.Connection[Any]) -> dict[str, set[str]]:
    """Return the functions that run as a role that can append to the trail, by itself or by another, and who may call each."""
    query = b"""
        WITH RECURSIVE appending (role) AS (
            SELECT r.oid FROM pg_roles AS r
            WHERE NOT r.rolsuper AND NOT r.rolname = ANY (%(service)s) AND EXISTS (
                SELECT FROM pg_class AS c
                WHERE c.relnamespace = 'audit'::regnamespace AND c.relname = ANY (%(tables)s)
                    AND has_any_column_privilege(r.oid, c.oid, 'INSERT')
            )
            UNION
            SELECT r.oid
            FROM appending AS a
                JOIN pg_proc AS p ON p.prosecdef AND p.proowner = a.role
                JOIN pg_roles AS r ON has_function_privilege(r.oid, p.oid, 'EXECUTE')
            WHERE NOT r.rolsuper AND NOT r.rolname = ANY (%(service)s)
        )
        SELECT p.oid::regproc::text, r.rolname::text
        FROM appending AS a
            JOIN pg_proc AS p ON p.prosecdef AND p.proowner = a.role
            JOIN pg_roles AS r ON has_function_privilege(r.oid, p.oid, 'EXECUTE')
        WHERE r.rolname = ANY (%(service)s) AND p.provolatile = 'v'
    """
    found: dict[str, set[str]] = {}
    for function, role in admin.execute(query, {"service": ["kms_service", *ROLES], "tables": TRAIL_TABLES}):
        found.setdefault(function, set()).add(role)
    return found


def test_the_service_appends_to_the_trail_by_the_listed_functions_alone(admin: psycopg.Connection[Any]) -> None:
    assert entrances(admin) == ENTRANCES, "say in ENTRANCES who may call it"
    admin.execute(b"GRANT EXECUTE ON FUNCTION audit.append_event TO job_runner")
    assert entrances(admin).keys() - ENTRANCES.keys() == {"audit.append_event"}


def test_the_matrix_in_the_readme_is_that_of_the_catalog(admin: psycopg.Connection[Any]) -> None:
    written = README.read_text().partition(BEGIN)[2].partition(END)[0].strip()
    assert written == matrix(admin).strip(), "run python -m tests.store.access_matrix"


def test_the_diagram_in_the_readme_is_that_of_the_catalog(admin: psycopg.Connection[Any]) -> None:
    written = README.read_text().partition(BEGIN_DIAGRAM)[2].partition(END_DIAGRAM)[0].strip()
    assert written == diagram(admin).strip(), "run python -m tests.store.access_matrix"
    assert written.count("erDiagram") == 6


@pytest.mark.parametrize("role", ROLES)
def test_nobody_writes_more_than_he_may_not_even_his_own_rows(
    admin: psycopg.Connection[Any], service: psycopg.Connection[Any], role: str
) -> None:
    wrong = []
    with acting(service, role, ALICE):
        for table, columns in tables(admin).items():
            for column in columns:
                target, name = named(table), sql.Identifier(column)
                insert = sql.SQL("INSERT INTO {} ({}) VALUES (DEFAULT)").format(target, name)
                update = sql.SQL("UPDATE {} SET {} = DEFAULT").format(target, name)
                for statement, may in ((insert, MAY_INSERT), (update, MAY_UPDATE)):
                    is_filled = may is MAY_INSERT and role == "job_runner" and table in FILLED_BY_THE_JOB
                    if is_denied(service, statement) == (is_filled or column in may.get((role, table), set())):
                        wrong.append(statement.as_string())
            wrong += [word + table for word in ("DELETE FROM ", "TRUNCATE ") if not is_denied(service, (word + table).encode())]
    assert wrong == []


def test_a_user_sees_his_own_rows_and_no_others_in_every_table(
    admin: psycopg.Connection[Any], service: psycopg.Connection[Any]
) -> None:
    seen = 0
    with acting(service, "authenticated_users", BOB):
        for table, columns in tables(admin).items():
            owner = owner_column(table, columns)
            if owner is None:
                continue
            query = sql.SQL("SELECT DISTINCT {} FROM {}").format(sql.Identifier(owner), named(table))
            if table in UNSEEN_BY_THEIR_USER:
                assert is_denied(service, query), table
            else:
                assert service.execute(query).fetchall() == [(BOB,)], table
            seen += 1
    assert seen >= 11


def test_what_names_no_user_is_seen_by_the_roles_that_are_listed(
    admin: psycopg.Connection[Any], service: psycopg.Connection[Any]
) -> None:
    nameless = {table: columns for table, columns in tables(admin).items() if owner_column(table, columns) is None}
    assert set(nameless) == set(NOBODYS), "say in NOBODYS who sees the rows"
    for role in ROLES:
        with acting(service, role, ALICE):
            for table, columns in nameless.items():
                query = sql.SQL("SELECT count({}) > 0 FROM {}").format(sql.Identifier(columns[0]), named(table))
                if role in NOBODYS[table]:
                    assert service.execute(query).fetchone() == (True,), (role, table)
                else:
                    assert is_denied(service, query), (role, table)


def test_without_a_user_there_are_no_rows(admin: psycopg.Connection[Any], service: psycopg.Connection[Any]) -> None:
    for user in ("", UUID(int=0)):
        with acting(service, "authenticated_users", user):
            for table, columns in tables(admin).items():
                owner = owner_column(table, columns)
                if owner is not None and table not in UNSEEN_BY_THEIR_USER:
                    query = sql.SQL("SELECT count({}) FROM {}").format(sql.Identifier(owner), named(table))
                    assert service.execute(query).fetchone() == (0,), table


def test_without_a_role_there_is_nothing_at_all(admin: psycopg.Connection[Any], service: psycopg.Connection[Any]) -> None:
    service.execute("SELECT set_config('app.user_id', %s, false)", (str(ALICE),))
    for table in tables(admin, partitions=True):
        query = sql.SQL("SELECT count(*) FROM {}").format(named(table))
        assert refusal(service, query) is errors.InsufficientPrivilege, table


def granted_everything(admin: psycopg.Connection[Any]) -> None:
    """Give users every right on every table and partition, so that nothing but the policies is left."""
    for table in tables(admin, partitions=True):
        schema = sql.Identifier(table.partition(".")[0])
        admin.execute(sql.SQL("GRANT USAGE ON SCHEMA {} TO authenticated_users").format(schema))
        admin.execute(sql.SQL("GRANT ALL ON {} TO authenticated_users").format(named(table)))


def test_policies_alone_keep_users_apart_in_every_table_and_partition(
    admin: psycopg.Connection[Any], service: psycopg.Connection[Any]
) -> None:
    granted_everything(admin)
    shown = 0
    with acting(service, "authenticated_users", BOB):
        for table, columns in tables(admin, partitions=True).items():
            owner = owner_column(table, columns)
            if owner is None and "authenticated_users" in NOBODYS.get(table, ()) and table not in SEEN_THROUGH:
                continue
            key = sql.Identifier(owner or columns[0])
            rows = service.execute(sql.SQL("SELECT {} FROM {}").format(key, named(table))).fetchall()
            if table in SEEN_THROUGH:
                assert len(rows) == len(service.execute(b"SELECT FROM " + SEEN_THROUGH[table].encode()).fetchall()), table
                continue
            assert {row[0] for row in rows} <= ({BOB} if owner else set()), table
            shown += len(rows)
            others = sql.SQL("WHERE {} <> {}").format(key, sql.Literal(BOB)) if owner else sql.SQL("")
            update = sql.SQL("UPDATE {} SET {} = {} {}").format(named(table), key, key, others)
            delete = sql.SQL("DELETE FROM {} {}").format(named(table), others)
            for statement in (update, delete):
                with service.transaction(force_rollback=True):
                    assert service.execute(statement).rowcount == 0, statement.as_string()
    assert shown >= 12


def test_policies_alone_refuse_a_row_for_another_user_in_every_table(
    admin: psycopg.Connection[Any], service: psycopg.Connection[Any]
) -> None:
    granted_everything(admin)
    tried = set()
    for table, columns in tables(admin).items():
        owner = owner_column(table, columns)
        of_alice = sql.SQL("WHERE {} = {}").format(sql.Identifier(owner), sql.Literal(ALICE)) if owner else sql.SQL("")
        row = admin.execute(sql.SQL("SELECT to_jsonb(t) FROM {} AS t {} LIMIT 1").format(named(table), of_alice)).fetchone()
        assert row is not None, f"ROWS_OF_A_USER makes no row of {table}"
        copy = sql.SQL("INSERT INTO {} SELECT * FROM jsonb_populate_record(NULL::{}, {})").format(
            named(table), named(table), sql.Literal(Jsonb(row[0]))
        )
        refused = pytest.raises(errors.InsufficientPrivilege, match="row-level security")
        with acting(service, "authenticated_users", BOB), refused, service.transaction():
            service.execute(copy)
        tried.add(table)
    assert len(tried) >= 13


def test_another_users_row_cannot_be_changed_or_made(service: psycopg.Connection[Any]) -> None:
    with acting(service, "authenticated_users", BOB):
        changed = service.execute("UPDATE cryptography.keys SET metadata = '{}' WHERE user_id = %s", (ALICE,))
        assert changed.rowcount == 0
        changed = service.execute("UPDATE authentication.user_profiles SET theme = 'x' WHERE user_id = %s", (ALICE,))
        assert changed.rowcount == 0
        make = sql.SQL(
            "INSERT INTO cryptography.keys (user_id, key_name, key_type, key_purpose, public_key, encrypted_private_key,"
            " key_strength, custody, origin)"
            " VALUES ({}, 'planted', 'aes', 'encryption', 'kcv:000000', 'x', 256, 'SEALED', 'GENERATED')"
        )
        assert refusal(service, make.format(sql.Literal(BOB))) is None
        assert refusal(service, make.format(sql.Literal(ALICE))) is errors.InsufficientPrivilege


def test_a_key_cannot_be_hung_under_another_users(service: psycopg.Connection[Any]) -> None:
    with acting(service, "authenticated_users", BOB):
        make = sql.SQL(
            "INSERT INTO cryptography.keys (user_id, parent_key_id, key_name, key_type, key_purpose, public_key,"
            " encrypted_private_key, key_strength, custody, origin)"
            " VALUES ({}, {}, 'child', 'aes', 'encryption', 'kcv:000000', 'x', 256, 'SEALED', 'GENERATED')"
        )
        assert refusal(service, make.format(sql.Literal(BOB), sql.Literal(BOB))) is None
        assert refusal(service, make.format(sql.Literal(BOB), sql.Literal(ALICE))) is errors.ForeignKeyViolation


@pytest.mark.parametrize("name", ["old@7", "another@1"])
def test_a_user_gives_no_key_the_name_of_a_predecessor(
    admin: psycopg.Connection[Any], service: psycopg.Connection[Any], name: str
) -> None:
    rename = sql.SQL("UPDATE cryptography.keys SET key_name = {} WHERE key_name = 'old'").format(sql.Literal(name))
    make = sql.SQL(
        "INSERT INTO cryptography.keys (user_id, key_name, key_type, key_purpose, public_key, encrypted_private_key,"
        " key_strength, custody, origin)"
        " VALUES ({}, {}, 'aes', 'encryption', 'kcv:000000', 'x', 256, 'SEALED', 'GENERATED')"
    ).format(sql.Literal(BOB), sql.Literal(name))
    with acting(service, "authenticated_users", BOB):
        assert refusal(service, rename) is errors.CheckViolation
        assert refusal(service, make) is errors.CheckViolation
        assert refusal(service, b"UPDATE cryptography.keys SET key_name = 'renamed' WHERE key_name = 'old'") is None
    admin.execute(b"UPDATE cryptography.keys SET key_name = 'old@1' WHERE key_name = 'old'")
    with acting(service, "authenticated_users", BOB):
        changed = service.execute(b"UPDATE cryptography.keys SET key_name = 'old@1', metadata = '{}' WHERE key_name = 'old@1'")
        assert changed.rowcount == 1


@pytest.mark.parametrize("role", ROLES)
def test_hidden_columns_stay_hidden(service: psycopg.Connection[Any], role: str) -> None:
    with acting(service, role, ALICE):
        for table, columns in HIDDEN.items():
            for column in columns:
                query = sql.SQL("SELECT {} FROM {}").format(sql.Identifier(column), named(table))
                expected = None if (role, column) == (ROLES[0], "encrypted_private_key") else errors.InsufficientPrivilege
                assert refusal(service, query) is expected, (table, column)
            assert refusal(service, sql.SQL("TABLE {}").format(named(table))) is (
                None if (role, table) == (ROLES[0], "cryptography.keys") else errors.InsufficientPrivilege
            )


@pytest.mark.parametrize("role", ["none", *ROLES])
def test_the_service_cannot_turn_its_fetters_off(service: psycopg.Connection[Any], role: str) -> None:
    attempts = (
        b"ALTER TABLE cryptography.keys DISABLE ROW LEVEL SECURITY",
        b"ALTER TABLE cryptography.keys NO FORCE ROW LEVEL SECURITY",
        b"DROP POLICY keys_own_data ON cryptography.keys",
        b"ALTER ROLE kms_service BYPASSRLS",
        b"GRANT kms_lifecycle TO kms_service",
        b"SET ROLE kms_lifecycle",
        b"SET ROLE postgres",
        b"SET SESSION AUTHORIZATION postgres",
        b"CREATE TABLE public.own ()",
        b"CREATE TEMP TABLE own ()",
        b"CREATE SCHEMA own",
        b"SET session_replication_role = replica",
        b"SELECT pg_read_file('postmaster.pid')",
        b"COPY authentication.users TO PROGRAM 'cat'",
        b"SELECT rolpassword FROM pg_authid",
        b"INSERT INTO public.schema_migrations (version) VALUES ('9')",
        b"SELECT lo_from_bytea(0, 'abc')",
        b"SELECT lo_create(0)",
        b"SELECT lo_creat(-1)",
        b"SELECT lo_import('/etc/hostname')",
    )
    with acting(service, role, ALICE):
        for attempt in attempts:
            assert refusal(service, attempt) is errors.InsufficientPrivilege, attempt


def test_nobody_but_a_superuser_has_to_do_with_large_objects(admin: psycopg.Connection[Any]) -> None:
    query = b"""
        SELECT p.oid::regprocedure FROM pg_proc AS p
        WHERE p.pronamespace = 'pg_catalog'::regnamespace AND p.proname ~ '^lo_|^lo(read|write)$'
            AND EXISTS (
                SELECT FROM pg_roles AS r
                WHERE NOT r.rolsuper AND r.rolname !~ '^pg_' AND has_function_privilege(r.oid, p.oid, 'EXECUTE')
            )
    """
    assert admin.execute(query).fetchall() == []
    admin.execute(b"GRANT EXECUTE ON FUNCTION lo_create(oid) TO job_runner")
    assert len(admin.execute(query).fetchall()) == 1


def test_row_security_switched_off_is_an_error_and_not_a_view_of_everything(service: psycopg.Connection[Any]) -> None:
    with acting(service, "authenticated_users", ALICE):
        service.execute("SET LOCAL row_security = off")
        assert refusal(service, b"SELECT id FROM cryptography.keys") is errors.InsufficientPrivilege


def test_other_logins_may_not_even_connect(database: Database, admin: psycopg.Connection[Any]) -> None:
    assert admin.execute(b"SELECT has_database_privilege('pg_monitor', current_database(), 'CONNECT')").fetchone() == (False,)
