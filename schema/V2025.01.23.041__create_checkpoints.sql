-- Checkpoints of the trail: how many rows it has, the root of an RFC 6962 tree over them, and a signed note that says so.
-- docs/formats.md tells the canonical line of a row, the tree and the note.

CREATE TABLE audit.checkpoints (
    tree_size BIGINT PRIMARY KEY,
    root_hash BYTEA NOT NULL,
    horizon BIGINT NOT NULL, -- the rows are those whose commit_order is below it
    frontier BYTEA[] NOT NULL, -- the roots of the perfect subtrees, the largest first: from them the tree goes on
    epoch INTEGER NOT NULL,
    note TEXT NOT NULL,
    created_at TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp(),
    CONSTRAINT tree_has_leaves CHECK (tree_size > 0),
    CONSTRAINT root_hash_size CHECK (octet_length(root_hash) = 32),
    CONSTRAINT frontier_fits_size CHECK (cardinality(frontier) = bit_count(tree_size::BIT(64)))
);
CREATE INDEX idx_checkpoints_epoch ON audit.checkpoints (epoch, tree_size);
CREATE INDEX idx_checkpoints_horizon ON audit.checkpoints (horizon);

-- Partitions of the trail that were put away in files: what a checkpoint tells of their rows is not verified here any more.
CREATE TABLE audit.archived_partitions (
    name TEXT PRIMARY KEY,
    last_order BIGINT NOT NULL, -- the highest commit_order in it
    archived_at TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp()
);

ALTER TABLE audit.checkpoints ENABLE ROW LEVEL SECURITY;
ALTER TABLE audit.checkpoints FORCE ROW LEVEL SECURITY;
ALTER TABLE audit.archived_partitions ENABLE ROW LEVEL SECURITY;
ALTER TABLE audit.archived_partitions FORCE ROW LEVEL SECURITY;

CREATE POLICY checkpoints_read ON audit.checkpoints
    FOR SELECT TO auditor_users, job_runner
    USING (TRUE);
CREATE POLICY checkpoints_ledger_read ON audit.checkpoints
    FOR SELECT TO kms_ledger
    USING (TRUE);
CREATE POLICY checkpoints_ledger ON audit.checkpoints
    FOR INSERT TO kms_ledger
    WITH CHECK (TRUE);
CREATE POLICY archived_partitions_read ON audit.archived_partitions
    FOR SELECT TO auditor_users, job_runner
    USING (TRUE);

GRANT SELECT ON audit.checkpoints TO auditor_users, job_runner;
GRANT SELECT (tree_size, horizon, epoch), INSERT (tree_size, root_hash, horizon, frontier, epoch, note)
    ON audit.checkpoints TO kms_ledger;
GRANT SELECT ON audit.archived_partitions TO auditor_users, job_runner;

-- Append a checkpoint behind the one with previous_size rows (0: none). Raises serialization_failure unless that is the last:
-- of two that go on from one place, one is refused.
CREATE FUNCTION audit.append_checkpoint(
    previous_size BIGINT, tree_size BIGINT, root_hash BYTEA, horizon BIGINT, frontier BYTEA[], epoch INTEGER, note TEXT
) RETURNS VOID
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    made BIGINT;
BEGIN
    PERFORM pg_advisory_xact_lock(hashtext('audit.append_checkpoint'));
    INSERT INTO audit.checkpoints (tree_size, root_hash, horizon, frontier, epoch, note)
    SELECT
        append_checkpoint.tree_size, append_checkpoint.root_hash, append_checkpoint.horizon, append_checkpoint.frontier,
        append_checkpoint.epoch, append_checkpoint.note
    FROM (
        SELECT coalesce(max(c.tree_size), 0) AS tree_size, coalesce(max(c.horizon), 0) AS horizon,
            coalesce(max(c.epoch), 0) AS epoch
        FROM audit.checkpoints AS c
    ) AS last
    WHERE last.tree_size = append_checkpoint.previous_size AND last.tree_size < append_checkpoint.tree_size
        AND last.horizon < append_checkpoint.horizon AND last.epoch <= append_checkpoint.epoch;
    GET DIAGNOSTICS made = ROW_COUNT;
    IF made <> 1 THEN
        RAISE EXCEPTION 'the last checkpoint is not that of % rows', append_checkpoint.previous_size
            USING ERRCODE = 'serialization_failure';
    END IF;
END;
$$;

-- Rows of the trail in its order, behind one place and below an order, each as its canonical line.
CREATE FUNCTION audit.trail_lines(after_order BIGINT, after_table TEXT, after_id UUID, below_order BIGINT, row_limit INTEGER)
RETURNS TABLE (commit_order BIGINT, table_name TEXT, id UUID, line TEXT)
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp SET timezone = 'UTC' SET datestyle = 'ISO'
AS $$
#variable_conflict use_column
DECLARE
    -- Of one transaction domain events come first.
    is_in_first CONSTANT BOOLEAN := after_table = 'audit.domain_events';
    last_id CONSTANT UUID := 'ffffffff-ffff-ffff-ffff-ffffffffffff';
BEGIN
    RETURN QUERY
    SELECT merged.*
    FROM (
        (
            SELECT e.commit_order, 'audit.domain_events' COLLATE "C" AS table_name, e.id, (
                SELECT row_to_json(c)::TEXT
                FROM (
                    SELECT e.aggregate_id::TEXT, e.aggregate_type::TEXT, e.aggregate_version::TEXT, e.causation_id::TEXT,
                        e.commit_order::TEXT, e.correlation_id::TEXT, e.event_data::TEXT, e.event_type::TEXT,
                        e.event_version::TEXT, e.id::TEXT, e.initiated_by::TEXT, e.occurred_at::TEXT,
                        'audit.domain_events' AS "table"
                ) AS c
            ) AS line
            FROM audit.domain_events AS e
            WHERE (e.commit_order, e.id) > (after_order, CASE WHEN is_in_first THEN after_id ELSE last_id END)
                AND e.commit_order < below_order
            ORDER BY e.commit_order, e.id
            LIMIT row_limit
        ) UNION ALL (
            SELECT e.commit_order, 'audit.security_events', e.id, (
                SELECT row_to_json(c)::TEXT
                FROM (
                    SELECT e.action::TEXT, e.commit_order::TEXT, e.created_at::TEXT, e.event_details::TEXT, e.event_type::TEXT,
                        e.id::TEXT, e.outcome::TEXT, e.resource_id::TEXT, e.resource_type::TEXT, e.risk_score::TEXT,
                        e.session_id::TEXT, e.severity::TEXT, e.source_ip::TEXT, 'audit.security_events' AS "table",
                        e.user_agent::TEXT, e.user_id::TEXT
                ) AS c
            )
            FROM audit.security_events AS e
            WHERE (e.commit_order, e.id) > (
                    CASE WHEN is_in_first THEN after_order - 1 ELSE after_order END,
                    CASE WHEN is_in_first THEN last_id ELSE after_id END
                )
                AND e.commit_order < below_order
            ORDER BY e.commit_order, e.id
            LIMIT row_limit
        )
    ) AS merged
    ORDER BY merged.commit_order, merged.table_name, merged.id
    LIMIT row_limit;
END;
$$;

-- Let the order go on above everything that is there: what the beginning of an epoch needs in a database that was made of a
-- dump. Returns the base. Its caller owns audit.order_base() and sees every row.
CREATE FUNCTION audit.raise_order() RETURNS BIGINT
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    highest CONSTANT BIGINT := greatest(
        (SELECT max(e.commit_order) FROM audit.domain_events AS e),
        (SELECT max(e.commit_order) FROM audit.security_events AS e),
        (SELECT max(c.horizon) FROM audit.checkpoints AS c),
        (SELECT max(a.last_order) FROM audit.archived_partitions AS a),
        0
    );
    base CONSTANT BIGINT := greatest(audit.order_base(), highest + 1 - pg_current_xact_id()::TEXT::BIGINT);
BEGIN
    IF base > audit.order_base() THEN
        EXECUTE format(
            'CREATE OR REPLACE FUNCTION audit.order_base() RETURNS BIGINT LANGUAGE sql IMMUTABLE PARALLEL SAFE RETURN %s::BIGINT',
            base
        );
    END IF;
    RETURN base;
END;
$$;

REVOKE ALL ON FUNCTION
    audit.append_checkpoint(BIGINT, BIGINT, BYTEA, BIGINT, BYTEA[], INTEGER, TEXT),
    audit.trail_lines(BIGINT, TEXT, UUID, BIGINT, INTEGER), audit.raise_order()
    FROM PUBLIC;
GRANT EXECUTE ON FUNCTION audit.append_checkpoint(BIGINT, BIGINT, BYTEA, BIGINT, BYTEA[], INTEGER, TEXT) TO job_runner;
GRANT EXECUTE ON FUNCTION audit.trail_lines(BIGINT, TEXT, UUID, BIGINT, INTEGER) TO auditor_users;

GRANT CREATE ON SCHEMA audit TO kms_ledger;
ALTER FUNCTION audit.append_checkpoint(BIGINT, BIGINT, BYTEA, BIGINT, BYTEA[], INTEGER, TEXT) OWNER TO kms_ledger;
REVOKE CREATE ON SCHEMA audit FROM kms_ledger;
