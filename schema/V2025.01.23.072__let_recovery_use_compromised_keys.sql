-- A key that is compromised or revoked decrypts for its owner where his roles permit it and the request says so, each of the two a use
-- of its own. The charge decides of the permission too: also where it has run out by time, with which no version advances.

-- The migrator owns the table, and its row security is forced.
ALTER TABLE authentication.roles NO FORCE ROW LEVEL SECURITY;
INSERT INTO authentication.roles (name, description, permissions, is_system_role)
VALUES (
    'recovery', 'decrypts with keys of its own that are compromised or revoked, where the request says so',
    '["keys:use-compromised", "keys:use-revoked"]', TRUE
);
ALTER TABLE authentication.roles FORCE ROW LEVEL SECURITY;

-- Why a key in a state is not put to a use (KEY_REVOKED, …), or NULL: the mirror of check_use in kms/domain/lifecycle.py.
CREATE OR REPLACE FUNCTION cryptography.use_refusal(state TEXT, use TEXT) RETURNS TEXT
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN CASE
    WHEN state = 'active' AND use IN ('protect', 'process') THEN NULL
    WHEN state IN ('inactive', 'expired') AND use = 'process' THEN NULL
    WHEN state = 'compromised' AND use = 'process_compromised' THEN NULL
    WHEN state = 'revoked' AND use = 'process_revoked' THEN NULL
    ELSE 'KEY_' || upper(state)
END;

-- The permission that a use takes, or NULL: the mirror of needed_for in kms/domain/permissions.py.
CREATE FUNCTION cryptography.use_permission(use TEXT) RETURNS TEXT
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN CASE use
    WHEN 'process_compromised' THEN 'keys:use-compromised'
    WHEN 'process_revoked' THEN 'keys:use-revoked'
END;
REVOKE ALL ON FUNCTION cryptography.use_permission(TEXT) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION cryptography.use_permission(TEXT) TO kms_ledger;

-- Only its owner replaces a function.
GRANT CREATE ON SCHEMA cryptography TO kms_ledger;
SET LOCAL ROLE kms_ledger;

-- What stands against each use, but for its limit and earlier answers: 'OK' or a reason. The keys are locked, and one moment behind
-- the locks holds for all of them.
CREATE OR REPLACE FUNCTION cryptography.judge_uses(uses cryptography.key_use[]) RETURNS TEXT[]
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
                WHEN cryptography.use_permission(e.use) IS NOT NULL AND NOT EXISTS (
                    SELECT FROM authentication.find_user_by_uri(e.user_id) AS f
                    WHERE cryptography.use_permission(e.use) = ANY (f.permissions)
                ) THEN 'PERMISSION_DENIED'
                WHEN k.version IS DISTINCT FROM e.key_version THEN 'STALE'
                ELSE 'OK'
            END
            ORDER BY e.n
        )
        FROM unnest(uses) AS e
            CROSS JOIN (SELECT clock_timestamp()) AS clock (moment)
            LEFT JOIN authentication.users AS u ON u.id = e.user_id AND u.version = e.user_version
                AND u.deleted_at IS NULL AND (u.locked_until IS NULL OR u.locked_until <= clock.moment)
            LEFT JOIN cryptography.keys AS k ON k.id = e.key_id AND k.user_id = e.user_id
            CROSS JOIN LATERAL (
                SELECT cryptography.effective_status(
                    k.key_status, k.activated_at, k.deactivated_at, k.superseded_at, k.expires_at,
                    k.destruction_scheduled_at, k.destroyed_at, clock.moment
                )
            ) AS now (state)
    );
END;
$$;

-- Settle a batch of uses (a JSON array of cryptography.key_use): charge and record each that may be, and return a verdict for
-- each in its order: OK, REPEATED, or the reason for which nothing was charged or recorded. Raises for none; what it raises
-- is a fault, and then nothing of the batch has happened. A use that takes a permission is a line that auditors look for.
CREATE OR REPLACE FUNCTION cryptography.settle(writer UUID, number BIGINT, entries JSON) RETURNS TEXT[]
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
    SELECT event_ids[e.n], 'key.used', CASE WHEN grave.permission IS NULL THEN 'low' ELSE 'high' END, e.user_id,
        CASE WHEN pg_input_is_valid(e.peer, 'inet') THEN e.peer::INET END,
        'key', e.key_id, e.action, 'success', CASE WHEN grave.permission IS NULL THEN 0 ELSE 60 END,
        coalesce(e.details, '{}') || jsonb_build_object(
            'request_id', e.request_id, 'key_version', e.key_version, 'charged', e.is_charged, 'use_number', use_numbers[e.n]
        ),
        clock_timestamp()
    FROM unnest(uses) AS e CROSS JOIN LATERAL (SELECT cryptography.use_permission(e.use)) AS grave (permission)
    WHERE given[e.n] = 'OK'
    ORDER BY e.n;
    UPDATE cryptography.ledger_writers AS w SET verdicts = given WHERE w.writer_id = writer;
    RETURN given;
END;
$$;

RESET ROLE;
REVOKE CREATE ON SCHEMA cryptography FROM kms_ledger;
