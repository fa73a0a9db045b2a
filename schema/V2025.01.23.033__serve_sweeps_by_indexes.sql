-- Sweeps read what they are after, and not the table: answers to be forgotten, restored keys that wait.

-- Only its owner replaces a function, and a migrator that is no superuser is not the owner.
GRANT CREATE ON SCHEMA cryptography TO kms_ledger;
SET LOCAL ROLE kms_ledger;

-- By the rows' places: joined on the key, 10,000 rows are enough for the planner to read every answer of the day. They cannot
-- move meanwhile, since they are locked.
CREATE OR REPLACE FUNCTION cryptography.forget_answers() RETURNS BIGINT
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    removed BIGINT;
BEGIN
    DELETE FROM cryptography.request_records AS r
    WHERE r.ctid = ANY (ARRAY(
        SELECT o.ctid
        FROM cryptography.request_records AS o
        WHERE o.created_at <= (SELECT clock_timestamp()) - INTERVAL '24 hours' -- bare it is volatile, and no index serves it
        ORDER BY o.created_at
        LIMIT 10000
        FOR UPDATE SKIP LOCKED
    ));
    GET DIAGNOSTICS removed = ROW_COUNT;
    DELETE FROM cryptography.ledger_writers AS w WHERE w.written_at <= clock_timestamp() - INTERVAL '1 day';
    RETURN removed;
END;
$$;

RESET ROLE;
REVOKE CREATE ON SCHEMA cryptography FROM kms_ledger;
GRANT SELECT (ctid) ON cryptography.request_records TO kms_ledger;

-- squawk-ignore require-concurrent-index-creation
CREATE INDEX idx_restored_keys_unconfirmed ON cryptography.restored_keys (user_id, key_id) WHERE confirmed_at IS NULL;
