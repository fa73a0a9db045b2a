-- A rotation gives a key a successor, which takes the key's name. A user asks for it; a worker does it.
--
--   request_rotation ──► pending ──► switch_key (one transaction): the predecessor becomes name@n and is superseded, the
--                                    successor takes the name
--                                ──► copy_grants ──► complete_rotation
--
-- request_mac is the service's MAC of the request: nobody who writes rows past the service can have a key rotated.

-- Of two rotations of one key that begin at once, one wins.
-- squawk-ignore require-concurrent-index-creation
CREATE UNIQUE INDEX idx_key_rotations_one_unfinished ON cryptography.key_rotations (old_key_id)
    WHERE migration_status IN ('pending', 'in_progress');
-- The lineage of a key in both directions, and a user's rotations, the newest first.
-- squawk-ignore require-concurrent-index-creation
CREATE INDEX idx_key_rotations_old_key ON cryptography.key_rotations (old_key_id);
-- squawk-ignore require-concurrent-index-creation
CREATE INDEX idx_key_rotations_new_key ON cryptography.key_rotations (new_key_id);
-- squawk-ignore require-concurrent-index-creation
CREATE INDEX idx_key_rotations_user ON cryptography.key_rotations (user_id, created_at DESC, id DESC);

GRANT INSERT (id, user_id, old_key_id, rotation_reason, initiated_by, allows_compromised, request_mac, created_at)
    ON cryptography.key_rotations TO kms_lifecycle;
CREATE POLICY key_rotations_lifecycle_request ON cryptography.key_rotations
    FOR INSERT TO kms_lifecycle
    WITH CHECK (TRUE);
GRANT SELECT (key_name) ON cryptography.keys TO kms_lifecycle;
GRANT UPDATE (key_name, superseded_at) ON cryptography.keys TO kms_lifecycle;
GRANT INSERT (
    id, user_id, key_name, key_type, key_purpose, key_curve, public_key, encrypted_private_key, key_derivation_path,
    parent_key_id, hsm_key_id, key_status, encryption_algorithm, key_strength, metadata, custody, origin, bound_to,
    max_usage_count, created_at, activated_at, expires_at, record_mac
) ON cryptography.keys TO kms_lifecycle;
GRANT SELECT (operations, granted_by, created_at) ON cryptography.key_grants TO kms_lifecycle;

-- Ask for a rotation of a key of the user for whom the transaction acts, who is at user_version. Returns the id of the rotation:
-- rotation, or that of the rotation of this key which has not ended. Raises invalid_authorization_specification for a user who is
-- not in good standing, no_data_found for a key that is not the user's.
CREATE FUNCTION cryptography.request_rotation(
    rotation UUID, rotated_key UUID, reason TEXT, with_compromised BOOLEAN, moment TIMESTAMPTZ, new_mac BYTEA,
    user_version INTEGER, request_id TEXT, peer TEXT
) RETURNS UUID
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    acting_user CONSTANT UUID := authentication.current_user_id();
    unfinished UUID;
BEGIN
    IF NOT EXISTS (
        SELECT FROM authentication.users AS u
        WHERE u.id = acting_user AND u.version = user_version AND u.deleted_at IS NULL
            AND (u.locked_until IS NULL OR u.locked_until <= clock_timestamp())
    ) THEN
        RAISE EXCEPTION 'the user who acts is not in good standing' USING ERRCODE = 'invalid_authorization_specification';
    END IF;
    -- Whoever asks at the same moment waits here, and finds the rotation of the first.
    PERFORM FROM cryptography.keys AS k WHERE k.id = rotated_key AND k.user_id = acting_user FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'there is no such key' USING ERRCODE = 'no_data_found';
    END IF;
    SELECT r.id INTO unfinished
    FROM cryptography.key_rotations AS r
    WHERE r.old_key_id = rotated_key AND r.migration_status IN ('pending', 'in_progress');
    IF FOUND THEN
        RETURN unfinished;
    END IF;
    INSERT INTO cryptography.key_rotations (
        id, user_id, old_key_id, rotation_reason, initiated_by, allows_compromised, request_mac, created_at
    ) VALUES (rotation, acting_user, rotated_key, reason, acting_user, with_compromised, new_mac, moment);
    PERFORM audit.record_security_event(
        'key.rotation_requested', 'medium', NULL, CASE WHEN pg_input_is_valid(peer, 'inet') THEN peer::INET END, NULL, 'key',
        rotated_key, 'request_rotation', 'success', 30,
        jsonb_build_object('rotation', rotation, 'reason', reason, 'request_id', request_id)
    );
    RETURN rotation;
END;
$$;

-- Give a key its successor, for the worker that holds the claim of the rotation. The key must be at expected_version; it becomes
-- predecessor_name. Both MACs are those of the rows as this function leaves them. The moment lies a little ahead, so that the lock
-- is had before it; where the lock took longer the verdict is BUSY, and the service tries a later moment. Returns 'OK' or the
-- reason why nothing was changed.
CREATE FUNCTION cryptography.switch_key(
    rotation UUID, worker UUID, claim BIGINT, expected_version BIGINT, predecessor_name TEXT, predecessor_mac BYTEA,
    successor JSONB, moment TIMESTAMPTZ
) RETURNS TEXT
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    asked RECORD;
    held RECORD;
    made CONSTANT cryptography.keys := jsonb_populate_record(NULL::cryptography.keys, successor);
    now_at TIMESTAMPTZ;
    changed BIGINT;
BEGIN
    SELECT r.user_id, r.old_key_id, r.new_key_id, r.rotation_reason, r.initiated_by INTO asked
    FROM cryptography.key_rotations AS r
    WHERE r.id = rotation AND r.lease_owner = worker AND r.claim_number = claim
    FOR NO KEY UPDATE;
    IF NOT FOUND OR asked.new_key_id IS NOT NULL THEN
        RETURN 'LEASE_LOST';
    END IF;
    SELECT k.* INTO held
    FROM (
        SELECT id, user_id, key_name, key_type, key_status, version, superseded_at, destruction_scheduled_at, destroyed_at
        FROM cryptography.keys
        WHERE id = asked.old_key_id AND user_id = asked.user_id
        FOR NO KEY UPDATE
    ) AS k;
    now_at := clock_timestamp();
    IF held.id IS NULL OR held.version <> expected_version THEN
        RETURN 'STALE';
    ELSIF moment NOT BETWEEN now_at AND now_at + INTERVAL '5 seconds' THEN
        RETURN 'BUSY';
    ELSIF held.superseded_at IS NOT NULL OR held.destruction_scheduled_at IS NOT NULL OR held.destroyed_at IS NOT NULL
        OR held.key_status = 'revoked' THEN
        RETURN 'STALE';
    END IF;
    IF (made.user_id, made.key_name, made.key_type) IS DISTINCT FROM (held.user_id, held.key_name, held.key_type) THEN
        RAISE EXCEPTION 'the successor is not of the same user, name and type' USING ERRCODE = 'check_violation';
    END IF;
    -- The lock was there before the moment: no use of the predecessor is recorded later than the switch.
    PERFORM pg_sleep(extract(epoch FROM moment - clock_timestamp()));
    PERFORM set_config('app.reason', asked.rotation_reason, TRUE), set_config('app.request_id', rotation::TEXT, TRUE),
        set_config('app.peer', '', TRUE), set_config('app.user_id', coalesce(asked.initiated_by::TEXT, ''), TRUE);
    UPDATE cryptography.keys AS k
    SET key_name = predecessor_name, superseded_at = moment, record_mac = predecessor_mac
    WHERE k.id = held.id;
    GET DIAGNOSTICS changed = ROW_COUNT;
    IF changed <> 1 THEN
        RAISE EXCEPTION 'changed % keys instead of one', changed;
    END IF;
    -- The head of a key is its owner's.
    PERFORM set_config('app.user_id', CASE WHEN asked.initiated_by = asked.user_id THEN asked.user_id::TEXT ELSE '' END, TRUE);
    INSERT INTO cryptography.keys (
        id, user_id, key_name, key_type, key_purpose, key_curve, public_key, encrypted_private_key, key_derivation_path,
        parent_key_id, hsm_key_id, key_status, encryption_algorithm, key_strength, metadata, custody, origin, bound_to,
        max_usage_count, created_at, activated_at, expires_at, record_mac
    ) VALUES (
        made.id, made.user_id, made.key_name, made.key_type, made.key_purpose, made.key_curve, made.public_key,
        made.encrypted_private_key, made.key_derivation_path, made.parent_key_id, made.hsm_key_id, made.key_status,
        made.encryption_algorithm, made.key_strength, made.metadata, made.custody, made.origin, made.bound_to,
        made.max_usage_count, made.created_at, made.activated_at, made.expires_at, made.record_mac
    );
    PERFORM set_config('app.user_id', '', TRUE);
    UPDATE cryptography.key_rotations AS r SET new_key_id = made.id, step = 'switched', attempts = 1 WHERE r.id = rotation;
    RETURN 'OK';
END;
$$;

-- Give the successor the live grants of its predecessor, for the worker that holds the claim of the rotation, and return how many
-- the two have in common. The grants of the predecessor stay: its ciphertexts must still be opened. NULL where the claim is void.
CREATE FUNCTION cryptography.copy_grants(rotation UUID, worker UUID, claim BIGINT) RETURNS BIGINT
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    asked RECORD;
    moment CONSTANT TIMESTAMPTZ := clock_timestamp();
    in_common BIGINT;
BEGIN
    SELECT r.user_id, r.old_key_id, r.new_key_id INTO asked
    FROM cryptography.key_rotations AS r
    WHERE r.id = rotation AND r.lease_owner = worker AND r.claim_number = claim AND r.new_key_id IS NOT NULL
    FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    INSERT INTO cryptography.key_grants (id, owner_id, key_id, grantee_id, operations, granted_by, created_at, expires_at)
    SELECT gen_random_uuid(), g.owner_id, asked.new_key_id, g.grantee_id, g.operations, g.granted_by, moment, g.expires_at
    FROM cryptography.key_grants AS g
    WHERE g.key_id = asked.old_key_id AND g.revoked_at IS NULL AND (g.expires_at IS NULL OR g.expires_at > moment)
        AND NOT EXISTS (SELECT FROM cryptography.key_grants AS o WHERE o.key_id = asked.new_key_id AND o.grantee_id = g.grantee_id);
    -- Whoever may use the key is read again. In the order of their ids: two rotations may have grantees in common.
    PERFORM FROM authentication.users AS u
    WHERE u.id IN (SELECT o.grantee_id FROM cryptography.key_grants AS o WHERE o.key_id = asked.new_key_id AND o.created_at = moment)
    ORDER BY u.id
    FOR NO KEY UPDATE;
    UPDATE authentication.users AS u SET version = u.version + 1
    WHERE u.id IN (SELECT o.grantee_id FROM cryptography.key_grants AS o WHERE o.key_id = asked.new_key_id AND o.created_at = moment);
    SELECT count(*) INTO in_common
    FROM cryptography.key_grants AS o
    WHERE o.key_id = asked.new_key_id AND o.revoked_at IS NULL AND EXISTS (
        SELECT FROM cryptography.key_grants AS g WHERE g.key_id = asked.old_key_id AND g.grantee_id = o.grantee_id
    );
    RETURN in_common;
END;
$$;

REVOKE ALL ON FUNCTION
    cryptography.request_rotation(UUID, UUID, TEXT, BOOLEAN, TIMESTAMPTZ, BYTEA, INTEGER, TEXT, TEXT),
    cryptography.switch_key(UUID, UUID, BIGINT, BIGINT, TEXT, BYTEA, JSONB, TIMESTAMPTZ),
    cryptography.copy_grants(UUID, UUID, BIGINT)
    FROM PUBLIC;
GRANT EXECUTE ON FUNCTION
    cryptography.request_rotation(UUID, UUID, TEXT, BOOLEAN, TIMESTAMPTZ, BYTEA, INTEGER, TEXT, TEXT)
    TO authenticated_users;
GRANT EXECUTE ON FUNCTION
    cryptography.switch_key(UUID, UUID, BIGINT, BIGINT, TEXT, BYTEA, JSONB, TIMESTAMPTZ),
    cryptography.copy_grants(UUID, UUID, BIGINT)
    TO job_runner;

GRANT CREATE ON SCHEMA cryptography TO kms_lifecycle;
ALTER FUNCTION cryptography.request_rotation(UUID, UUID, TEXT, BOOLEAN, TIMESTAMPTZ, BYTEA, INTEGER, TEXT, TEXT)
    OWNER TO kms_lifecycle;
ALTER FUNCTION cryptography.switch_key(UUID, UUID, BIGINT, BIGINT, TEXT, BYTEA, JSONB, TIMESTAMPTZ) OWNER TO kms_lifecycle;
ALTER FUNCTION cryptography.copy_grants(UUID, UUID, BIGINT) OWNER TO kms_lifecycle;
REVOKE CREATE ON SCHEMA cryptography FROM kms_lifecycle;
