-- Views of what the server counts. Administrators read them; of other logins' statements they see the text only as members
-- of pg_read_all_stats, which takes a superuser to grant.

CREATE SCHEMA monitoring;
GRANT USAGE ON SCHEMA monitoring TO admin_users;

-- The statements of this database, in the specification's names. No rows, and a notice, where pg_stat_statements is not made
-- or not in shared_preload_libraries: a view that named it could not even be created.
CREATE FUNCTION monitoring.statement_statistics()
RETURNS TABLE (
    query TEXT, calls BIGINT, total_time DOUBLE PRECISION, mean_time DOUBLE PRECISION, max_time DOUBLE PRECISION,
    stddev_time DOUBLE PRECISION, rows BIGINT, shared_blks_hit BIGINT, shared_blks_read BIGINT
)
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    home TEXT;
BEGIN
    SELECT n.nspname INTO home
    FROM pg_extension AS e JOIN pg_namespace AS n ON n.oid = e.extnamespace
    WHERE e.extname = 'pg_stat_statements';
    IF home IS NULL THEN
        RAISE NOTICE 'the extension pg_stat_statements is not made in this database';
        RETURN;
    END IF;
    RETURN QUERY EXECUTE format(
        'SELECT s.query, s.calls, s.total_exec_time, s.mean_exec_time, s.max_exec_time, s.stddev_exec_time, s.rows,
             s.shared_blks_hit, s.shared_blks_read
         FROM %I.pg_stat_statements AS s JOIN pg_catalog.pg_database AS d ON d.oid = s.dbid
         WHERE d.datname = current_database()', home
    );
EXCEPTION WHEN object_not_in_prerequisite_state THEN
    RAISE NOTICE 'pg_stat_statements is not in shared_preload_libraries';
END;
$$;
REVOKE ALL ON FUNCTION monitoring.statement_statistics() FROM PUBLIC;
GRANT EXECUTE ON FUNCTION monitoring.statement_statistics() TO admin_users;

-- security_invoker: whoever asks sees what he may, not what the owner may.
CREATE VIEW monitoring.slow_queries WITH (security_invoker = TRUE) AS
SELECT
    query, calls, total_time, mean_time, max_time, stddev_time, rows,
    100.0 * shared_blks_hit / nullif(shared_blks_hit + shared_blks_read, 0) AS hit_percent
FROM monitoring.statement_statistics()
WHERE mean_time > 100 -- milliseconds
ORDER BY total_time DESC;

CREATE VIEW monitoring.table_stats WITH (security_invoker = TRUE) AS
SELECT
    schemaname,
    relname AS tablename,
    n_tup_ins AS inserts,
    n_tup_upd AS updates,
    n_tup_del AS deletes,
    n_tup_hot_upd AS hot_updates,
    n_live_tup AS live_tuples,
    n_dead_tup AS dead_tuples,
    last_vacuum,
    last_autovacuum,
    last_analyze,
    last_autoanalyze
FROM pg_catalog.pg_stat_user_tables
ORDER BY n_live_tup DESC;

CREATE VIEW monitoring.unused_indexes WITH (security_invoker = TRUE) AS
SELECT
    schemaname,
    relname AS tablename,
    indexrelname AS indexname,
    idx_tup_read,
    idx_tup_fetch,
    pg_size_pretty(pg_relation_size(indexrelid)) AS index_size
FROM pg_catalog.pg_stat_user_indexes
WHERE idx_tup_read = 0 AND idx_tup_fetch = 0
ORDER BY pg_relation_size(indexrelid) DESC;

CREATE VIEW monitoring.index_effectiveness WITH (security_invoker = TRUE) AS
SELECT
    schemaname,
    relname AS tablename,
    indexrelname AS indexname,
    idx_tup_read,
    idx_tup_fetch,
    idx_tup_read::FLOAT / greatest(idx_tup_fetch, 1) AS selectivity,
    pg_size_pretty(pg_relation_size(indexrelid)) AS index_size
FROM pg_catalog.pg_stat_user_indexes
WHERE idx_tup_read > 0
ORDER BY selectivity DESC;

GRANT SELECT ON
    monitoring.slow_queries, monitoring.table_stats, monitoring.unused_indexes, monitoring.index_effectiveness
    TO admin_users;

DO $$
BEGIN
    IF NOT pg_catalog.pg_has_role('admin_users', 'pg_read_all_stats', 'USAGE') THEN
        GRANT pg_read_all_stats TO admin_users WITH INHERIT TRUE, SET FALSE;
    END IF;
EXCEPTION
    WHEN insufficient_privilege THEN
        RAISE NOTICE 'pg_read_all_stats takes a superuser to grant: run schema/bootstrap.sql';
    WHEN unique_violation THEN
        NULL; -- another migration granted it first
END $$;
