"""What the specification says and no ruling changes stands in the catalog as written.

`specification.txt` has its facts, one a line: what the catalog said after the specification's own statements had been run.
Nothing of them is lost; columns, constraints and NOT NULL may be added.
"""

import re
from pathlib import Path
from typing import Any, Final

import psycopg
import pytest

from tests.fixtures.postgres import Database

SPECIFICATION: Final = Path(__file__).with_name("specification.txt")
# By reason, what stands instead of a fact: [[as specified=>as ruled]]; nothing where the whole line is in the brackets.
RULED: Final = r"""
users are never deleted:
authentication.login_history FOREIGN KEY (user_id) REFERENCES authentication.users(id) ON DELETE [[CASCADE=>RESTRICT]]
authentication.user_profiles FOREIGN KEY (user_id) REFERENCES authentication.users(id) ON DELETE [[CASCADE=>RESTRICT]]
authentication.user_roles FOREIGN KEY (role_id) REFERENCES authentication.roles(id) ON DELETE [[CASCADE=>RESTRICT]]
authentication.user_roles FOREIGN KEY (user_id) REFERENCES authentication.users(id) ON DELETE [[CASCADE=>RESTRICT]]
authentication.user_sessions FOREIGN KEY (user_id) REFERENCES authentication.users(id) ON DELETE [[CASCADE=>RESTRICT]]
blockchain.addresses FOREIGN KEY (user_id) REFERENCES authentication.users(id) ON DELETE [[CASCADE=>RESTRICT]]
cryptography.keys FOREIGN KEY (user_id) REFERENCES authentication.users(id) ON DELETE [[CASCADE=>RESTRICT]]
references carry the user:
blockchain.addresses FOREIGN KEY (key_id[[=>, user_id]]) REFERENCES cryptography.keys(id[[=>, user_id]])
cryptography.certificates FOREIGN KEY (key_id[[=>, user_id]]) REFERENCES cryptography.keys(id[[=>, user_id]])
cryptography.key_rotations FOREIGN KEY (new_key_id[[=>, user_id]]) REFERENCES cryptography.keys(id[[=>, user_id]])
cryptography.key_rotations FOREIGN KEY (old_key_id[[=>, user_id]]) REFERENCES cryptography.keys(id[[=>, user_id]])
cryptography.keys FOREIGN KEY (parent_key_id[[=>, user_id]]) REFERENCES cryptography.keys(id[[=>, user_id]])
keys of a partitioned table contain what it is partitioned by:
audit.domain_events PRIMARY KEY (id[[=>, occurred_at]])
audit.security_events PRIMARY KEY (id[[=>, created_at]])
authentication.user_sessions PRIMARY KEY (id[[=>, user_id]])
authentication.user_sessions UNIQUE ([[=>user_id, ]]refresh_token)
authentication.user_sessions UNIQUE ([[=>user_id, ]]session_token)
blockchain.transactions PRIMARY KEY (id[[=>, network_id]])
a contract is invoked in its own network:
blockchain.contract_invocations FOREIGN KEY (contract_id[[=>, network_id]]) REFERENCES blockchain.smart_contracts(id[[=>, network_id]])
blockchain.contract_invocations FOREIGN KEY (transaction_id[[=>, network_id]]) REFERENCES blockchain.transactions(id[[=>, network_id]])
heads keep the order of aggregates:
audit.[[domain_events UNIQUE (aggregate_id, aggregate_version)=>aggregate_heads PRIMARY KEY (aggregate_id)]]
sessions are purged:
[[audit.security_events FOREIGN KEY (session_id) REFERENCES authentication.user_sessions(id)=>]]
the check of an e-mail address:
authentication.users email_format CHECK (email ~* '^[A-Za-z0-9._%+-]+@[A-Za-z0-9.-]+\.[A-Z[[|=>]]a-z]{2,}$')
secp256r1:
cryptography.keys keys_key_type_check CHECK (key_type = ANY (ARRAY['secp256k1',[[=> 'secp256r1',]] 'ed25519', 'rsa', 'aes']))
keys of certificates may be held elsewhere, and what decides is never left out:
[[cryptography.certificates.key_id NOT NULL=>]]
names of certificates are as long as RFC 5280 lets them be:
cryptography.certificates.issuer [[character varying(255)=>text]]
cryptography.certificates.subject [[character varying(255)=>text]]
a rotation has no successor until it is completed:
[[cryptography.key_rotations.new_key_id NOT NULL=>]]
names of keys are compared byte by byte:
cryptography.keys.key_name character varying(100)[[=> COLLATE C]]
who makes a setting is who acts:
configuration.service_configs.created_by uuid[[=> DEFAULT authentication.current_user_id()]]
safe functions take the schema:
FUNCTION public.safe_add_column([[=>schema_name text, ]]table_name text, column_name text, column_type text, default_value text DEFAULT NULL) RETURNS void
FUNCTION public.safe_create_index([[=>schema_name text, ]]index_name text, table_name text, columns text, unique_index boolean DEFAULT false) RETURNS void
the server may lack the extension:
[[monitoring.slow_queries: FROM pg_stat_statements=>]]
PostgreSQL calls it otherwise:
monitoring.index_effectiveness: [[=>indexrelname AS ]]indexname
monitoring.index_effectiveness: [[=>relname AS ]]tablename
monitoring.table_stats: [[=>relname AS ]]tablename
monitoring.unused_indexes: [[=>indexrelname AS ]]indexname
monitoring.unused_indexes: [[=>relname AS ]]tablename
"""  # noqa: E501  # a fact is a line
_OURS: Final = "c.relnamespace::regnamespace::text !~ '^(pg_|information_schema)'"
_COLUMNS: Final = f"""
    FROM pg_class AS c JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
        JOIN pg_type AS t ON t.oid = a.atttypid LEFT JOIN pg_attrdef AS d ON d.adrelid = c.oid AND d.adnum = a.attnum
    WHERE c.relkind IN ('r', 'p', 'v') AND NOT c.relispartition AND {_OURS}"""
_FACTS: Final = (
    f"""SELECT concat_ws(' ', format('%s.%s', c.oid::regclass, a.attname), format_type(a.atttypid, a.atttypmod),
        (SELECT 'COLLATE ' || collname FROM pg_collation WHERE oid = a.attcollation AND oid <> t.typcollation),
        'DEFAULT ' || pg_get_expr(d.adbin, d.adrelid)) {_COLUMNS}""",
    f"SELECT format('%s.%s NOT NULL', c.oid::regclass, a.attname) {_COLUMNS} AND a.attnotnull",
    f"""SELECT concat_ws(' ', c.oid::regclass, CASE contype WHEN 'c' THEN conname END, pg_get_constraintdef(k.oid, true))
        FROM pg_constraint AS k JOIN pg_class AS c ON c.oid = k.conrelid
        WHERE contype IN ('c', 'f', 'p', 'u', 'x') AND NOT c.relispartition AND {_OURS}""",
    f"""SELECT replace(pg_get_indexdef(i.indexrelid), ' ON ONLY ', ' ON ')
        FROM pg_index AS i JOIN pg_class AS c ON c.oid = i.indrelid
        WHERE i.indisvalid AND NOT c.relispartition AND {_OURS}""",
    f"""SELECT pg_get_triggerdef(t.oid, true) FROM pg_trigger AS t JOIN pg_class AS c ON c.oid = t.tgrelid
        WHERE NOT t.tgisinternal AND t.tgenabled = 'O' AND {_OURS}""",
    f"""SELECT format('%s is a partition of %s %s', c.oid::regclass, i.inhparent::regclass, pg_get_expr(c.relpartbound, c.oid))
        FROM pg_class AS c JOIN pg_inherits AS i ON i.inhrelid = c.oid WHERE c.relkind = 'r' AND {_OURS}""",
    f"SELECT format('%s has row security', c.oid::regclass) FROM pg_class AS c WHERE c.relrowsecurity AND {_OURS}",
    """SELECT format('%I.%I POLICY %s FOR %s TO %s USING %s', schemaname, tablename, policyname, cmd, roles::text, qual)
        FROM pg_policies""",
    f"""SELECT format('%s: %s', c.oid::regclass, rtrim(ltrim(line), ',;'))
        FROM pg_class AS c, string_to_table(pg_get_viewdef(c.oid, true), E'\\n') AS line WHERE c.relkind = 'v' AND {_OURS}""",
    f"""SELECT concat_ws(' ', format('FUNCTION %s(%s)', p.oid::regproc, pg_get_function_arguments(p.oid)), 'RETURNS',
            pg_get_function_result(p.oid), CASE WHEN p.prosecdef THEN 'SECURITY DEFINER' END)
        FROM pg_proc AS p WHERE {_OURS.replace("c.relnamespace", "p.pronamespace")}""",
)


def facts(connection: psycopg.Connection[Any]) -> set[str]:
    """Return what the catalog says, every name with its schema; casts of texts to texts are left out."""
    connection.execute("SET search_path = ''; SET timezone = 'UTC'")
    tidy = "SELECT regexp_replace(fact, '::(character varying|text)(\\[\\])?', '', 'g') FROM ({}) AS said (fact)"
    return {fact for query in _FACTS for (fact,) in connection.execute(tidy.format(query).encode())}


def specified() -> set[str]:
    return {line for line in SPECIFICATION.read_text().splitlines() if line and not line.startswith("#")}


def ruled() -> dict[str, str]:
    """Return what stands instead of each fact that a ruling changes, '' for nothing."""
    change = re.compile(r"\[\[(.*?)=>(.*?)\]\]")
    lines = [line for line in RULED.splitlines() if "=>" in line]
    return {change.sub(r"\1", line): change.sub(r"\2", line) for line in lines}


def test_what_is_specified_is_there_but_for_what_is_ruled(database: Database) -> None:
    with psycopg.connect(database.admin_dsn) as connection:
        found = facts(connection)
    assert len(specified()) > 500
    assert specified() - found == set(ruled())
    assert set(ruled().values()) - found == {""}


@pytest.mark.parametrize(
    "change",
    [
        "DROP INDEX authentication.idx_users_email; CREATE INDEX idx_users_email ON authentication.users (email)",
        "DROP INDEX cryptography.idx_keys_user_status; CREATE INDEX idx_keys_user_status ON cryptography.keys (user_id)",
        "ALTER TABLE authentication.users ALTER failed_login_attempts SET DEFAULT 1",
        "ALTER TABLE blockchain.networks ALTER confirmation_blocks DROP DEFAULT",
        "ALTER TABLE blockchain.smart_contracts ALTER total_supply TYPE DECIMAL(38, 0)",
        "ALTER TABLE audit.security_events DROP CONSTRAINT security_events_risk_score_check",
        "DROP TRIGGER tr_user_profiles_updated_at ON authentication.user_profiles",
        "ALTER TABLE configuration.service_configs DISABLE TRIGGER tr_service_configs_updated_at",
        "{slow} WHERE mean_time > 1000 ORDER BY total_time DESC",
        "{slow} WHERE mean_time > 100 ORDER BY total_time",
    ],
)
def test_a_change_that_no_ruling_makes_is_seen(database: Database, change: str) -> None:
    slow = """CREATE OR REPLACE VIEW monitoring.slow_queries AS
        SELECT query, calls, total_time, mean_time, max_time, stddev_time, rows,
            100.0 * shared_blks_hit / nullif(shared_blks_hit + shared_blks_read, 0) AS hit_percent
        FROM monitoring.statement_statistics()"""
    with psycopg.connect(database.admin_dsn) as connection:
        connection.execute(change.format(slow=slow).encode())
        assert len(specified() - set(ruled()) - facts(connection)) == 1
        connection.rollback()
