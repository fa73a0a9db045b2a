-- The ledger: uses of keys are charged and recorded together, many in one statement, and with each the answer that a repeat
-- of the request gets. Everything here belongs to kms_ledger, which can do this and nothing else.

-- What an answered request gave, for a repeat of it. Signatures, ciphertexts and wrapped data keys; never plaintext.
CREATE TABLE cryptography.request_records (
    user_id UUID NOT NULL REFERENCES authentication.users (id) ON DELETE RESTRICT,
    rpc TEXT NOT NULL,
    request_id TEXT NOT NULL,
    body_mac BYTEA NOT NULL,
    result BYTEA NOT NULL,
    event_id UUID NOT NULL, -- the row of audit.security_events that was written with it
    created_at TIMESTAMPTZ NOT NULL,
    PRIMARY KEY (user_id, rpc, request_id)
);
COMMENT ON TABLE cryptography.request_records IS 'Emptied by a restore: its answers belong to charges that were rolled back.';
CREATE INDEX idx_request_records_created_at ON cryptography.request_records (created_at);

-- The last batch of each connection that writes batches. A batch whose answer was lost is looked up here, and one that had
-- not arrived is kept from ever counting: its number is taken.
CREATE TABLE cryptography.ledger_writers (
    writer_id UUID PRIMARY KEY,
    batch BIGINT NOT NULL CHECK (batch > 0),
    verdicts TEXT[], -- of that batch; NULL: it never was, and never will be
    written_at TIMESTAMPTZ NOT NULL
) WITH (fillfactor = 20); -- rewritten with every batch: there is always room for the next version on the page
COMMENT ON TABLE cryptography.ledger_writers IS 'Emptied by a restore: no connection of before is left.';

ALTER TABLE cryptography.request_records ENABLE ROW LEVEL SECURITY;
ALTER TABLE cryptography.request_records FORCE ROW LEVEL SECURITY;
ALTER TABLE cryptography.ledger_writers ENABLE ROW LEVEL SECURITY;
ALTER TABLE cryptography.ledger_writers FORCE ROW LEVEL SECURITY;

CREATE POLICY request_records_ledger ON cryptography.request_records
    FOR ALL TO kms_ledger
    USING (TRUE)
    WITH CHECK (TRUE);
CREATE POLICY ledger_writers_ledger ON cryptography.ledger_writers
    FOR ALL TO kms_ledger
    USING (TRUE)
    WITH CHECK (TRUE);
CREATE POLICY keys_ledger_read ON cryptography.keys
    FOR SELECT TO kms_ledger
    USING (TRUE);
CREATE POLICY keys_ledger_charge ON cryptography.keys
    FOR UPDATE TO kms_ledger
    USING (TRUE)
    WITH CHECK (TRUE);
CREATE POLICY users_ledger ON authentication.users
    FOR SELECT TO kms_ledger
    USING (TRUE);

GRANT USAGE ON SCHEMA cryptography TO kms_ledger, kms_service;
GRANT SELECT (user_id, rpc, request_id, body_mac, result, event_id, created_at),
    INSERT (user_id, rpc, request_id, body_mac, result, event_id, created_at),
    UPDATE (body_mac, result, event_id, created_at), DELETE
    ON cryptography.request_records TO kms_ledger;
GRANT SELECT (writer_id, batch, verdicts, written_at), INSERT (writer_id, batch, verdicts, written_at),
    UPDATE (batch, verdicts, written_at), DELETE
    ON cryptography.ledger_writers TO kms_ledger;
GRANT SELECT (
    id, user_id, key_type, key_status, usage_counter, max_usage_count, activated_at, expires_at, version, deactivated_at,
    superseded_at, destruction_scheduled_at, destroyed_at
) ON cryptography.keys TO kms_ledger;
GRANT UPDATE (usage_counter, last_used_at, key_status, deactivated_at) ON cryptography.keys TO kms_ledger;
GRANT SELECT (id, version, locked_until, deleted_at) ON authentication.users TO kms_ledger;
GRANT EXECUTE ON FUNCTION cryptography.effective_status(
    TEXT, TIMESTAMPTZ, TIMESTAMPTZ, TIMESTAMPTZ, TIMESTAMPTZ, TIMESTAMPTZ, TIMESTAMPTZ, TIMESTAMPTZ
) TO kms_ledger;

-- Why a key in a state is not put to a use (KEY_REVOKED, …), or NULL: the mirror of check_use in kms/domain/lifecycle.py.
CREATE FUNCTION cryptography.use_refusal(state TEXT, use TEXT) RETURNS TEXT
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN CASE
    WHEN state = 'active' AND use IN ('protect', 'process') THEN NULL
    WHEN state IN ('inactive', 'expired') AND use = 'process' THEN NULL
    ELSE 'KEY_' || upper(state)
END;

-- How often a key may be used; NULL: without end. An AES-GCM key with random nonces makes at most 2^32 ciphertexts
-- (NIST SP 800-38D section 8.3).
CREATE FUNCTION cryptography.usage_limit(key_type TEXT, max_usage_count BIGINT) RETURNS BIGINT
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN least(max_usage_count, CASE WHEN key_type = 'aes' THEN 4294967296 END);

-- One use as the service tells it; n counts from 1. The last four are NULL for a request that is not kept for a repeat.
CREATE TYPE cryptography.key_use AS (
    n INTEGER,
    user_id UUID,
    user_version INTEGER,
    request_id TEXT,
    peer TEXT,
    action TEXT,
    key_id UUID,
    key_version BIGINT,
    use TEXT,
    is_charged BOOLEAN,
    details JSONB,
    rpc TEXT,
    repeat_id TEXT,
    body_mac BYTEA,
    result BYTEA
);

-- Take the number of a batch. Raises serialization_failure unless it is the writer's next.
CREATE FUNCTION cryptography.take_batch(writer UUID, number BIGINT) RETURNS VOID
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    taken BIGINT;
BEGIN
    IF number = 1 THEN
        INSERT INTO cryptography.ledger_writers (writer_id, batch, written_at) VALUES (writer, 1, clock_timestamp())
        ON CONFLICT DO NOTHING;
    ELSE
        UPDATE cryptography.ledger_writers
        SET batch = number, verdicts = NULL, written_at = clock_timestamp()
        WHERE writer_id = writer AND batch = number - 1;
    END IF;
    GET DIAGNOSTICS taken = ROW_COUNT;
    IF taken <> 1 THEN
        RAISE EXCEPTION 'batch % is not the next', number USING ERRCODE = 'serialization_failure';
    END IF;
END;
$$;

-- What stands against each use, but for its limit and earlier answers: 'OK' or a reason. The keys are locked.
CREATE FUNCTION cryptography.judge_uses(uses cryptography.key_use[]) RETURNS TEXT[]
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN (
        SELECT array_agg(
            CASE
                WHEN u.id IS NULL THEN 'CREDENTIALS_INVALID'
                WHEN k.id IS NULL THEN 'KEY_NOT_FOUND'
                WHEN e.is_charged AND now.state IN ('active', 'inactive')
                    AND k.usage_counter >= cryptography.usage_limit(k.key_type, k.max_usage_count)
                    THEN 'USAGE_LIMIT_REACHED'
                WHEN cryptography.use_refusal(now.state, e.use) IS NOT NULL THEN cryptography.use_refusal(now.state, e.use)
                WHEN k.version IS DISTINCT FROM e.key_version THEN 'STALE'
                ELSE 'OK'
            END
            ORDER BY e.n
        )
        FROM unnest(uses) AS e
            LEFT JOIN authentication.users AS u ON u.id = e.user_id AND u.version = e.user_version
                AND u.deleted_at IS NULL AND (u.locked_until IS NULL OR u.locked_until <= clock_timestamp())
            LEFT JOIN cryptography.keys AS k ON k.id = e.key_id AND k.user_id = e.user_id
            CROSS JOIN LATERAL (
                SELECT cryptography.effective_status(
                    k.key_status, k.activated_at, k.deactivated_at, k.superseded_at, k.expires_at,
                    k.destruction_scheduled_at, k.destroyed_at, clock_timestamp()
                )
            ) AS now (state)
    );
END;
$$;

-- Keep the answers of the uses that may go on, and return the verdicts with REPEATED (answered before) and
-- REQUEST_ID_REUSED (with another body) in them. In the order of their keys, so that two batches never wait for each other.
-- A request that was answered before may be repeated when the key has meanwhile reached its limit or its end, and not when
-- it is revoked, compromised or to be destroyed.
CREATE FUNCTION cryptography.keep_answers(uses cryptography.key_use[], verdicts TEXT[], event_ids UUID[]) RETURNS TEXT[]
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    INSERT INTO cryptography.request_records AS known (user_id, rpc, request_id, body_mac, result, event_id, created_at)
    SELECT DISTINCT ON (e.user_id, e.rpc, e.repeat_id)
        e.user_id, e.rpc, e.repeat_id, e.body_mac, e.result, event_ids[e.n], clock_timestamp()
    FROM unnest(uses) AS e
    WHERE e.repeat_id IS NOT NULL AND verdicts[e.n] = 'OK'
    ORDER BY e.user_id, e.rpc, e.repeat_id, e.n
    ON CONFLICT (user_id, rpc, request_id) DO UPDATE
    SET body_mac = excluded.body_mac, result = excluded.result, event_id = excluded.event_id, created_at = excluded.created_at
    WHERE known.created_at <= clock_timestamp() - INTERVAL '24 hours';
    RETURN (
        SELECT array_agg(
            CASE
                WHEN r.event_id IS NULL OR r.event_id = event_ids[e.n] THEN verdicts[e.n]
                WHEN r.body_mac = e.body_mac THEN 'REPEATED'
                ELSE 'REQUEST_ID_REUSED'
            END
            ORDER BY e.n
        )
        FROM unnest(uses) AS e
            LEFT JOIN cryptography.request_records AS r
                ON r.user_id = e.user_id AND r.rpc = e.rpc AND r.request_id = e.repeat_id
                AND r.created_at > clock_timestamp() - INTERVAL '24 hours'
                AND verdicts[e.n] IN ('OK', 'STALE', 'USAGE_LIMIT_REACHED', 'KEY_INACTIVE', 'KEY_EXPIRED')
    );
END;
$$;

-- Charge what may go on, and deactivate the keys that have reached their limit.
CREATE FUNCTION cryptography.charge_uses(uses cryptography.key_use[], verdicts TEXT[]) RETURNS VOID
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    spent RECORD;
BEGIN
    FOR spent IN
        UPDATE cryptography.keys AS k
        SET usage_counter = k.usage_counter + charged.times, last_used_at = clock_timestamp()
        FROM (
            SELECT e.key_id, count(*) AS times
            FROM unnest(uses) AS e
            WHERE e.is_charged AND verdicts[e.n] = 'OK'
            GROUP BY e.key_id
        ) AS charged
        WHERE k.id = charged.key_id
        RETURNING k.id, k.user_id, k.usage_counter >= cryptography.usage_limit(k.key_type, k.max_usage_count) AS is_at_limit
    LOOP
        CONTINUE WHEN spent.is_at_limit IS NOT TRUE;
        PERFORM set_config('app.user_id', spent.user_id::TEXT, TRUE),
            set_config('app.reason', 'usage limit reached', TRUE);
        UPDATE cryptography.keys AS k
        SET key_status = 'inactive', deactivated_at = clock_timestamp()
        WHERE k.id = spent.id;
        PERFORM set_config('app.user_id', '', TRUE), set_config('app.reason', '', TRUE);
    END LOOP;
END;
$$;

-- Settle a batch of uses (a JSON array of cryptography.key_use): charge and record each that may be, and return a verdict for
-- each in its order: OK, REPEATED, or the reason for which nothing was charged or recorded. Raises for none; what it raises
-- is a fault, and then nothing of the batch has happened.
CREATE FUNCTION cryptography.settle(writer UUID, number BIGINT, entries JSON) RETURNS TEXT[]
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    uses CONSTANT cryptography.key_use[] := ARRAY(SELECT e FROM json_populate_recordset(NULL::cryptography.key_use, entries) AS e);
    event_ids CONSTANT UUID[] := ARRAY(SELECT gen_random_uuid() FROM unnest(uses));
    keeps CONSTANT BOOLEAN := EXISTS (SELECT FROM unnest(uses) AS e WHERE e.repeat_id IS NOT NULL);
    given TEXT[];
    use_numbers BIGINT[];
BEGIN
    PERFORM cryptography.take_batch(writer, number);
    -- Whoever locks keys does so in this order: a join in the order of arrival would end in deadlocks.
    PERFORM FROM cryptography.keys AS k
    WHERE k.id = ANY (ARRAY(SELECT e.key_id FROM unnest(uses) AS e))
    ORDER BY k.id
    FOR NO KEY UPDATE;
    given := cryptography.judge_uses(uses);
    IF keeps THEN
        given := cryptography.keep_answers(uses, given, event_ids);
    END IF;
    SELECT array_agg(c.use_number ORDER BY e.n),
        array_agg(CASE WHEN c.use_number > c.use_limit THEN 'USAGE_LIMIT_REACHED' ELSE given[e.n] END ORDER BY e.n)
    INTO use_numbers, given
    FROM unnest(uses) AS e
        LEFT JOIN (
            SELECT w.n, k.usage_counter + count(*) OVER (PARTITION BY w.key_id ORDER BY w.n) AS use_number,
                cryptography.usage_limit(k.key_type, k.max_usage_count) AS use_limit
            FROM unnest(uses) AS w JOIN cryptography.keys AS k ON k.id = w.key_id
            WHERE w.is_charged AND given[w.n] = 'OK'
        ) AS c ON c.n = e.n;
    IF keeps THEN
        DELETE FROM cryptography.request_records AS r
        USING unnest(uses) AS e
        WHERE r.user_id = e.user_id AND r.rpc = e.rpc AND r.request_id = e.repeat_id AND r.event_id = event_ids[e.n]
            AND given[e.n] <> 'OK';
    END IF;
    PERFORM cryptography.charge_uses(uses, given);
    INSERT INTO audit.security_events (
        id, event_type, severity, user_id, source_ip, resource_type, resource_id, action, outcome, risk_score, event_details,
        created_at
    )
    SELECT event_ids[e.n], 'key.used', 'low', e.user_id,
        CASE WHEN pg_input_is_valid(e.peer, 'inet') THEN e.peer::INET END,
        'key', e.key_id, e.action, 'success', 0,
        coalesce(e.details, '{}') || jsonb_build_object(
            'request_id', e.request_id, 'key_version', e.key_version, 'charged', e.is_charged, 'use_number', use_numbers[e.n]
        ),
        clock_timestamp()
    FROM unnest(uses) AS e
    WHERE given[e.n] = 'OK'
    ORDER BY e.n;
    UPDATE cryptography.ledger_writers AS w SET verdicts = given WHERE w.writer_id = writer;
    RETURN given;
END;
$$;

-- The verdicts of a batch whose answer was lost; NULL where it was not settled, and then it never will be.
CREATE FUNCTION cryptography.settled(writer UUID, number BIGINT) RETURNS TEXT[]
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    -- Waits for the batch if it is under way.
    INSERT INTO cryptography.ledger_writers AS w (writer_id, batch, written_at) VALUES (writer, number, clock_timestamp())
    ON CONFLICT (writer_id) DO UPDATE SET batch = number, verdicts = NULL WHERE w.batch < number;
    RETURN (SELECT w.verdicts FROM cryptography.ledger_writers AS w WHERE w.writer_id = writer AND w.batch = number);
END;
$$;

-- What was answered under this id less than 24 hours ago.
CREATE FUNCTION cryptography.find_answer(caller UUID, called_rpc TEXT, called_request_id TEXT)
RETURNS TABLE (body_mac BYTEA, result BYTEA)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    SELECT r.body_mac, r.result
    FROM cryptography.request_records AS r
    WHERE r.user_id = caller AND r.rpc = called_rpc AND r.request_id = called_request_id
        AND r.created_at > clock_timestamp() - INTERVAL '24 hours';
END;
$$;

-- Remove at most 10,000 answers that are no longer given, and writers that are long gone; return how many answers.
CREATE FUNCTION cryptography.forget_answers() RETURNS BIGINT
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    removed BIGINT;
BEGIN
    DELETE FROM cryptography.request_records AS r
    WHERE (r.user_id, r.rpc, r.request_id) IN (
        SELECT o.user_id, o.rpc, o.request_id
        FROM cryptography.request_records AS o
        WHERE o.created_at <= (SELECT clock_timestamp()) - INTERVAL '24 hours' -- bare it is volatile, and no index serves it
        ORDER BY o.created_at
        LIMIT 10000
        FOR UPDATE SKIP LOCKED
    );
    GET DIAGNOSTICS removed = ROW_COUNT;
    DELETE FROM cryptography.ledger_writers AS w WHERE w.written_at <= clock_timestamp() - INTERVAL '1 day';
    RETURN removed;
END;
$$;

REVOKE ALL ON FUNCTION
    cryptography.use_refusal(TEXT, TEXT), cryptography.usage_limit(TEXT, BIGINT), cryptography.take_batch(UUID, BIGINT),
    cryptography.judge_uses(cryptography.key_use[]),
    cryptography.keep_answers(cryptography.key_use[], TEXT[], UUID[]),
    cryptography.charge_uses(cryptography.key_use[], TEXT[]), cryptography.settle(UUID, BIGINT, JSON),
    cryptography.settled(UUID, BIGINT), cryptography.find_answer(UUID, TEXT, TEXT), cryptography.forget_answers()
    FROM PUBLIC;
REVOKE ALL ON TYPE cryptography.key_use FROM PUBLIC;
GRANT USAGE ON TYPE cryptography.key_use TO kms_ledger;
GRANT EXECUTE ON FUNCTION
    cryptography.settle(UUID, BIGINT, JSON), cryptography.settled(UUID, BIGINT), cryptography.find_answer(UUID, TEXT, TEXT)
    TO kms_service;
GRANT EXECUTE ON FUNCTION cryptography.forget_answers() TO job_runner;
GRANT EXECUTE ON FUNCTION cryptography.usage_limit(TEXT, BIGINT) TO kms_lifecycle;
GRANT EXECUTE ON FUNCTION cryptography.use_refusal(TEXT, TEXT), cryptography.usage_limit(TEXT, BIGINT) TO kms_ledger;

GRANT CREATE ON SCHEMA cryptography TO kms_ledger;
ALTER FUNCTION cryptography.take_batch(UUID, BIGINT) OWNER TO kms_ledger;
ALTER FUNCTION cryptography.judge_uses(cryptography.key_use[]) OWNER TO kms_ledger;
ALTER FUNCTION cryptography.keep_answers(cryptography.key_use[], TEXT[], UUID[]) OWNER TO kms_ledger;
ALTER FUNCTION cryptography.charge_uses(cryptography.key_use[], TEXT[]) OWNER TO kms_ledger;
ALTER FUNCTION cryptography.settle(UUID, BIGINT, JSON) OWNER TO kms_ledger;
ALTER FUNCTION cryptography.settled(UUID, BIGINT) OWNER TO kms_ledger;
ALTER FUNCTION cryptography.find_answer(UUID, TEXT, TEXT) OWNER TO kms_ledger;
ALTER FUNCTION cryptography.forget_answers() OWNER TO kms_ledger;
REVOKE CREATE ON SCHEMA cryptography FROM kms_ledger;
