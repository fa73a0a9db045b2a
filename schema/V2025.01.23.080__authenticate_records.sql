-- Each key's row, and each epoch's, carries a MAC that the service makes in the token: whoever writes rows past the service cannot
-- make one. What the database does by itself follows from columns under the MAC and from the clock: reaching a limit is no state
-- that is stored any more. Rows without a MAC get theirs once, by `kms records adopt`; a row that lacks it is refused.

ALTER TABLE cryptography.keys
    ADD COLUMN record_mac BYTEA CONSTRAINT record_mac_size CHECK (octet_length(record_mac) = 32);
ALTER TABLE cryptography.epochs
    ADD COLUMN record_mac BYTEA CONSTRAINT epoch_mac_size CHECK (octet_length(record_mac) = 32);

-- Answers of before have no MAC, and would be refused as planted: a request that is repeated is made again.
TRUNCATE cryptography.request_records;

GRANT SELECT (record_mac) ON cryptography.keys TO authenticated_users, admin_users;
GRANT INSERT (key_status, created_at, record_mac) ON cryptography.keys TO authenticated_users;
GRANT UPDATE (record_mac) ON cryptography.keys TO kms_lifecycle;
GRANT SELECT (record_mac) ON cryptography.epochs TO job_runner, admin_users;
GRANT SELECT (begun_at), INSERT (begun_at, record_mac) ON cryptography.epochs TO kms_lifecycle;

-- The same with a key that has reached its limit: it is inactive for as long as the count stands there.
CREATE FUNCTION cryptography.effective_status(
    key_status TEXT,
    activated_at TIMESTAMPTZ,
    deactivated_at TIMESTAMPTZ,
    superseded_at TIMESTAMPTZ,
    expires_at TIMESTAMPTZ,
    destruction_scheduled_at TIMESTAMPTZ,
    destroyed_at TIMESTAMPTZ,
    moment TIMESTAMPTZ,
    is_spent BOOLEAN
) RETURNS TEXT
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN CASE
    WHEN destroyed_at IS NOT NULL OR destruction_scheduled_at <= moment THEN 'destroyed'
    WHEN destruction_scheduled_at IS NOT NULL THEN 'pending_destruction'
    WHEN key_status IN ('revoked', 'compromised') THEN key_status
    WHEN key_status = 'expired' OR expires_at <= moment THEN 'expired'
    WHEN deactivated_at IS NOT NULL OR superseded_at IS NOT NULL THEN 'inactive'
    WHEN activated_at <= moment OR (activated_at IS NULL AND key_status = 'active')
        THEN CASE WHEN is_spent THEN 'inactive' ELSE 'active' END
    ELSE 'pre_active'
END;
REVOKE ALL ON FUNCTION cryptography.effective_status(
    TEXT, TIMESTAMPTZ, TIMESTAMPTZ, TIMESTAMPTZ, TIMESTAMPTZ, TIMESTAMPTZ, TIMESTAMPTZ, TIMESTAMPTZ, BOOLEAN
) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION cryptography.effective_status(
    TEXT, TIMESTAMPTZ, TIMESTAMPTZ, TIMESTAMPTZ, TIMESTAMPTZ, TIMESTAMPTZ, TIMESTAMPTZ, TIMESTAMPTZ, BOOLEAN
) TO authenticated_users, admin_users, job_runner, kms_lifecycle;
GRANT EXECUTE ON FUNCTION cryptography.usage_limit(TEXT, BIGINT) TO authenticated_users, admin_users;

-- Only its owner replaces or drops a function.
GRANT CREATE ON SCHEMA cryptography TO kms_ledger, kms_lifecycle;
SET LOCAL ROLE kms_ledger;

-- Charge what may go on. Of a key that has reached its limit by it the trail says so.
CREATE OR REPLACE FUNCTION cryptography.charge_uses(uses cryptography.key_use[], verdicts TEXT[]) RETURNS VOID
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    WITH charged AS (
        UPDATE cryptography.keys AS k
        SET usage_counter = k.usage_counter + due.times, last_used_at = clock_timestamp()
        FROM (
            SELECT e.key_id, count(*) AS times
            FROM unnest(uses) AS e
            WHERE e.is_charged AND verdicts[e.n] = 'OK'
            GROUP BY e.key_id
        ) AS due
        WHERE k.id = due.key_id
        RETURNING k.id, k.user_id, k.usage_counter, k.usage_counter >= cryptography.usage_limit(k.key_type, k.max_usage_count)
            AS is_at_limit
    )
    INSERT INTO audit.security_events (
        event_type, severity, user_id, resource_type, resource_id, action, outcome, risk_score, event_details, created_at
    )
    SELECT 'key.limit_reached', 'medium', c.user_id, 'key', c.id, 'limit_reached', 'success', 30,
        jsonb_build_object('usage_counter', c.usage_counter), clock_timestamp()
    FROM charged AS c
    WHERE c.is_at_limit;
END;
$$;
RESET ROLE;
REVOKE UPDATE (key_status, deactivated_at) ON cryptography.keys FROM kms_ledger;

SET LOCAL ROLE kms_lifecycle;

-- Append the event and the line. app.reason, app.request_id and app.peer say why and for which call, where they are set. The count
-- of a key is in its event where an administrator has stated it; else the uses themselves tell it.
CREATE OR REPLACE FUNCTION cryptography.record_key_change() RETURNS TRIGGER
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET row_security = on
AS $$
DECLARE
    peer CONSTANT TEXT := nullif(current_setting('app.peer', TRUE), '');
    for_nobody CONSTANT BOOLEAN := authentication.current_user_id() IS NULL;
    context CONSTANT JSONB := jsonb_strip_nulls(jsonb_build_object(
        'reason', nullif(current_setting('app.reason', TRUE), ''),
        'request_id', nullif(current_setting('app.request_id', TRUE), '')
    ));
    before cryptography.keys;
    kind RECORD;
    changed JSONB;
BEGIN
    IF TG_OP = 'UPDATE' THEN
        before := OLD;
    END IF;
    kind := cryptography.key_event(before, NEW);
    SELECT coalesce(jsonb_object_agg(a.key, a.value), '{}') INTO changed
    FROM jsonb_each(to_jsonb(NEW) - ARRAY['encrypted_private_key', 'last_used_at', 'version', 'id', 'record_mac']) AS a
    WHERE a.value IS DISTINCT FROM to_jsonb(before) -> a.key AND (
        before.id IS NOT NULL OR (a.value <> 'null' AND a.key <> 'usage_counter')
    );
    -- The head of a key is its owner's, whoever makes the key for him.
    IF TG_OP = 'INSERT' AND for_nobody THEN
        PERFORM set_config('app.user_id', NEW.user_id::TEXT, TRUE);
    END IF;
    PERFORM audit.append_event(
        NEW.id, 'key', kind.event_type, context || changed, CASE TG_OP WHEN 'UPDATE' THEN before.version ELSE 0 END
    );
    PERFORM audit.record_security_event(
        kind.event_type, kind.severity, NULL, CASE WHEN pg_input_is_valid(peer, 'inet') THEN peer::INET END, NULL, 'key', NEW.id,
        substr(kind.event_type, 5), 'success',
        CASE kind.severity WHEN 'low' THEN 0 WHEN 'medium' THEN 30 WHEN 'high' THEN 60 ELSE 90 END,
        context || jsonb_build_object('key_version', NEW.version, 'key_name', NEW.key_name, 'key_type', NEW.key_type)
    );
    IF TG_OP = 'INSERT' AND for_nobody THEN
        PERFORM set_config('app.user_id', '', TRUE);
    END IF;
    RETURN NULL;
END;
$$;

-- squawk-ignore ban-drop-function
DROP FUNCTION cryptography.move_key(UUID, TEXT, JSONB, INTEGER, BIGINT, TEXT, TEXT);
-- Move a key of the user for whom the transaction acts, who is at user_version, and whose key is at expected_version. change holds
-- reason, occurred_at, pending_days, max_usage_count, expires_at and metadata, as far as the move uses them. new_mac is that of the
-- row as this function leaves it at moment, by the service's mirror of it, `moved` in kms/domain/key_row.py. The moment lies a little
-- ahead, so that the lock is had before it; where the lock took longer the verdict is BUSY, and the service tries a later moment.
-- Returns 'OK' or the reason why nothing was changed, with MALFORMED the name of the field.
CREATE FUNCTION cryptography.move_key(
    moved_id UUID, move TEXT, change JSONB, user_version INTEGER, expected_version BIGINT, moment TIMESTAMPTZ, new_mac BYTEA,
    request_id TEXT, peer TEXT, OUT verdict TEXT, OUT field TEXT
)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    held RECORD;
    now_at TIMESTAMPTZ;
    state TEXT;
    use_limit BIGINT;
    moved BIGINT;
BEGIN
    SELECT k.* INTO held
    FROM (
        SELECT id, user_id, key_type, key_status, usage_counter, max_usage_count, activated_at, expires_at, version,
            deactivated_at, superseded_at, destruction_scheduled_at, destroyed_at
        FROM cryptography.keys
        WHERE id = moved_id AND user_id = authentication.current_user_id()
        FOR NO KEY UPDATE
    ) AS k;
    now_at := clock_timestamp();
    -- After the lock: whatever returned before this call began is seen.
    IF NOT EXISTS (
        SELECT FROM authentication.users AS u
        WHERE u.id = authentication.current_user_id() AND u.version = user_version AND u.deleted_at IS NULL
            AND (u.locked_until IS NULL OR u.locked_until <= now_at)
    ) THEN
        verdict := 'CREDENTIALS_INVALID';
        RETURN;
    END IF;
    use_limit := cryptography.usage_limit(held.key_type, held.max_usage_count);
    state := cryptography.effective_status(
        held.key_status, held.activated_at, held.deactivated_at, held.superseded_at, held.expires_at,
        held.destruction_scheduled_at, held.destroyed_at, now_at, held.usage_counter >= use_limit
    );
    field := cryptography.change_fault(move, change, held.usage_counter, held.max_usage_count, held.expires_at, now_at);
    verdict := CASE
        WHEN held.id IS NULL THEN 'KEY_NOT_FOUND'
        WHEN held.version <> expected_version THEN 'STALE'
        WHEN moment NOT BETWEEN now_at AND now_at + INTERVAL '5 seconds' THEN 'BUSY'
        WHEN cryptography.move_refusal(state, move) IS NOT NULL THEN cryptography.move_refusal(state, move)
        WHEN move = 'reactivate' AND held.superseded_at IS NOT NULL THEN 'KEY_INACTIVE'
        WHEN move = 'reactivate' AND held.usage_counter >= use_limit THEN 'USAGE_LIMIT_REACHED'
        WHEN field IS NOT NULL THEN 'MALFORMED'
        ELSE 'OK'
    END;
    IF verdict <> 'OK' THEN
        RETURN;
    END IF;
    -- The lock was there before the moment: no use of the key is recorded later than the move.
    PERFORM pg_sleep(extract(epoch FROM moment - clock_timestamp()));
    PERFORM set_config('app.reason', coalesce(change ->> 'reason', ''), TRUE),
        set_config('app.request_id', coalesce(request_id, ''), TRUE), set_config('app.peer', coalesce(peer, ''), TRUE);
    IF move = 'activate' THEN
        UPDATE cryptography.keys SET key_status = 'active', activated_at = moment, record_mac = new_mac
        WHERE id = moved_id;
    ELSIF move = 'deactivate' THEN
        UPDATE cryptography.keys SET key_status = 'inactive', deactivated_at = moment, record_mac = new_mac
        WHERE id = moved_id;
    ELSIF move = 'reactivate' THEN
        UPDATE cryptography.keys SET key_status = 'active', deactivated_at = NULL, record_mac = new_mac
        WHERE id = moved_id;
    ELSIF move = 'revoke' THEN
        UPDATE cryptography.keys SET key_status = 'revoked', revoked_at = moment, record_mac = new_mac
        WHERE id = moved_id;
    ELSIF move = 'compromise' THEN
        UPDATE cryptography.keys
        SET key_status = 'compromised', compromised_at = moment,
            compromise_occurred_at = coalesce((change ->> 'occurred_at')::TIMESTAMPTZ, moment), record_mac = new_mac
        WHERE id = moved_id;
    ELSIF move = 'schedule_destruction' THEN
        UPDATE cryptography.keys
        SET destruction_scheduled_at = moment + make_interval(days => coalesce((change ->> 'pending_days')::INTEGER, 30)),
            record_mac = new_mac
        WHERE id = moved_id;
    ELSIF move = 'cancel_destruction' THEN
        UPDATE cryptography.keys SET destruction_scheduled_at = NULL, record_mac = new_mac WHERE id = moved_id;
    ELSIF move = 'update' THEN
        UPDATE cryptography.keys AS k
        SET max_usage_count = coalesce((change ->> 'max_usage_count')::BIGINT, k.max_usage_count),
            expires_at = coalesce((change ->> 'expires_at')::TIMESTAMPTZ, k.expires_at),
            metadata = coalesce(nullif(change -> 'metadata', 'null'), k.metadata),
            record_mac = new_mac
        WHERE k.id = moved_id;
    END IF;
    GET DIAGNOSTICS moved = ROW_COUNT;
    IF moved <> 1 THEN
        RAISE EXCEPTION 'moved % keys instead of one', moved;
    END IF;
END;
$$;

-- squawk-ignore ban-drop-function
DROP FUNCTION cryptography.destroy_due_keys();
-- Destroy keys that are due, each at the version that its MAC is for: the envelope goes; the row, the public key and the history
-- stay. Returns those that were. A key that is in use at the moment, or was changed, waits for the next call, and so does one that
-- cannot be destroyed: a warning says why.
CREATE FUNCTION cryptography.destroy_keys(key_ids UUID[], versions BIGINT[], moment TIMESTAMPTZ, new_macs BYTEA[])
RETURNS SETOF UUID
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    due RECORD;
BEGIN
    FOR due IN
        SELECT k.id, told.new_mac
        FROM unnest(key_ids, versions, new_macs) AS told (id, version, new_mac)
            JOIN cryptography.keys AS k ON k.id = told.id AND k.version = told.version
        WHERE k.destroyed_at IS NULL AND k.destruction_scheduled_at <= moment AND moment <= clock_timestamp()
        ORDER BY k.id
        FOR NO KEY UPDATE OF k SKIP LOCKED
    LOOP
        BEGIN
            UPDATE cryptography.keys AS k
            SET encrypted_private_key = '', destroyed_at = moment, record_mac = due.new_mac
            WHERE k.id = due.id;
        EXCEPTION WHEN OTHERS THEN
            RAISE WARNING 'key % cannot be destroyed: %', due.id, sqlerrm;
            CONTINUE;
        END;
        RETURN NEXT due.id;
    END LOOP;
END;
$$;

-- squawk-ignore ban-drop-function
DROP FUNCTION cryptography.confirm_restored_key(UUID, BIGINT);
-- An administrator states how often a restored key was used; it is then what it was before. new_mac is that of the row as it is
-- then. Raises no_data_found for a key that waits for nothing, insufficient_privilege for its owner, invalid_parameter_value for a
-- count that cannot be, serialization_failure for a key that was changed meanwhile.
CREATE FUNCTION cryptography.confirm_restored_key(
    restored_key_id UUID, stated_count BIGINT, expected_version BIGINT, new_mac BYTEA
) RETURNS BOOLEAN
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    held RECORD;
    use_limit BIGINT;
    reactivates BOOLEAN;
    changed BIGINT;
BEGIN
    PERFORM FROM cryptography.restored_keys AS r
    WHERE r.key_id = restored_key_id AND r.confirmed_at IS NULL
    FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'no restored key of that id waits for a confirmation' USING ERRCODE = 'no_data_found';
    END IF;
    SELECT k.user_id, k.usage_counter, k.max_usage_count, k.key_type, k.key_status, k.version, k.activated_at,
        k.deactivated_at INTO STRICT held
    FROM cryptography.keys AS k
    WHERE k.id = restored_key_id
    FOR NO KEY UPDATE;
    IF held.version <> expected_version THEN
        RAISE EXCEPTION 'the key was changed meanwhile' USING ERRCODE = 'serialization_failure';
    END IF;
    IF held.user_id = authentication.current_user_id() THEN
        RAISE EXCEPTION 'nobody confirms a key of his own' USING ERRCODE = 'insufficient_privilege';
    END IF;
    -- NIST SP 800-38D section 8.3: no more encryptions under one AES-GCM key with random nonces.
    use_limit = least(held.max_usage_count, CASE WHEN held.key_type = 'aes' THEN 4294967296 END);
    IF stated_count < held.usage_counter OR stated_count > use_limit THEN
        RAISE EXCEPTION 'expected at least %, the count in the backup, and at most %',
            held.usage_counter, coalesce(use_limit::TEXT, 'any number')
            USING ERRCODE = 'invalid_parameter_value';
    END IF;
    -- What a restore deactivates has the moment at which its epoch began.
    reactivates = held.key_status = 'inactive'
        AND EXISTS (SELECT FROM cryptography.epochs AS e WHERE e.begun_at = held.deactivated_at);
    UPDATE cryptography.restored_keys
    SET confirmed_at = clock_timestamp(), confirmed_count = stated_count, confirmed_by = authentication.current_user_id()
    WHERE key_id = restored_key_id;
    UPDATE cryptography.keys AS k
    SET usage_counter = stated_count,
        key_status = CASE
            WHEN NOT reactivates THEN k.key_status WHEN held.activated_at > held.deactivated_at THEN 'inactive' ELSE 'active'
        END,
        deactivated_at = CASE WHEN NOT reactivates THEN k.deactivated_at END,
        record_mac = new_mac
    WHERE k.id = restored_key_id;
    GET DIAGNOSTICS changed = ROW_COUNT;
    IF changed <> 1 THEN
        RAISE EXCEPTION 'changed % keys instead of one', changed;
    END IF;
    RETURN reactivates AND (stated_count < use_limit) IS NOT FALSE;
END;
$$;

-- squawk-ignore ban-drop-function
DROP FUNCTION cryptography.begin_first_epoch();
-- The epoch of a database that has none: it was never served. Of two services that start at once, one finds it done.
CREATE FUNCTION cryptography.begin_first_epoch(
    moment TIMESTAMPTZ, first_system_identifier BIGINT, first_timeline TEXT, first_database_oid BIGINT, new_mac BYTEA
) RETURNS VOID
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    INSERT INTO cryptography.epochs (number, cause, begun_at, system_identifier, timeline, database_oid, record_mac)
    SELECT 1, 'FIRST_START', moment, first_system_identifier, first_timeline, first_database_oid, new_mac
    WHERE NOT EXISTS (SELECT FROM cryptography.epochs)
    ON CONFLICT DO NOTHING;
END;
$$;
-- squawk-ignore ban-drop-function
DROP FUNCTION cryptography.destroyed_objects(TEXT[]);

REVOKE ALL ON FUNCTION
    cryptography.move_key(UUID, TEXT, JSONB, INTEGER, BIGINT, TIMESTAMPTZ, BYTEA, TEXT, TEXT),
    cryptography.destroy_keys(UUID[], BIGINT[], TIMESTAMPTZ, BYTEA[]),
    cryptography.confirm_restored_key(UUID, BIGINT, BIGINT, BYTEA),
    cryptography.begin_first_epoch(TIMESTAMPTZ, BIGINT, TEXT, BIGINT, BYTEA)
    FROM PUBLIC;
GRANT EXECUTE ON FUNCTION cryptography.move_key(UUID, TEXT, JSONB, INTEGER, BIGINT, TIMESTAMPTZ, BYTEA, TEXT, TEXT)
    TO authenticated_users;
GRANT EXECUTE ON FUNCTION cryptography.destroy_keys(UUID[], BIGINT[], TIMESTAMPTZ, BYTEA[]) TO job_runner;
GRANT EXECUTE ON FUNCTION cryptography.confirm_restored_key(UUID, BIGINT, BIGINT, BYTEA) TO admin_users;
GRANT EXECUTE ON FUNCTION cryptography.begin_first_epoch(TIMESTAMPTZ, BIGINT, TEXT, BIGINT, BYTEA) TO job_runner;

RESET ROLE;
REVOKE CREATE ON SCHEMA cryptography FROM kms_ledger, kms_lifecycle;
