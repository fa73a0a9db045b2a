-- The moves of keys between states, and their trail: every change of a key but a charge is a domain event with the version
-- that the key has then, and a line of the trail, whoever makes it. A trigger writes both: nothing can leave them out.

-- Heads for the keys that are there, from where they stand. The migrator owns both tables, and their row security is forced.
ALTER TABLE cryptography.keys NO FORCE ROW LEVEL SECURITY;
ALTER TABLE audit.aggregate_heads NO FORCE ROW LEVEL SECURITY;
DO $$
BEGIN
    INSERT INTO audit.aggregate_heads (aggregate_id, aggregate_type, aggregate_version, user_id)
    SELECT k.id, 'key', k.version, k.user_id FROM cryptography.keys AS k
    ON CONFLICT DO NOTHING;
    IF EXISTS (
        SELECT FROM cryptography.keys AS k LEFT JOIN audit.aggregate_heads AS h ON h.aggregate_id = k.id
        WHERE h.aggregate_version IS DISTINCT FROM k.version
    ) THEN
        RAISE EXCEPTION 'the events of a key stand at another version than the key';
    END IF;
END $$;
ALTER TABLE cryptography.keys FORCE ROW LEVEL SECURITY;
ALTER TABLE audit.aggregate_heads FORCE ROW LEVEL SECURITY;

CREATE POLICY keys_lifecycle ON cryptography.keys
    FOR ALL TO kms_lifecycle
    USING (TRUE)
    WITH CHECK (TRUE);
GRANT EXECUTE ON FUNCTION authentication.current_user_id() TO kms_lifecycle;
GRANT INSERT (max_usage_count, activated_at, expires_at) ON cryptography.keys TO authenticated_users;
GRANT SELECT (
    id, user_id, key_type, key_status, usage_counter, max_usage_count, activated_at, expires_at, version, hsm_key_id,
    metadata, deactivated_at, superseded_at, destruction_scheduled_at, destroyed_at
) ON cryptography.keys TO kms_lifecycle;
GRANT UPDATE (
    key_status, max_usage_count, activated_at, expires_at, compromised_at, revoked_at, metadata, deactivated_at,
    destruction_scheduled_at, destroyed_at, compromise_occurred_at, encrypted_private_key
) ON cryptography.keys TO kms_lifecycle;
GRANT SELECT (id, version, locked_until, deleted_at) ON authentication.users TO kms_lifecycle;

-- A key whose time has not come begins inactive.
CREATE FUNCTION cryptography.begin_key_status() RETURNS TRIGGER
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    NEW.key_status = 'inactive';
    RETURN NEW;
END;
$$;
CREATE TRIGGER tr_keys_begin_status
    BEFORE INSERT ON cryptography.keys
    FOR EACH ROW WHEN (NEW.key_status = 'active' AND NEW.activated_at > clock_timestamp())
    EXECUTE FUNCTION cryptography.begin_key_status();

-- What happened to a key, by what differs: the type of the event, and the severity of its line in the trail.
CREATE FUNCTION cryptography.key_event(before cryptography.keys, after cryptography.keys, OUT event_type TEXT, OUT severity TEXT)
LANGUAGE sql IMMUTABLE
AS $$
    SELECT kind.event_type, kind.severity
    FROM (VALUES
        (1, before.id IS NULL, 'key.created', 'low'),
        (2, after.destroyed_at IS NOT NULL AND before.destroyed_at IS NULL, 'key.destroyed', 'high'),
        (3, after.destruction_scheduled_at IS DISTINCT FROM before.destruction_scheduled_at
            AND after.destruction_scheduled_at IS NOT NULL, 'key.destruction_scheduled', 'high'),
        (4, after.destruction_scheduled_at IS DISTINCT FROM before.destruction_scheduled_at,
            'key.destruction_cancelled', 'medium'),
        (5, after.key_status <> before.key_status AND after.key_status = 'revoked', 'key.revoked', 'high'),
        (6, after.key_status <> before.key_status AND after.key_status = 'compromised', 'key.compromised', 'critical'),
        (7, after.deactivated_at IS NOT NULL AND before.deactivated_at IS NULL, 'key.deactivated', 'medium'),
        (8, after.deactivated_at IS NULL AND before.deactivated_at IS NOT NULL, 'key.reactivated', 'medium'),
        (9, after.activated_at IS DISTINCT FROM before.activated_at, 'key.activated', 'low'),
        (10, after.superseded_at IS NOT NULL AND before.superseded_at IS NULL, 'key.superseded', 'low'),
        (11, TRUE, 'key.updated', 'low')
    ) AS kind (rank, fits, event_type, severity)
    WHERE kind.fits
    ORDER BY kind.rank
    LIMIT 1;
$$;

-- Append the event and the line. app.reason, app.request_id and app.peer say why and for which call, where they are set.
CREATE FUNCTION cryptography.record_key_change() RETURNS TRIGGER
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
    FROM jsonb_each(to_jsonb(NEW) - ARRAY['encrypted_private_key', 'usage_counter', 'last_used_at', 'version', 'id']) AS a
    WHERE a.value IS DISTINCT FROM to_jsonb(before) -> a.key AND (before.id IS NOT NULL OR a.value <> 'null');
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

-- Why a key in a state is not open to a move (KEY_ACTIVE, …), or NULL: the mirror of check_move in kms/domain/lifecycle.py.
CREATE FUNCTION cryptography.move_refusal(state TEXT, move TEXT) RETURNS TEXT
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN CASE
    WHEN state = ANY (CASE move
        WHEN 'activate' THEN ARRAY['pre_active']
        WHEN 'deactivate' THEN ARRAY['active']
        WHEN 'reactivate' THEN ARRAY['inactive']
        WHEN 'revoke' THEN ARRAY['pre_active', 'active', 'inactive', 'expired', 'compromised']
        WHEN 'compromise' THEN ARRAY['pre_active', 'active', 'inactive', 'expired']
        WHEN 'schedule_destruction' THEN ARRAY['pre_active', 'inactive', 'expired', 'compromised', 'revoked']
        WHEN 'cancel_destruction' THEN ARRAY['pending_destruction']
        WHEN 'update' THEN ARRAY['pre_active', 'active', 'inactive']
    END) THEN NULL
    ELSE 'KEY_' || upper(state)
END;

-- What is wrong with what a move brings with it: the name of the field, or NULL. Limits fall and expiries come nearer only.
CREATE FUNCTION cryptography.change_fault(
    move TEXT, change JSONB, usage_counter BIGINT, max_usage_count BIGINT, expires_at TIMESTAMPTZ, moment TIMESTAMPTZ
) RETURNS TEXT
LANGUAGE sql STABLE
RETURN CASE
    WHEN move = 'compromise' AND (change ->> 'occurred_at')::TIMESTAMPTZ > moment THEN 'occurred_at'
    WHEN move = 'schedule_destruction' AND (change ->> 'pending_days')::BIGINT NOT BETWEEN 7 AND 90 THEN 'pending_days'
    WHEN move <> 'update' THEN NULL
    WHEN (change ->> 'max_usage_count')::BIGINT < greatest(usage_counter, 1)
        OR (change ->> 'max_usage_count')::BIGINT > max_usage_count THEN 'max_usage_count'
    WHEN (change ->> 'expires_at')::TIMESTAMPTZ <= moment
        OR (change ->> 'expires_at')::TIMESTAMPTZ > expires_at THEN 'expires_at'
END;

-- Move a key of the user for whom the transaction acts, who is at user_version. expected_version NULL: whatever the key's is.
-- change holds reason, occurred_at, pending_days, max_usage_count, expires_at and metadata, as far as the move uses them.
-- Returns 'OK' or the reason why nothing was changed, with MALFORMED the name of the field.
CREATE FUNCTION cryptography.move_key(
    moved_id UUID, move TEXT, change JSONB, user_version INTEGER, expected_version BIGINT, request_id TEXT, peer TEXT,
    OUT verdict TEXT, OUT field TEXT
)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    held RECORD;
    moment TIMESTAMPTZ;
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
    moment := clock_timestamp();
    -- After the lock: whatever returned before this call began is seen.
    IF NOT EXISTS (
        SELECT FROM authentication.users AS u
        WHERE u.id = authentication.current_user_id() AND u.version = user_version AND u.deleted_at IS NULL
            AND (u.locked_until IS NULL OR u.locked_until <= moment)
    ) THEN
        verdict := 'CREDENTIALS_INVALID';
        RETURN;
    END IF;
    state := cryptography.effective_status(
        held.key_status, held.activated_at, held.deactivated_at, held.superseded_at, held.expires_at,
        held.destruction_scheduled_at, held.destroyed_at, moment
    );
    use_limit := cryptography.usage_limit(held.key_type, held.max_usage_count);
    field := cryptography.change_fault(move, change, held.usage_counter, held.max_usage_count, held.expires_at, moment);
    verdict := CASE
        WHEN held.id IS NULL THEN 'KEY_NOT_FOUND'
        WHEN held.version <> expected_version THEN 'STALE'
        WHEN cryptography.move_refusal(state, move) IS NOT NULL THEN cryptography.move_refusal(state, move)
        WHEN move = 'reactivate' AND held.superseded_at IS NOT NULL THEN 'KEY_INACTIVE'
        WHEN move = 'reactivate' AND held.usage_counter >= use_limit THEN 'USAGE_LIMIT_REACHED'
        WHEN field IS NOT NULL THEN 'MALFORMED'
        ELSE 'OK'
    END;
    IF verdict <> 'OK' THEN
        RETURN;
    END IF;
    PERFORM set_config('app.reason', coalesce(change ->> 'reason', ''), TRUE),
        set_config('app.request_id', coalesce(request_id, ''), TRUE), set_config('app.peer', coalesce(peer, ''), TRUE);
    IF move = 'activate' THEN
        UPDATE cryptography.keys SET key_status = 'active', activated_at = moment WHERE id = moved_id;
    ELSIF move = 'deactivate' THEN
        UPDATE cryptography.keys SET key_status = 'inactive', deactivated_at = moment WHERE id = moved_id;
    ELSIF move = 'reactivate' THEN
        UPDATE cryptography.keys SET key_status = 'active', deactivated_at = NULL WHERE id = moved_id;
    ELSIF move = 'revoke' THEN
        UPDATE cryptography.keys SET key_status = 'revoked', revoked_at = moment WHERE id = moved_id;
    ELSIF move = 'compromise' THEN
        UPDATE cryptography.keys
        SET key_status = 'compromised', compromised_at = moment,
            compromise_occurred_at = coalesce((change ->> 'occurred_at')::TIMESTAMPTZ, moment)
        WHERE id = moved_id;
    ELSIF move = 'schedule_destruction' THEN
        UPDATE cryptography.keys
        SET destruction_scheduled_at = moment + make_interval(days => coalesce((change ->> 'pending_days')::INTEGER, 30))
        WHERE id = moved_id;
    ELSIF move = 'cancel_destruction' THEN
        UPDATE cryptography.keys SET destruction_scheduled_at = NULL WHERE id = moved_id;
    ELSIF move = 'update' THEN
        -- A limit that is lowered to what was used is reached.
        UPDATE cryptography.keys AS k
        SET max_usage_count = coalesce((change ->> 'max_usage_count')::BIGINT, k.max_usage_count),
            expires_at = coalesce((change ->> 'expires_at')::TIMESTAMPTZ, k.expires_at),
            metadata = coalesce(nullif(change -> 'metadata', 'null'), k.metadata),
            key_status = CASE WHEN now.is_spent THEN 'inactive' ELSE k.key_status END,
            deactivated_at = CASE WHEN now.is_spent THEN moment ELSE k.deactivated_at END
        FROM (SELECT state = 'active' AND held.usage_counter >= (change ->> 'max_usage_count')::BIGINT) AS now (is_spent)
        WHERE k.id = moved_id;
    END IF;
    GET DIAGNOSTICS moved = ROW_COUNT;
    IF moved <> 1 THEN
        RAISE EXCEPTION 'moved % keys instead of one', moved;
    END IF;
END;
$$;

-- Destroy at most 100 keys whose time has come: the envelope goes; the row, the public key and the history stay. Returns them
-- with the token objects that are to be removed, of RESIDENT keys. Keys that are in use at the moment wait for the next call.
CREATE FUNCTION cryptography.destroy_due_keys() RETURNS TABLE (destroyed_id UUID, token_object TEXT)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    UPDATE cryptography.keys AS k
    SET encrypted_private_key = '', destroyed_at = clock_timestamp()
    WHERE k.id IN (
        -- By the index of what is due: in the order of ids all keys would be read, and a bare clock_timestamp() is volatile
        -- and no condition of an index.
        SELECT d.id
        FROM cryptography.keys AS d
        WHERE d.destroyed_at IS NULL AND d.destruction_scheduled_at <= (SELECT clock_timestamp())
        ORDER BY d.destruction_scheduled_at
        LIMIT 100
        FOR NO KEY UPDATE SKIP LOCKED
    )
    RETURNING k.id, k.hsm_key_id::TEXT;
END;
$$;
-- squawk-ignore require-concurrent-index-creation
CREATE INDEX idx_keys_destruction_due ON cryptography.keys (destruction_scheduled_at)
    WHERE destruction_scheduled_at IS NOT NULL AND destroyed_at IS NULL;

REVOKE ALL ON FUNCTION
    cryptography.begin_key_status(), cryptography.record_key_change(),
    cryptography.key_event(cryptography.keys, cryptography.keys), cryptography.move_refusal(TEXT, TEXT),
    cryptography.change_fault(TEXT, JSONB, BIGINT, BIGINT, TIMESTAMPTZ, TIMESTAMPTZ),
    cryptography.move_key(UUID, TEXT, JSONB, INTEGER, BIGINT, TEXT, TEXT), cryptography.destroy_due_keys()
    FROM PUBLIC;
GRANT EXECUTE ON FUNCTION
    cryptography.key_event(cryptography.keys, cryptography.keys), cryptography.move_refusal(TEXT, TEXT),
    cryptography.change_fault(TEXT, JSONB, BIGINT, BIGINT, TIMESTAMPTZ, TIMESTAMPTZ)
    TO kms_lifecycle;
GRANT EXECUTE ON FUNCTION cryptography.move_key(UUID, TEXT, JSONB, INTEGER, BIGINT, TEXT, TEXT) TO authenticated_users;
GRANT EXECUTE ON FUNCTION cryptography.destroy_due_keys() TO job_runner;

CREATE TRIGGER tr_keys_record_creation
    AFTER INSERT ON cryptography.keys
    FOR EACH ROW EXECUTE FUNCTION cryptography.record_key_change();
-- Not for a charge, which leaves the version as it is.
CREATE TRIGGER tr_keys_record_change
    AFTER UPDATE ON cryptography.keys
    FOR EACH ROW WHEN (OLD.version <> NEW.version)
    EXECUTE FUNCTION cryptography.record_key_change();

GRANT CREATE ON SCHEMA cryptography TO kms_lifecycle;
ALTER FUNCTION cryptography.record_key_change() OWNER TO kms_lifecycle;
ALTER FUNCTION cryptography.move_key(UUID, TEXT, JSONB, INTEGER, BIGINT, TEXT, TEXT) OWNER TO kms_lifecycle;
ALTER FUNCTION cryptography.destroy_due_keys() OWNER TO kms_lifecycle;
REVOKE CREATE ON SCHEMA cryptography FROM kms_lifecycle;
