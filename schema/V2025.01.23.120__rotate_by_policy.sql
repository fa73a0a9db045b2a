-- Rotations that are tried again, users who rotate the keys of others, dependents of each kind, and rotation by policy.
--
--   the owner, a rotator ──► request_rotation ─┐
--   a policy that is due ──► request_due ──────┴─► pending ──► switch ──► dependents, kind by kind ──► completed
--                                                   ▲                        │
--                                                   └─ retry_rotation ◄─ failed

-- Who rotates ----------------------------------------------------------------------------------------------------------------

-- The migrator owns the table, and its row security is forced.
ALTER TABLE authentication.roles NO FORCE ROW LEVEL SECURITY;
INSERT INTO authentication.roles (name, description, permissions, is_system_role)
VALUES ('rotator', 'rotates the keys of any user, and uses none', '["keys:rotate"]', TRUE);
ALTER TABLE authentication.roles FORCE ROW LEVEL SECURITY;

SET LOCAL ROLE kms_login;
GRANT EXECUTE ON FUNCTION authentication.find_user_by_uri(UUID) TO kms_lifecycle;
RESET ROLE;

-- Whether the user for whom the transaction acts may, at this moment, rotate the keys of any user.
CREATE FUNCTION cryptography.rotates_any() RETURNS BOOLEAN
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN EXISTS (
        SELECT FROM authentication.find_user_by_uri(authentication.current_user_id()) AS f
        WHERE 'keys:rotate' = ANY (f.permissions)
    );
END;
$$;

-- Who owns a key that the user for whom the transaction acts may rotate; NULL for every other key. The service proves the answer
-- by the key's record.
CREATE FUNCTION cryptography.owner_for_rotation(rotated_key UUID) RETURNS UUID
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN (
        SELECT k.user_id
        FROM cryptography.keys AS k
        WHERE k.id = rotated_key AND (k.user_id = authentication.current_user_id() OR (SELECT cryptography.rotates_any()))
    );
END;
$$;

-- Raise invalid_authorization_specification unless the user for whom the transaction acts is in good standing, and at user_version.
CREATE FUNCTION cryptography.check_standing(user_version INTEGER) RETURNS VOID
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF NOT EXISTS (
        SELECT FROM authentication.users AS u
        WHERE u.id = authentication.current_user_id() AND u.version = user_version AND u.deleted_at IS NULL
            AND (u.locked_until IS NULL OR u.locked_until <= clock_timestamp())
    ) THEN
        RAISE EXCEPTION 'the user who acts is not in good standing' USING ERRCODE = 'invalid_authorization_specification';
    END IF;
END;
$$;
REVOKE ALL ON FUNCTION
    cryptography.rotates_any(), cryptography.owner_for_rotation(UUID), cryptography.check_standing(INTEGER)
    FROM PUBLIC;
GRANT EXECUTE ON FUNCTION cryptography.rotates_any(), cryptography.owner_for_rotation(UUID) TO authenticated_users;
GRANT EXECUTE ON FUNCTION cryptography.check_standing(INTEGER) TO kms_lifecycle;

-- A rotator sees the rotations of all keys, the newest first.
CREATE POLICY key_rotations_rotator_read ON cryptography.key_rotations
    FOR SELECT TO authenticated_users
    USING ((SELECT cryptography.rotates_any()));
-- squawk-ignore require-concurrent-index-creation
CREATE INDEX idx_key_rotations_newest ON cryptography.key_rotations (created_at DESC, id DESC);
-- The newest in a status, of a user and of all: among a million that are completed the few others are found at once.
-- squawk-ignore require-concurrent-index-creation
CREATE INDEX idx_key_rotations_user_status ON cryptography.key_rotations (user_id, migration_status, created_at DESC, id DESC);
-- squawk-ignore require-concurrent-index-creation
CREATE INDEX idx_key_rotations_newest_in_status ON cryptography.key_rotations (migration_status, created_at DESC, id DESC);

GRANT CREATE ON SCHEMA cryptography TO kms_lifecycle;
ALTER FUNCTION cryptography.rotates_any() OWNER TO kms_lifecycle;
ALTER FUNCTION cryptography.owner_for_rotation(UUID) OWNER TO kms_lifecycle;

-- Only its owner replaces a function.
SET LOCAL ROLE kms_lifecycle;

-- Ask for a rotation of a key of the user for whom the transaction acts, who is at user_version, or, for a rotator, of any user.
-- Returns the id of the rotation: rotation, or that of the rotation of this key which has not ended. Raises
-- invalid_authorization_specification for a user who is not in good standing, no_data_found for a key that is not there for him.
CREATE OR REPLACE FUNCTION cryptography.request_rotation(
    rotation UUID, rotated_key UUID, reason TEXT, with_compromised BOOLEAN, moment TIMESTAMPTZ, new_mac BYTEA,
    user_version INTEGER, request_id TEXT, peer TEXT
) RETURNS UUID
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    acting_user CONSTANT UUID := authentication.current_user_id();
    owner CONSTANT UUID := cryptography.owner_for_rotation(rotated_key);
    unfinished UUID;
BEGIN
    PERFORM cryptography.check_standing(user_version);
    -- Whoever asks at the same moment waits here, and finds the rotation of the first.
    PERFORM FROM cryptography.keys AS k WHERE k.id = rotated_key AND k.user_id = owner FOR NO KEY UPDATE;
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
    ) VALUES (rotation, owner, rotated_key, reason, acting_user, with_compromised, new_mac, moment);
    PERFORM audit.record_security_event(
        'key.rotation_requested', 'medium', NULL, CASE WHEN pg_input_is_valid(peer, 'inet') THEN peer::INET END, NULL, 'key',
        rotated_key, 'request_rotation', 'success', 30,
        jsonb_build_object('rotation', rotation, 'reason', reason, 'request_id', request_id)
    );
    RETURN rotation;
END;
$$;

-- Make a rotation due at once: one that has failed is pending again, with new attempts, and one that waits for its next attempt
-- waits no longer. For the user for whom the transaction acts, who is at user_version and owns the key or is a rotator. Returns
-- FALSE where the rotation is under way or completed, and where another rotation of the key is under way.
CREATE FUNCTION cryptography.retry_rotation(rotation UUID, user_version INTEGER, request_id TEXT, peer TEXT) RETURNS BOOLEAN
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    asked RECORD;
BEGIN
    PERFORM cryptography.check_standing(user_version);
    SELECT r.old_key_id, r.rotation_reason INTO asked
    FROM cryptography.key_rotations AS r
    WHERE r.id = rotation AND r.user_id = cryptography.owner_for_rotation(r.old_key_id);
    IF NOT FOUND THEN
        RAISE EXCEPTION 'there is no such rotation' USING ERRCODE = 'no_data_found';
    END IF;
    -- Whoever asks for a rotation of this key meanwhile waits here.
    PERFORM FROM cryptography.keys AS k WHERE k.id = asked.old_key_id FOR NO KEY UPDATE;
    IF EXISTS (
        SELECT FROM cryptography.key_rotations AS o
        WHERE o.old_key_id = asked.old_key_id AND o.id <> rotation AND o.migration_status IN ('pending', 'in_progress')
    ) THEN
        RETURN FALSE;
    END IF;
    -- A worker may have the row, and wait for the key: it is left alone.
    PERFORM FROM cryptography.key_rotations AS r
    WHERE r.id = rotation AND r.migration_status IN ('pending', 'failed')
    FOR NO KEY UPDATE SKIP LOCKED;
    IF NOT FOUND THEN
        RETURN FALSE;
    END IF;
    UPDATE cryptography.key_rotations AS r
    SET migration_status = 'pending', attempts = 0, error_message = NULL, next_attempt_at = clock_timestamp()
    WHERE r.id = rotation;
    PERFORM audit.record_security_event(
        'key.rotation_retried', 'medium', NULL, CASE WHEN pg_input_is_valid(peer, 'inet') THEN peer::INET END, NULL, 'key',
        asked.old_key_id, 'retry_rotation', 'success', 30,
        jsonb_build_object('rotation', rotation, 'reason', asked.rotation_reason, 'request_id', request_id)
    );
    RETURN TRUE;
END;
$$;

RESET ROLE;
REVOKE ALL ON FUNCTION cryptography.retry_rotation(UUID, INTEGER, TEXT, TEXT) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION cryptography.retry_rotation(UUID, INTEGER, TEXT, TEXT) TO authenticated_users;
REVOKE CREATE ON SCHEMA cryptography FROM kms_lifecycle;

-- Dependents -----------------------------------------------------------------------------------------------------------------
--
-- Each kind has a function of its own, which a worker that holds the claim of the rotation calls after the switch. Each bears being
-- called again.

GRANT SELECT (parent_key_id), UPDATE (parent_key_id) ON cryptography.keys TO kms_lifecycle;
-- squawk-ignore require-concurrent-index-creation
CREATE INDEX idx_keys_parent ON cryptography.keys (parent_key_id) WHERE parent_key_id IS NOT NULL;

-- When the key of the address got a successor. The address stays; no new transaction should use it.
ALTER TABLE blockchain.addresses ADD COLUMN superseded_at TIMESTAMPTZ;
-- squawk-ignore require-concurrent-index-creation
CREATE INDEX idx_addresses_key ON blockchain.addresses (key_id) WHERE key_id IS NOT NULL;
GRANT USAGE ON SCHEMA blockchain TO kms_lifecycle;
GRANT SELECT (key_id, superseded_at), UPDATE (superseded_at) ON blockchain.addresses TO kms_lifecycle;
CREATE POLICY addresses_lifecycle_read ON blockchain.addresses
    FOR SELECT TO kms_lifecycle
    USING (TRUE);
CREATE POLICY addresses_lifecycle_change ON blockchain.addresses
    FOR UPDATE TO kms_lifecycle
    USING (TRUE)
    WITH CHECK (TRUE);

GRANT CREATE ON SCHEMA cryptography TO kms_lifecycle;
SET LOCAL ROLE kms_lifecycle;

-- Give the successor the live grants of its predecessor, for the worker that holds the claim of the rotation, and return how many
-- the two have in common. The grants of the predecessor stay: its ciphertexts must still be opened. NULL where the claim is void.
CREATE OR REPLACE FUNCTION cryptography.copy_grants(rotation UUID, worker UUID, claim BIGINT) RETURNS BIGINT
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    asked RECORD;
    moment CONSTANT TIMESTAMPTZ := clock_timestamp();
    in_common BIGINT;
BEGIN
    SELECT r.user_id, r.old_key_id, r.new_key_id, r.initiated_by INTO asked
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
    PERFORM set_config('app.user_id', coalesce(asked.initiated_by::TEXT, ''), TRUE);
    PERFORM audit.record_security_event(
        'key.granted', 'medium', NULL, NULL, NULL, 'key', asked.new_key_id, 'copy_grants', 'success', 30, jsonb_build_object(
            'grant', o.id, 'grantee', o.grantee_id, 'operations', o.operations, 'expires_at', o.expires_at, 'rotation', rotation
        )
    )
    FROM cryptography.key_grants AS o
    WHERE o.key_id = asked.new_key_id AND o.created_at = moment;
    SELECT count(*) INTO in_common
    FROM cryptography.key_grants AS o
    WHERE o.key_id = asked.new_key_id AND o.revoked_at IS NULL AND EXISTS (
        SELECT FROM cryptography.key_grants AS g WHERE g.key_id = asked.old_key_id AND g.grantee_id = o.grantee_id
    );
    RETURN in_common;
END;
$$;

-- Make the successor the parent of a child of its predecessor that is at expected_version; new_mac is that of the row as it is then.
-- Returns 'OK', 'STALE' where the child is another meanwhile, or 'LEASE_LOST'.
CREATE FUNCTION cryptography.adopt_child(
    rotation UUID, worker UUID, claim BIGINT, child UUID, expected_version BIGINT, new_mac BYTEA
) RETURNS TEXT
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    asked RECORD;
BEGIN
    SELECT r.user_id, r.old_key_id, r.new_key_id, r.rotation_reason, r.initiated_by INTO asked
    FROM cryptography.key_rotations AS r
    WHERE r.id = rotation AND r.lease_owner = worker AND r.claim_number = claim AND r.new_key_id IS NOT NULL
    FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        RETURN 'LEASE_LOST';
    END IF;
    PERFORM set_config('app.reason', asked.rotation_reason, TRUE), set_config('app.request_id', rotation::TEXT, TRUE),
        set_config('app.peer', '', TRUE), set_config('app.user_id', coalesce(asked.initiated_by::TEXT, ''), TRUE);
    UPDATE cryptography.keys AS k SET parent_key_id = asked.new_key_id, record_mac = new_mac
    WHERE k.id = child AND k.user_id = asked.user_id AND k.parent_key_id = asked.old_key_id AND k.version = expected_version;
    RETURN CASE WHEN FOUND THEN 'OK' ELSE 'STALE' END;
END;
$$;

-- Mark the addresses of the predecessor, which stay, and return how many there are. NULL where the claim is void.
CREATE FUNCTION cryptography.mark_addresses(rotation UUID, worker UUID, claim BIGINT) RETURNS BIGINT
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    asked RECORD;
BEGIN
    SELECT r.old_key_id INTO asked
    FROM cryptography.key_rotations AS r
    WHERE r.id = rotation AND r.lease_owner = worker AND r.claim_number = claim AND r.new_key_id IS NOT NULL
    FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    UPDATE blockchain.addresses AS a SET superseded_at = clock_timestamp()
    WHERE a.key_id = asked.old_key_id AND a.superseded_at IS NULL;
    RETURN (SELECT count(*) FROM blockchain.addresses AS a WHERE a.key_id = asked.old_key_id);
END;
$$;

RESET ROLE;
REVOKE ALL ON FUNCTION
    cryptography.adopt_child(UUID, UUID, BIGINT, UUID, BIGINT, BYTEA), cryptography.mark_addresses(UUID, UUID, BIGINT)
    FROM PUBLIC;
GRANT EXECUTE ON FUNCTION
    cryptography.adopt_child(UUID, UUID, BIGINT, UUID, BIGINT, BYTEA), cryptography.mark_addresses(UUID, UUID, BIGINT)
    TO job_runner;
REVOKE CREATE ON SCHEMA cryptography FROM kms_lifecycle;

-- Policies -------------------------------------------------------------------------------------------------------------------

-- When the keys that have a name of a user are rotated without anybody asking. The service makes policy_mac and believes no row without
-- it. A policy belongs to the name: the successor of a rotation is under it from the switch on.
CREATE TABLE cryptography.rotation_policies (
    user_id UUID NOT NULL REFERENCES authentication.users (id) ON DELETE RESTRICT,
    key_name TEXT COLLATE "C" NOT NULL CONSTRAINT policy_name_length CHECK (char_length(key_name) BETWEEN 1 AND 90),
    every_seconds BIGINT CONSTRAINT every_positive CHECK (every_seconds > 0),
    before_expiry_seconds BIGINT CONSTRAINT before_expiry_positive CHECK (before_expiry_seconds > 0),
    at_usage_percent INTEGER CONSTRAINT at_usage_percent_range CHECK (at_usage_percent BETWEEN 1 AND 99),
    on_compromise BOOLEAN NOT NULL,
    is_paused BOOLEAN NOT NULL,
    version BIGINT NOT NULL CONSTRAINT policy_version_positive CHECK (version > 0),
    policy_mac BYTEA NOT NULL CONSTRAINT policy_mac_size CHECK (octet_length(policy_mac) = 32),
    -- When workers look at the policy, and nothing else: they judge by the key's record. NULL: nothing lies ahead by time.
    look_at TIMESTAMPTZ,
    -- Not earlier than this a rotation is asked for again; and how often one was asked for since the key has been there.
    retry_at TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp(),
    requests INTEGER NOT NULL DEFAULT 0 CONSTRAINT requests_not_negative CHECK (requests >= 0),
    PRIMARY KEY (user_id, key_name)
);
-- What is due by time, and the policies that look at uses. Of a million others the searches read none.
CREATE INDEX idx_rotation_policies_look ON cryptography.rotation_policies (look_at) WHERE NOT is_paused AND look_at IS NOT NULL;
CREATE INDEX idx_rotation_policies_usage ON cryptography.rotation_policies (user_id, key_name)
    WHERE NOT is_paused AND at_usage_percent IS NOT NULL;
ALTER TABLE cryptography.rotation_policies ENABLE ROW LEVEL SECURITY;
ALTER TABLE cryptography.rotation_policies FORCE ROW LEVEL SECURITY;
CREATE POLICY rotation_policies_own_data ON cryptography.rotation_policies
    FOR SELECT TO authenticated_users
    USING (user_id = authentication.current_user_id());
CREATE POLICY rotation_policies_admin_read ON cryptography.rotation_policies
    FOR SELECT TO admin_users
    USING (TRUE);
CREATE POLICY rotation_policies_lifecycle ON cryptography.rotation_policies
    FOR ALL TO kms_lifecycle
    USING (TRUE)
    WITH CHECK (TRUE);
GRANT SELECT ON cryptography.rotation_policies TO authenticated_users, admin_users, kms_lifecycle;
GRANT INSERT, UPDATE, DELETE ON cryptography.rotation_policies TO kms_lifecycle;

GRANT CREATE ON SCHEMA cryptography TO kms_lifecycle;
SET LOCAL ROLE kms_lifecycle;

-- Set the policy of a name of the user for whom the transaction acts, who is at user_version. new_version is one more than that of the
-- policy that it replaces, 1 for the first. Returns FALSE where another was set or cleared meanwhile. Raises no_data_found where no
-- key of the user has the name.
CREATE FUNCTION cryptography.set_rotation_policy(
    name TEXT, every BIGINT, before_expiry BIGINT, at_usage INTEGER, with_compromise BOOLEAN, paused BOOLEAN, new_version BIGINT,
    new_mac BYTEA, first_look TIMESTAMPTZ, user_version INTEGER, request_id TEXT, peer TEXT
) RETURNS BOOLEAN
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    acting_user CONSTANT UUID := authentication.current_user_id();
    held UUID;
    stored BIGINT;
BEGIN
    PERFORM cryptography.check_standing(user_version);
    SELECT k.id INTO held FROM cryptography.keys AS k WHERE k.user_id = acting_user AND k.key_name = name FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'there is no such key' USING ERRCODE = 'no_data_found';
    END IF;
    INSERT INTO cryptography.rotation_policies AS p (
        user_id, key_name, every_seconds, before_expiry_seconds, at_usage_percent, on_compromise, is_paused, version, policy_mac,
        look_at
    ) SELECT acting_user, name, every, before_expiry, at_usage, with_compromise, paused, new_version, new_mac, first_look
    WHERE new_version = 1 OR EXISTS (
        SELECT FROM cryptography.rotation_policies AS o WHERE o.user_id = acting_user AND o.key_name = name
    )
    ON CONFLICT (user_id, key_name) DO UPDATE SET
        every_seconds = EXCLUDED.every_seconds, before_expiry_seconds = EXCLUDED.before_expiry_seconds,
        at_usage_percent = EXCLUDED.at_usage_percent, on_compromise = EXCLUDED.on_compromise, is_paused = EXCLUDED.is_paused,
        version = EXCLUDED.version, policy_mac = EXCLUDED.policy_mac, look_at = EXCLUDED.look_at, retry_at = clock_timestamp(),
        requests = 0
    WHERE p.version = new_version - 1;
    GET DIAGNOSTICS stored = ROW_COUNT;
    IF stored <> 1 THEN
        RETURN FALSE;
    END IF;
    PERFORM audit.record_security_event(
        'key.rotation_policy_set', 'low', NULL, CASE WHEN pg_input_is_valid(peer, 'inet') THEN peer::INET END, NULL, 'key', held,
        'set_rotation_policy', 'success', 0, jsonb_build_object(
            'request_id', request_id, 'key_name', name, 'policy_version', new_version, 'every_seconds', every,
            'before_expiry_seconds', before_expiry, 'at_usage_percent', at_usage, 'on_compromise', with_compromise,
            'is_paused', paused
        )
    );
    RETURN TRUE;
END;
$$;

-- Clear the policy of a name of the user for whom the transaction acts, who is at user_version, if there is one.
CREATE FUNCTION cryptography.clear_rotation_policy(name TEXT, user_version INTEGER, request_id TEXT, peer TEXT) RETURNS VOID
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    acting_user CONSTANT UUID := authentication.current_user_id();
BEGIN
    PERFORM cryptography.check_standing(user_version);
    -- A switch that the policy asked for is over when this lock is had, or finds no policy.
    PERFORM FROM cryptography.keys AS k WHERE k.user_id = acting_user AND k.key_name = name FOR NO KEY UPDATE;
    DELETE FROM cryptography.rotation_policies AS p WHERE p.user_id = acting_user AND p.key_name = name;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    PERFORM audit.record_security_event(
        'key.rotation_policy_cleared', 'low', NULL, CASE WHEN pg_input_is_valid(peer, 'inet') THEN peer::INET END, NULL, 'key',
        (SELECT k.id FROM cryptography.keys AS k WHERE k.user_id = acting_user AND k.key_name = name), 'clear_rotation_policy',
        'success', 0, jsonb_build_object('request_id', request_id, 'key_name', name)
    );
END;
$$;

-- At most policies_max policies that are to be looked at, the longest waiting first.
CREATE FUNCTION cryptography.policies_to_look_at(policies_max INTEGER)
RETURNS SETOF cryptography.rotation_policies
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    SELECT p.* FROM cryptography.rotation_policies AS p
    WHERE NOT p.is_paused AND p.look_at IS NOT NULL AND p.look_at <= clock_timestamp()
    ORDER BY p.look_at
    LIMIT policies_max;
END;
$$;

-- Of the next policies_max policies that look at uses, behind a name of a user: those whose key has reached its share, and the last,
-- which says where to go on. is_reached tells the two apart; place counts from 1.
CREATE FUNCTION cryptography.policies_reached(after_user UUID, after_name TEXT, policies_max INTEGER)
RETURNS TABLE (policy cryptography.rotation_policies, is_reached BOOLEAN, place BIGINT)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    SELECT judged.policy, judged.is_reached, judged.place
    FROM (
        SELECT walked.policy, walked.place, coalesce(
            (walked.policy).retry_at <= clock_timestamp() AND k.usage_counter::NUMERIC * 100
                >= (walked.policy).at_usage_percent * cryptography.usage_limit(k.key_type, k.max_usage_count)::NUMERIC,
            FALSE
        ) AS is_reached
        FROM (
            SELECT p AS policy, row_number() OVER (ORDER BY p.user_id, p.key_name) AS place
            FROM cryptography.rotation_policies AS p
            WHERE NOT p.is_paused AND p.at_usage_percent IS NOT NULL AND (p.user_id, p.key_name) > (after_user, after_name)
            ORDER BY p.user_id, p.key_name
            LIMIT policies_max
        ) AS walked
        LEFT JOIN cryptography.keys AS k
            ON k.user_id = (walked.policy).user_id AND k.key_name = (walked.policy).key_name
            -- A key that no use makes due would be looked at in each round.
            AND k.superseded_at IS NULL AND k.deactivated_at IS NULL AND k.destruction_scheduled_at IS NULL
            AND k.key_status IN ('active', 'inactive', 'expired')
    ) AS judged
    WHERE judged.is_reached OR judged.place = policies_max
    ORDER BY judged.place;
END;
$$;

-- Look at a policy again at a moment (NULL: when its key changes). Where it could not be judged, not by its uses earlier either.
-- Nothing is done where the policy or its key changed since the version and the look_at that the worker has read: it looks again.
CREATE FUNCTION cryptography.look_at_policy_later(
    owner UUID, name TEXT, seen_version BIGINT, seen_look_at TIMESTAMPTZ, next_look TIMESTAMPTZ, is_failure BOOLEAN
) RETURNS VOID
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    UPDATE cryptography.rotation_policies AS p
    SET look_at = next_look, retry_at = CASE WHEN is_failure THEN next_look ELSE p.retry_at END,
        requests = CASE WHEN is_failure THEN least(p.requests + 1, 1000) ELSE p.requests END
    WHERE p.user_id = owner AND p.key_name = name AND p.version = seen_version AND p.look_at IS NOT DISTINCT FROM seen_look_at;
END;
$$;

-- Ask for the rotation of a key of a user because its policy says so. It is not asked for again before wait_seconds have passed,
-- unless the key changes. Returns rotation; NULL where the key has a successor, or a rotation that has not ended, and where the policy
-- or its key changed since the version and the look_at that the worker has read: it looks again.
CREATE FUNCTION cryptography.request_due_rotation(
    rotation UUID, owner UUID, name TEXT, seen_version BIGINT, seen_look_at TIMESTAMPTZ, rotated_key UUID, reason TEXT,
    with_compromised BOOLEAN, moment TIMESTAMPTZ, new_mac BYTEA, wait_seconds DOUBLE PRECISION
) RETURNS UUID
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    next_look TIMESTAMPTZ;
    is_new BOOLEAN;
BEGIN
    -- Another worker that has found the same waits here, and finds that the first has looked.
    PERFORM FROM cryptography.keys AS k
    WHERE k.id = rotated_key AND k.user_id = owner AND k.key_name = name AND k.superseded_at IS NULL
    FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    next_look := clock_timestamp() + make_interval(secs => wait_seconds);
    is_new := NOT EXISTS (
        SELECT FROM cryptography.key_rotations AS r
        WHERE r.old_key_id = rotated_key AND r.migration_status IN ('pending', 'in_progress')
    );
    UPDATE cryptography.rotation_policies AS p
    SET look_at = next_look, retry_at = next_look, requests = CASE WHEN is_new THEN least(p.requests + 1, 1000) ELSE p.requests END
    WHERE p.user_id = owner AND p.key_name = name AND p.version = seen_version AND p.look_at IS NOT DISTINCT FROM seen_look_at;
    IF NOT FOUND OR NOT is_new THEN
        RETURN NULL;
    END IF;
    INSERT INTO cryptography.key_rotations (
        id, user_id, old_key_id, rotation_reason, initiated_by, allows_compromised, request_mac, created_at
    ) VALUES (rotation, owner, rotated_key, reason, NULL, with_compromised, new_mac, moment);
    PERFORM audit.record_security_event(
        'key.rotation_requested', 'medium', NULL, NULL, NULL, 'key', rotated_key, 'request_rotation', 'success', 30,
        jsonb_build_object('rotation', rotation, 'reason', reason)
    );
    RETURN rotation;
END;
$$;

-- The version of the policy is one argument more.
-- squawk-ignore ban-drop-function
DROP FUNCTION cryptography.switch_key(UUID, UUID, BIGINT, BIGINT, TEXT, BYTEA, JSONB, TIMESTAMPTZ);

-- Give a key its successor, for the worker that holds the claim of the rotation. The key must be at expected_version; it becomes
-- predecessor_name. Both MACs are those of the rows as this function leaves them. The moment lies a little ahead, so that the lock
-- is had before it; where the lock took longer the verdict is BUSY, and the service tries a later moment. A rotation that a policy
-- asked for is done only under the version of the policy that the service has proven. Returns 'OK' or the reason why nothing was changed.
CREATE FUNCTION cryptography.switch_key(
    rotation UUID, worker UUID, claim BIGINT, expected_version BIGINT, predecessor_name TEXT, predecessor_mac BYTEA,
    successor JSONB, moment TIMESTAMPTZ, policy_version BIGINT
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
    ELSIF asked.initiated_by IS NULL AND NOT EXISTS (
        -- Whoever sets or clears the policy waits for the lock of the key: no answered pause is overrun.
        SELECT FROM cryptography.rotation_policies AS p
        WHERE p.user_id = held.user_id AND p.key_name = held.key_name AND NOT p.is_paused AND p.version = policy_version
    ) THEN
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

-- A change of a key that its policy may turn on: workers look at the policy at once. A successor takes the name in such a change.
CREATE FUNCTION cryptography.note_policy_change() RETURNS TRIGGER
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    UPDATE cryptography.rotation_policies AS p
    SET look_at = clock_timestamp(), retry_at = clock_timestamp(), requests = 0
    WHERE p.user_id = OLD.user_id AND p.key_name = OLD.key_name;
    RETURN NULL;
END;
$$;

RESET ROLE;
CREATE TRIGGER tr_keys_note_policy_change
    AFTER UPDATE OF
        key_name, key_status, max_usage_count, activated_at, expires_at, compromised_at, deactivated_at, superseded_at,
        destruction_scheduled_at, destroyed_at
    ON cryptography.keys
    FOR EACH ROW EXECUTE FUNCTION cryptography.note_policy_change();

REVOKE ALL ON FUNCTION
    cryptography.set_rotation_policy(
        TEXT, BIGINT, BIGINT, INTEGER, BOOLEAN, BOOLEAN, BIGINT, BYTEA, TIMESTAMPTZ, INTEGER, TEXT, TEXT
    ),
    cryptography.clear_rotation_policy(TEXT, INTEGER, TEXT, TEXT),
    cryptography.policies_to_look_at(INTEGER),
    cryptography.policies_reached(UUID, TEXT, INTEGER),
    cryptography.look_at_policy_later(UUID, TEXT, BIGINT, TIMESTAMPTZ, TIMESTAMPTZ, BOOLEAN),
    cryptography.request_due_rotation(
        UUID, UUID, TEXT, BIGINT, TIMESTAMPTZ, UUID, TEXT, BOOLEAN, TIMESTAMPTZ, BYTEA, DOUBLE PRECISION
    ),
    cryptography.switch_key(UUID, UUID, BIGINT, BIGINT, TEXT, BYTEA, JSONB, TIMESTAMPTZ, BIGINT),
    cryptography.note_policy_change()
    FROM PUBLIC;
GRANT EXECUTE ON FUNCTION
    cryptography.set_rotation_policy(
        TEXT, BIGINT, BIGINT, INTEGER, BOOLEAN, BOOLEAN, BIGINT, BYTEA, TIMESTAMPTZ, INTEGER, TEXT, TEXT
    ),
    cryptography.clear_rotation_policy(TEXT, INTEGER, TEXT, TEXT)
    TO authenticated_users;
GRANT EXECUTE ON FUNCTION
    cryptography.policies_to_look_at(INTEGER),
    cryptography.policies_reached(UUID, TEXT, INTEGER),
    cryptography.look_at_policy_later(UUID, TEXT, BIGINT, TIMESTAMPTZ, TIMESTAMPTZ, BOOLEAN),
    cryptography.request_due_rotation(
        UUID, UUID, TEXT, BIGINT, TIMESTAMPTZ, UUID, TEXT, BOOLEAN, TIMESTAMPTZ, BYTEA, DOUBLE PRECISION
    ),
    cryptography.switch_key(UUID, UUID, BIGINT, BIGINT, TEXT, BYTEA, JSONB, TIMESTAMPTZ, BIGINT)
    TO job_runner;
REVOKE CREATE ON SCHEMA cryptography FROM kms_lifecycle;

-- What operators see ---------------------------------------------------------------------------------------------------------

-- Policies whose key was due and has not been rotated although that was tried, or that could not be followed.
CREATE INDEX idx_rotation_policies_overdue ON cryptography.rotation_policies (retry_at) WHERE NOT is_paused AND requests > 1;
-- The newest that failed.
-- squawk-ignore require-concurrent-index-creation
CREATE INDEX idx_key_rotations_failed ON cryptography.key_rotations (created_at DESC) WHERE migration_status = 'failed';

GRANT CREATE ON SCHEMA cryptography TO kms_lifecycle;
SET LOCAL ROLE kms_lifecycle;

-- How the rotations are: due (for a worker to claim), running (a lease holds), failed, each to 1,000; for how many seconds the oldest
-- rotation has waited for its end; and how many policies are overdue, to 1,000.
CREATE FUNCTION cryptography.rotation_backlog()
RETURNS TABLE (due BIGINT, running BIGINT, failed BIGINT, oldest_seconds DOUBLE PRECISION, policies_overdue BIGINT)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    moment CONSTANT TIMESTAMPTZ := clock_timestamp();
BEGIN
    RETURN QUERY
    SELECT u.due, u.running, (
        SELECT count(*)
        FROM (
            SELECT FROM cryptography.key_rotations AS f
            WHERE f.migration_status = 'failed'
            ORDER BY f.created_at DESC
            LIMIT 1000
        ) AS counted
    ), u.oldest_seconds, (
        SELECT count(*)
        FROM (SELECT FROM cryptography.rotation_policies AS p WHERE NOT p.is_paused AND p.requests > 1 LIMIT 1000) AS counted
    )
    FROM (
        SELECT count(*) FILTER (WHERE r.next_attempt_at <= moment) AS due,
            count(*) FILTER (WHERE r.migration_status = 'in_progress' AND r.next_attempt_at > moment) AS running,
            extract(epoch FROM moment - min(r.created_at))::DOUBLE PRECISION AS oldest_seconds
        FROM (
            SELECT n.next_attempt_at, n.migration_status, n.created_at FROM cryptography.key_rotations AS n
            WHERE n.migration_status IN ('pending', 'in_progress')
            ORDER BY n.next_attempt_at
            LIMIT 1000
        ) AS r
    ) AS u;
END;
$$;

RESET ROLE;
REVOKE ALL ON FUNCTION cryptography.rotation_backlog() FROM PUBLIC;
GRANT EXECUTE ON FUNCTION cryptography.rotation_backlog() TO job_runner;
REVOKE CREATE ON SCHEMA cryptography FROM kms_lifecycle;
