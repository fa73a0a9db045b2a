-- No row stands where those who verify the trail do not look.

-- The order of a row is the id of a transaction above the base: neither negative, nor more than there ever are. Not validated:
-- of a row that is there already the verifier tells.
ALTER TABLE audit.domain_events
    ADD CONSTRAINT commit_order_of_a_transaction CHECK (commit_order >= 0 AND commit_order < 4611686018427387904) NOT VALID;
ALTER TABLE audit.security_events
    ADD CONSTRAINT commit_order_of_a_transaction CHECK (commit_order >= 0 AND commit_order < 4611686018427387904) NOT VALID;

-- Rows of the trail in its order, behind one place and below an order (NULL: to the end), each as its canonical line. The
-- table '' with the id of zeros is the place before all rows of an order. Rows that share their place come together, beyond
-- the limit if need be: none can hide behind another at the end of a page.
CREATE OR REPLACE FUNCTION audit.trail_lines(
    after_order BIGINT, after_table TEXT, after_id UUID, below_order BIGINT, row_limit INTEGER
)
RETURNS TABLE (commit_order BIGINT, table_name TEXT, id UUID, line TEXT)
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp SET timezone = 'UTC' SET datestyle = 'ISO'
AS $$
#variable_conflict use_column
DECLARE
    -- Of one transaction domain events come first.
    is_in_second CONSTANT BOOLEAN := after_table = 'audit.security_events';
    first_id CONSTANT UUID := '00000000-0000-0000-0000-000000000000';
    last_id CONSTANT UUID := 'ffffffff-ffff-ffff-ffff-ffffffffffff';
    last_order CONSTANT BIGINT := coalesce(below_order - 1, 9223372036854775807);
BEGIN
    RETURN QUERY
    SELECT page.*
    FROM (
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
                WHERE (e.commit_order, e.id) >= (after_order, CASE WHEN is_in_second THEN last_id ELSE after_id END)
                    AND (
                        after_table = ''
                        OR (e.commit_order, e.id) <> (after_order, CASE WHEN is_in_second THEN last_id ELSE after_id END)
                    )
                    AND e.commit_order <= last_order
                ORDER BY e.commit_order, e.id
                FETCH FIRST (row_limit) ROWS WITH TIES
            ) UNION ALL (
                SELECT e.commit_order, 'audit.security_events', e.id, (
                    SELECT row_to_json(c)::TEXT
                    FROM (
                        SELECT e.action::TEXT, e.commit_order::TEXT, e.created_at::TEXT, e.event_details::TEXT,
                            e.event_type::TEXT, e.id::TEXT, e.outcome::TEXT, e.resource_id::TEXT, e.resource_type::TEXT, e.risk_score::TEXT,
                            e.session_id::TEXT, e.severity::TEXT, e.source_ip::TEXT, 'audit.security_events' AS "table",
                            e.user_agent::TEXT, e.user_id::TEXT
                    ) AS c
                )
                FROM audit.security_events AS e
                WHERE (e.commit_order, e.id) >= (after_order, CASE WHEN is_in_second THEN after_id ELSE first_id END)
                    AND (NOT is_in_second OR (e.commit_order, e.id) <> (after_order, after_id))
                    AND e.commit_order <= last_order
                ORDER BY e.commit_order, e.id
                FETCH FIRST (row_limit) ROWS WITH TIES
            )
        ) AS merged
        ORDER BY merged.commit_order, merged.table_name, merged.id
        FETCH FIRST (row_limit) ROWS WITH TIES
    ) AS page
    ORDER BY page.commit_order, page.table_name, page.id, page.line COLLATE "C";
END;
$$;

-- As it was, but what no transaction can have written does not count: it is for the verifier to tell, and must not keep a
-- database from being restored.
CREATE OR REPLACE FUNCTION audit.raise_order() RETURNS BIGINT
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    beyond CONSTANT BIGINT := 4611686018427387904;
    highest CONSTANT BIGINT := greatest(
        (SELECT max(e.commit_order) FROM audit.domain_events AS e WHERE e.commit_order < beyond),
        (SELECT max(e.commit_order) FROM audit.security_events AS e WHERE e.commit_order < beyond),
        (SELECT max(c.horizon) FROM audit.checkpoints AS c WHERE c.horizon < beyond),
        (SELECT max(a.last_order) FROM audit.archived_partitions AS a WHERE a.last_order < beyond),
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
