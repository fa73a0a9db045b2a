"""Each ruling on a statement of the specification, in the order of the specification's two lists of defects.

Rows whose claim is shown elsewhere: what no ruling changes (`test_kept_as_written`), partitions of the trail
(`test_trail_partitions`), policies, roles and definer functions (`test_access`), states (`test_statements`), constraints one
by one (`test_refusals`).
"""

from collections.abc import Iterator
from typing import Any, Final
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg import errors

from kms.dev.postgres import FAST_UNSAFE, EmbeddedPostgres
from kms.store.migrate import migrate
from tests.fixtures.clusters import Clusters
from tests.fixtures.postgres import Database
from tests.store.acting import add_user, ensure_partitions, run

ALICE: Final = UUID("aaaaaaaa-0000-4000-8000-000000000001")
BOB: Final = UUID("bbbbbbbb-0000-4000-8000-000000000002")
NEO_N3: Final = UUID("6e656f00-006e-4033-8000-000000000001")
NEO_X: Final = UUID("6e656f00-0078-4000-8000-000000000002")


@pytest.fixture
def admin(database: Database) -> Iterator[psycopg.Connection[Any]]:
    add_user(database.admin_dsn, ALICE, "alice")
    add_user(database.admin_dsn, BOB, "bob")
    with psycopg.connect(database.admin_dsn, autocommit=True) as connection:
        yield connection


def value(admin: psycopg.Connection[Any], query: str, *parameters: object) -> Any:  # noqa: ANN401  # as the query gives it
    row = admin.execute(query.encode(), parameters).fetchone()
    assert row is not None
    return row[0]


def add_address(admin: psycopg.Connection[Any], user: UUID, address: str, *, primary: bool, network: UUID = NEO_N3) -> None:
    admin.execute(
        "INSERT INTO blockchain.addresses (user_id, network_id, address, is_primary) VALUES (%s, %s, %s, %s)",
        (user, network, address, primary),
    )


def test_a_user_has_one_primary_address_per_network(admin: psycopg.Connection[Any]) -> None:
    add_address(admin, ALICE, "N1", primary=True)
    add_address(admin, ALICE, "N2", primary=False)
    add_address(admin, ALICE, "N3", primary=False)
    add_address(admin, ALICE, "X1", primary=True, network=NEO_X)
    add_address(admin, BOB, "N4", primary=True)
    with pytest.raises(errors.UniqueViolation, match="idx_addresses_one_primary"):
        add_address(admin, ALICE, "N5", primary=True)


def test_the_indexes_of_security_events_are_there_once(admin: psycopg.Connection[Any]) -> None:
    query = "SELECT array_agg(indexdef ORDER BY indexname) FROM pg_indexes WHERE tablename = 'security_events'"
    found = value(admin, query)
    assert [text.partition(" USING ")[2] for text in found] == [
        "btree (commit_order, id)",
        "btree (resource_id, created_at DESC) WHERE (resource_id IS NOT NULL)",
        "btree (severity, created_at DESC)",
        "btree (user_id, created_at DESC)",
        "btree (id, created_at)",
    ]


def test_the_index_of_events_to_be_processed_is_by_the_column_that_exists(admin: psycopg.Connection[Any]) -> None:
    query = "SELECT indexdef FROM pg_indexes WHERE indexname = 'idx_domain_events_processing'"
    assert "(processing_status, occurred_at) WHERE" in value(admin, query)


def test_a_transaction_is_his_who_had_it_signed_and_one_only_observed_is_for_administrators_and_auditors(
    database: Database, admin: psycopg.Connection[Any]
) -> None:
    for user, name in ((ALICE, "a"), (BOB, "b"), (None, "observed")):
        admin.execute(
            "INSERT INTO blockchain.transactions (network_id, user_id, tx_hash) VALUES (%s, %s, %s)", (NEO_N3, user, name)
        )
    query = "SELECT tx_hash FROM blockchain.transactions ORDER BY 1"
    assert run(database.dsn, "authenticated_users", ALICE, query) == [("a",)]
    for role in ("admin_users", "auditor_users"):
        assert run(database.dsn, role, "", query) == [("a",), ("b",), ("observed",)]
    assert "(user_id, network_id, status, created_at DESC)" in value(
        admin, "SELECT indexdef FROM pg_indexes WHERE indexname = 'idx_transactions_user_network_status_time'"
    )


def test_transactions_lie_in_the_partition_of_their_network_and_those_of_others_in_default(
    admin: psycopg.Connection[Any],
) -> None:
    other = value(
        admin, "INSERT INTO blockchain.networks (name, network_type, native_currency) VALUES ('x', 'private', '{}') RETURNING id"
    )
    for network in (NEO_N3, NEO_X, other):
        admin.execute("INSERT INTO blockchain.transactions (network_id, tx_hash) VALUES (%s, 'h')", (network,))
    query = b"SELECT network_id, tableoid::regclass::text FROM blockchain.transactions"
    assert dict(admin.execute(query).fetchall()) == {
        NEO_N3: "blockchain.transactions_neo_n3",
        NEO_X: "blockchain.transactions_neo_x",
        other: "blockchain.transactions_default",
    }
    names = b"SELECT id, name FROM blockchain.networks WHERE name LIKE 'neo-%%'"
    assert dict(admin.execute(names, ()).fetchall()) == {NEO_N3: "neo-n3", NEO_X: "neo-x"}


def test_a_contract_is_invoked_by_a_transaction_of_its_own_network(admin: psycopg.Connection[Any]) -> None:
    ids = {}
    for network in (NEO_N3, NEO_X):
        contract, transaction = uuid4(), uuid4()
        admin.execute(
            "INSERT INTO blockchain.smart_contracts (id, network_id, contract_address) VALUES (%s, %s, 'c')", (contract, network)
        )
        admin.execute(
            "INSERT INTO blockchain.transactions (id, network_id, tx_hash) VALUES (%s, %s, 'h')", (transaction, network)
        )
        ids[network] = (contract, transaction)
    insert = b"INSERT INTO blockchain.contract_invocations (network_id, contract_id, transaction_id) VALUES (%s, %s, %s)"
    admin.execute(insert, (NEO_N3, *ids[NEO_N3]))
    for contract, transaction in ((ids[NEO_N3][0], ids[NEO_X][1]), (ids[NEO_X][0], ids[NEO_N3][1])):
        for network in (NEO_N3, NEO_X):
            with pytest.raises(errors.ForeignKeyViolation):
                admin.execute(insert, (network, contract, transaction))


def test_whoever_sees_a_transaction_sees_its_invocations(database: Database, admin: psycopg.Connection[Any]) -> None:
    for user in (ALICE, BOB, None):
        contract, transaction = uuid4(), uuid4()
        admin.execute(
            "INSERT INTO blockchain.smart_contracts (id, network_id, contract_address) VALUES (%s, %s, %s)",
            (contract, NEO_N3, contract.hex),
        )
        admin.execute(
            "INSERT INTO blockchain.transactions (id, network_id, user_id, tx_hash) VALUES (%s, %s, %s, %s)",
            (transaction, NEO_N3, user, transaction.hex),
        )
        admin.execute(
            "INSERT INTO blockchain.contract_invocations (network_id, contract_id, transaction_id) VALUES (%s, %s, %s)",
            (NEO_N3, contract, transaction),
        )
    query = "SELECT count(*) FROM blockchain.contract_invocations"
    assert run(database.dsn, "authenticated_users", ALICE, query) == [(1,)]
    assert run(database.dsn, "authenticated_users", "", query) == [(0,)]
    assert run(database.dsn, "auditor_users", "", query) == [(3,)]


def test_sessions_lie_by_the_hash_of_their_user_and_tokens_are_unique_for_him(admin: psycopg.Connection[Any]) -> None:
    insert = b"""
        INSERT INTO authentication.user_sessions (user_id, session_token, refresh_token, expires_at)
        VALUES (%s, repeat(%s, 64), repeat(%s, 64), now())
    """
    users = [ALICE, BOB, *(uuid4() for _ in range(30))]
    for number, user in enumerate(users[2:]):
        admin.execute(
            "INSERT INTO authentication.users (id, username, email, password_hash, salt) VALUES (%s, %s, %s, '!', '!')",
            (user, f"user{number}", f"user{number}@example.org"),
        )
    for user in users:
        admin.execute(insert, (user, "a", "b"))
    assert value(admin, "SELECT count(DISTINCT tableoid) FROM authentication.user_sessions") == 4
    for session, refresh in (("a", "c"), ("c", "b")):
        with pytest.raises(errors.UniqueViolation):
            admin.execute(insert, (ALICE, session, refresh))


def test_slow_queries_are_shown_to_administrators_in_the_specifications_names(
    database: Database, admin: psycopg.Connection[Any]
) -> None:
    admin.execute(b"SELECT pg_sleep(0.15)")
    admin.execute(b"SELECT pg_sleep(0.15)")
    query = """
        SELECT query, calls, total_time, mean_time, max_time, stddev_time, rows, hit_percent FROM monitoring.slow_queries
        WHERE query LIKE '%%pg_sleep%%'
    """
    (row,) = run(database.dsn, "admin_users", "", query)
    assert row[:2] == ("SELECT pg_sleep($1)", 2)
    assert row[2] > 200
    for role in ("authenticated_users", "auditor_users", "job_runner"):
        with pytest.raises(errors.InsufficientPrivilege):
            run(database.dsn, role, ALICE, query)


def notices_of(connection: psycopg.Connection[Any], query: bytes) -> tuple[list[tuple[Any, ...]], list[str]]:
    said: list[str] = []
    connection.add_notice_handler(lambda notice: said.append(notice.message_primary or ""))
    return connection.execute(query).fetchall(), said


def test_slow_queries_are_none_and_a_notice_without_the_extension(admin: psycopg.Connection[Any]) -> None:
    admin.execute(b"DROP EXTENSION pg_stat_statements")
    rows, said = notices_of(admin, b"SELECT * FROM monitoring.slow_queries")
    assert (rows, said) == ([], ["the extension pg_stat_statements is not made in this database"])


@pytest.fixture(scope="module")
def plain_server(clusters: Clusters) -> Iterator[EmbeddedPostgres]:
    """A server that loads no library."""
    with clusters.empty({**FAST_UNSAFE, "shared_preload_libraries": ""}) as server:
        migrate(server.superuser_dsn())
        yield server


def test_a_server_that_does_not_load_the_extension_is_migrated_and_shows_no_slow_queries(plain_server: EmbeddedPostgres) -> None:
    with psycopg.connect(plain_server.superuser_dsn()) as connection:
        rows, said = notices_of(connection, b"SELECT * FROM monitoring.slow_queries")
    assert (rows, said) == ([], ["pg_stat_statements is not in shared_preload_libraries"])


def test_what_the_server_counts_is_shown_in_the_specifications_names(database: Database, admin: psycopg.Connection[Any]) -> None:
    admin.execute(b"SELECT pg_stat_reset()")  # the test that had this database before may have used an index
    tables = "SELECT schemaname, tablename, inserts, live_tuples, last_vacuum FROM monitoring.table_stats"
    assert ("authentication", "users") in {row[:2] for row in run(database.dsn, "admin_users", "", tables)}
    unused = "SELECT schemaname, tablename, indexname, idx_tup_read, idx_tup_fetch, index_size FROM monitoring.unused_indexes"
    assert "idx_users_email" in {row[2] for row in run(database.dsn, "admin_users", "", unused)}
    admin.execute(b"SET enable_seqscan = off")
    for _ in range(3):
        admin.execute(b"SELECT FROM authentication.users WHERE id = %s", (ALICE,))
    admin.execute(b"SELECT pg_stat_force_next_flush()")
    admin.execute(b"SELECT 1")
    used = "SELECT indexname, selectivity FROM monitoring.index_effectiveness"
    assert "users_pkey" in {row[0] for row in run(database.dsn, "admin_users", "", used)}


def test_the_backup_login_reads_every_row_of_every_table_and_writes_none(
    postgres: EmbeddedPostgres, database: Database, admin: psycopg.Connection[Any]
) -> None:
    ensure_partitions(database.dsn, "4 years")
    power = "SELECT rolbypassrls AND rolcanlogin AND NOT rolsuper FROM pg_roles WHERE rolname = 'backup_user'"
    assert value(admin, power) is True
    query = b"""
        SELECT c.oid::regclass::text, has_table_privilege('backup_user', c.oid, 'SELECT')
                AND has_schema_privilege('backup_user', c.relnamespace, 'USAGE'),
            has_table_privilege('backup_user', c.oid, 'INSERT, UPDATE, DELETE, TRUNCATE')
        FROM pg_class AS c
        WHERE c.relkind IN ('r', 'p', 'v', 'S') AND c.relnamespace::regnamespace::text !~ '^(pg_|information_schema)'
            AND NOT EXISTS (SELECT FROM pg_depend WHERE objid = c.oid AND deptype = 'e')
    """
    found = admin.execute(query).fetchall()
    assert len(found) > 100
    assert [row for row in found if row[1:] != (True, False)] == []
    admin.execute(b"CREATE TABLE cryptography.later ()")
    assert value(admin, "SELECT has_table_privilege('backup_user', 'cryptography.later', 'SELECT')") is True
    admin.execute(b"SET ROLE backup_user")
    assert value(admin, "SELECT count(*) FROM authentication.users") == 2
    admin.execute(b"RESET ROLE")


def test_the_login_of_a_standby_replicates_and_reads_nothing(admin: psycopg.Connection[Any]) -> None:
    query = "SELECT rolreplication AND rolcanlogin AND NOT rolsuper AND NOT rolbypassrls FROM pg_roles WHERE rolname = %s"
    assert value(admin, query, "replication_user") is True
    assert value(admin, "SELECT has_table_privilege('replication_user', 'cryptography.keys', 'SELECT')") is False


def test_a_column_is_added_once_in_any_schema(admin: psycopg.Connection[Any]) -> None:
    add = b"SELECT public.safe_add_column('configuration', 'environments', 'region', %s, %s)"
    for _ in range(2):
        admin.execute(add, ("varchar(20)", "'here'"))
    assert value(admin, "INSERT INTO configuration.environments (name) VALUES ('a') RETURNING region") == "here"
    with pytest.raises(errors.DatatypeMismatch, match="is character varying"):
        admin.execute(add, ("integer", None))
    with pytest.raises(errors.UndefinedTable):
        admin.execute(b"SELECT public.safe_add_column('public', 'environments', 'region', 'text')")


def test_an_index_is_created_once_and_one_that_differs_is_an_error(admin: psycopg.Connection[Any]) -> None:
    create = b"SELECT public.safe_create_index('configuration', 'idx_new', %s, %s, %s)"
    for _ in range(2):
        admin.execute(create, ("environments", "display_name, lower(name)", False))
    assert value(admin, "SELECT count(*) FROM pg_indexes WHERE indexname = 'idx_new'") == 1
    for different in (
        ("environments", "display_name", False),
        ("environments", "display_name, lower(name)", True),
        ("service_configs", "description", False),
    ):
        with pytest.raises(errors.DuplicateObject, match="is there, but is not"):
            admin.execute(create, different)
    admin.execute(b"UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'configuration.idx_new'::regclass")
    with pytest.raises(errors.DuplicateObject):
        admin.execute(create, ("environments", "display_name, lower(name)", False))


def test_sensitive_data_is_encrypted_and_decrypted_and_nobody_of_the_service_may(
    database: Database, admin: psycopg.Connection[Any]
) -> None:
    sealed = value(admin, "SELECT public.encrypt_sensitive_data(%s, 'key')", "seed " * 40)
    assert "seed" not in sealed
    assert value(admin, "SELECT public.decrypt_sensitive_data(%s, 'key')", sealed) == "seed " * 40
    with pytest.raises(errors.ExternalRoutineInvocationException):
        value(admin, "SELECT public.decrypt_sensitive_data(%s, 'other')", sealed)
    for role in ("none", "authenticated_users", "admin_users", "auditor_users", "job_runner"):
        for call in (
            "encrypt_sensitive_data('a', 'b')",
            "decrypt_sensitive_data('a', 'b')",
            "safe_add_column('a', 'b', 'c', 'd')",
        ):
            with pytest.raises(errors.InsufficientPrivilege):
                run(database.dsn, role, ALICE, f"SELECT public.{call}")


def test_functions_of_the_callers_choosing_do_not_get_between(admin: psycopg.Connection[Any]) -> None:
    admin.execute(b"CREATE SCHEMA trap")
    admin.execute(b"CREATE FUNCTION trap.encode(bytea, text) RETURNS text LANGUAGE sql AS $$ SELECT 'caught' $$")
    admin.execute(b"SET search_path = trap, pg_catalog")
    assert value(admin, "SELECT public.encrypt_sensitive_data('x', 'key')") != "caught"


def test_an_extension_that_the_server_lacks_is_left_out(admin: psycopg.Connection[Any]) -> None:
    available = value(admin, "SELECT count(*) FROM pg_available_extensions WHERE name = 'uuid-ossp'")
    assert value(admin, "SELECT count(*) FROM pg_extension WHERE extname = 'uuid-ossp'") == available
    made = "SELECT array_agg(extname::text ORDER BY extname) FROM pg_extension WHERE extname ~ '^pg'"
    assert value(admin, made) == ["pg_stat_statements", "pgcrypto"]


def test_a_setting_writes_its_history_and_advances_its_version(database: Database, admin: psycopg.Connection[Any]) -> None:
    insert = """
        INSERT INTO configuration.service_configs (service_name, config_key, config_value, is_sensitive)
        VALUES ('kms', %s, '"old"', %s) RETURNING created_by
    """
    assert run(database.dsn, "admin_users", ALICE, insert, ("size", False)) == [(ALICE,)]
    run(database.dsn, "admin_users", ALICE, insert, ("secret", True))
    update = "UPDATE configuration.service_configs SET "
    run(database.dsn, "admin_users", BOB, f"""{update} config_value = '"new"'""")
    run(database.dsn, "admin_users", BOB, f"{update} is_active = FALSE WHERE config_key = 'size' RETURNING version")
    query = """
        SELECT config_key, change_type, old_value, new_value, changed_by
        FROM configuration.config_history AS h JOIN configuration.service_configs AS c ON c.id = h.config_id
        ORDER BY 1, h.created_at
    """
    with psycopg.connect(database.admin_dsn) as connection:
        assert connection.execute(query.encode()).fetchall() == [
            ("secret", "created", None, None, ALICE),
            ("secret", "updated", None, None, BOB),
            ("size", "created", None, "old", ALICE),
            ("size", "updated", "old", "new", BOB),
            ("size", "deactivated", "new", "new", BOB),
        ]
    assert value(admin, "SELECT version FROM configuration.service_configs WHERE config_key = 'size'") == 3
    for statement in ("UPDATE configuration.config_history SET change_reason = 'x'", "DELETE FROM configuration.config_history"):
        with pytest.raises(errors.InsufficientPrivilege):
            run(database.dsn, "admin_users", ALICE, statement)


def test_users_are_not_erased_with_what_hangs_on_them(admin: psycopg.Connection[Any]) -> None:
    query = b"""
        SELECT conrelid::regclass, conname FROM pg_constraint
        WHERE contype = 'f' AND confrelid = 'authentication.users'::regclass AND confdeltype NOT IN ('a', 'r')
    """
    assert admin.execute(query).fetchall() == []


def test_security_events_outlive_their_session_and_name_a_user_with_it(admin: psycopg.Connection[Any]) -> None:
    insert = b"INSERT INTO audit.security_events (event_type, severity, user_id, session_id) VALUES ('x', 'low', %s, %s)"
    admin.execute(insert, (ALICE, uuid4()))
    with pytest.raises(errors.CheckViolation, match="session_has_a_user"):
        admin.execute(insert, (None, uuid4()))
    with pytest.raises(errors.ForeignKeyViolation):
        admin.execute(insert, (uuid4(), None))


def test_references_between_rows_of_a_user_carry_the_user(admin: psycopg.Connection[Any]) -> None:
    query = b"""
        SELECT k.conrelid::regclass::text, k.conname FROM pg_constraint AS k
        WHERE k.contype = 'f' AND k.confrelid = 'cryptography.keys'::regclass
            AND NOT EXISTS (
                SELECT FROM unnest(k.conkey, k.confkey) AS pair (here, there)
                    JOIN pg_attribute AS a ON a.attrelid = k.conrelid AND a.attnum = here
                    JOIN pg_attribute AS b ON b.attrelid = k.confrelid AND b.attnum = there
                WHERE a.attname IN ('user_id', 'owner_id', 'key_owner_id') AND b.attname = 'user_id'
            )
    """
    assert admin.execute(query).fetchall() == []
    references = value(admin, "SELECT count(*) FROM pg_constraint WHERE confrelid = 'cryptography.keys'::regclass")
    assert references >= 5
    with pytest.raises(errors.ForeignKeyViolation):
        admin.execute(
            "INSERT INTO blockchain.addresses (user_id, network_id, address, key_id) VALUES (%s, %s, 'N', %s)",
            (ALICE, NEO_N3, uuid4()),
        )
