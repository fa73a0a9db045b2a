-- Workers share the rotations that are to be done. key_rotations is the log and the queue: there is no second queue.
--
-- A worker claims a rotation for a while (a lease), extends the lease while it lives, and records each step that it has finished.
-- When a worker dies, its lease runs out and another worker continues after the last finished step. Each claim has a number. Whoever
-- records something names the claim: a worker that has lost the rotation meanwhile is refused.
--
-- A lease decides who does the work and nothing else. No key, owner or caller follows from it.

-- A rotation that was in progress before this migration is held by nobody.
ALTER TABLE cryptography.key_rotations NO FORCE ROW LEVEL SECURITY;
UPDATE cryptography.key_rotations SET migration_status = 'pending' WHERE migration_status = 'in_progress';
ALTER TABLE cryptography.key_rotations FORCE ROW LEVEL SECURITY;

ALTER TABLE cryptography.key_rotations
    -- The worker that holds the lease: an id that each process draws at its start.
    ADD COLUMN lease_owner UUID
        CONSTRAINT leased_iff_in_progress CHECK ((migration_status = 'in_progress') = (lease_owner IS NOT NULL)),
    -- Advances with every claim.
    ADD COLUMN claim_number BIGINT NOT NULL DEFAULT 0 CONSTRAINT claim_number_not_negative CHECK (claim_number >= 0),
    -- Claims since the last finished step, the present claim included.
    ADD COLUMN attempts INTEGER NOT NULL DEFAULT 0 CONSTRAINT attempts_not_negative CHECK (attempts >= 0),
    -- When a worker may claim the rotation. While a lease is held this is its end.
    ADD COLUMN next_attempt_at TIMESTAMPTZ NOT NULL DEFAULT NOW(),
    -- The last finished step, empty before the first; and what the next step needs to know of it.
    ADD COLUMN step TEXT NOT NULL DEFAULT '' CONSTRAINT step_length CHECK (char_length(step) <= 50),
    ADD COLUMN step_state JSONB NOT NULL DEFAULT '{}'
        CONSTRAINT step_state_is_an_object CHECK (jsonb_typeof(step_state) = 'object'),
    -- What belongs to the request beside the reason and the user: it holds for a key that is compromised, too; and the service's
    -- MAC of the request.
    ADD COLUMN allows_compromised BOOLEAN NOT NULL DEFAULT FALSE,
    ADD COLUMN request_mac BYTEA CONSTRAINT request_mac_size CHECK (octet_length(request_mac) = 32);

-- Of a million finished rotations the search for due work reads none.
-- squawk-ignore require-concurrent-index-creation
CREATE INDEX idx_key_rotations_due ON cryptography.key_rotations (next_attempt_at)
    WHERE migration_status IN ('pending', 'in_progress');

GRANT SELECT (attempts, next_attempt_at, step, allows_compromised) ON cryptography.key_rotations TO authenticated_users, admin_users;
GRANT SELECT (
    id, user_id, old_key_id, new_key_id, rotation_reason, migration_status, error_message, lease_owner, claim_number, attempts,
    next_attempt_at, step, step_state, initiated_by, allows_compromised, request_mac, created_at
) ON cryptography.key_rotations TO kms_lifecycle;
GRANT UPDATE (
    new_key_id, affected_records_count, completed_at, migration_status, error_message, lease_owner, claim_number, attempts,
    next_attempt_at, step, step_state
) ON cryptography.key_rotations TO kms_lifecycle;
CREATE POLICY key_rotations_lifecycle_read ON cryptography.key_rotations
    FOR SELECT TO kms_lifecycle
    USING (TRUE);
CREATE POLICY key_rotations_lifecycle_change ON cryptography.key_rotations
    FOR UPDATE TO kms_lifecycle
    USING (TRUE)
    WITH CHECK (TRUE);

-- Claim at most claims_max rotations that are due, the longest waiting first, for lease_seconds by the database's clock. A worker
-- waits for no other: it skips rows that are locked. With wanted it claims that rotation alone. A rotation whose lease ran out in its last attempt fails here.
CREATE FUNCTION cryptography.claim_rotations(
    worker UUID, claims_max INTEGER, lease_seconds DOUBLE PRECISION, attempts_max INTEGER, wanted UUID
)
RETURNS TABLE (
    id UUID, claim_number BIGINT, attempts INTEGER, step TEXT, step_state JSONB, user_id UUID, old_key_id UUID, new_key_id UUID,
    rotation_reason VARCHAR, initiated_by UUID, allows_compromised BOOLEAN, request_mac BYTEA, created_at TIMESTAMPTZ
)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    moment CONSTANT TIMESTAMPTZ := clock_timestamp();
BEGIN
    UPDATE cryptography.key_rotations AS r
    SET migration_status = 'failed', lease_owner = NULL,
        error_message = 'the worker of the last attempt did not answer any more'
    WHERE r.id = ANY (ARRAY(
        SELECT d.id
        FROM cryptography.key_rotations AS d
        WHERE d.migration_status IN ('pending', 'in_progress') AND d.next_attempt_at <= moment AND d.attempts >= attempts_max
        ORDER BY d.next_attempt_at
        LIMIT claims_max
        FOR NO KEY UPDATE SKIP LOCKED
    ));
    RETURN QUERY
    UPDATE cryptography.key_rotations AS r
    SET migration_status = 'in_progress', lease_owner = worker, claim_number = r.claim_number + 1, attempts = r.attempts + 1,
        next_attempt_at = moment + make_interval(secs => lease_seconds)
    WHERE r.id = ANY (ARRAY(
        SELECT d.id
        FROM cryptography.key_rotations AS d
        WHERE d.migration_status IN ('pending', 'in_progress') AND d.next_attempt_at <= moment AND d.attempts < attempts_max
            AND (wanted IS NULL OR d.id = wanted)
        ORDER BY d.next_attempt_at
        LIMIT claims_max
        FOR NO KEY UPDATE SKIP LOCKED
    ))
    RETURNING r.id, r.claim_number, r.attempts, r.step, r.step_state, r.user_id, r.old_key_id, r.new_key_id, r.rotation_reason,
        r.initiated_by, r.allows_compromised, r.request_mac, r.created_at;
END;
$$;

-- The functions below return FALSE where the claim is no longer the rotation's: another worker took it over, or it has ended. A
-- lease that ran out, and that nobody took over, is still the worker's.

-- Extend the lease to lease_seconds from now.
CREATE FUNCTION cryptography.extend_rotation_lease(
    rotation UUID, worker UUID, claim BIGINT, lease_seconds DOUBLE PRECISION
) RETURNS BOOLEAN
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    UPDATE cryptography.key_rotations AS r
    SET next_attempt_at = clock_timestamp() + make_interval(secs => lease_seconds)
    WHERE r.id = rotation AND r.lease_owner = worker AND r.claim_number = claim;
    RETURN FOUND;
END;
$$;

-- Record that a step has been finished, and extend the lease. The attempts at the next step begin with this claim.
CREATE FUNCTION cryptography.finish_rotation_step(
    rotation UUID, worker UUID, claim BIGINT, finished TEXT, state JSONB, lease_seconds DOUBLE PRECISION
) RETURNS BOOLEAN
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    UPDATE cryptography.key_rotations AS r
    SET step = finished, step_state = state, attempts = 1,
        next_attempt_at = clock_timestamp() + make_interval(secs => lease_seconds)
    WHERE r.id = rotation AND r.lease_owner = worker AND r.claim_number = claim;
    RETURN FOUND;
END;
$$;

-- Record that the rotation has been completed, with the key that took over, and the number of dependents that it took along.
CREATE FUNCTION cryptography.complete_rotation(
    rotation UUID, worker UUID, claim BIGINT, successor UUID, affected BIGINT
) RETURNS BOOLEAN
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    UPDATE cryptography.key_rotations AS r
    SET migration_status = 'completed', completed_at = clock_timestamp(), new_key_id = successor,
        affected_records_count = affected, lease_owner = NULL,
        error_message = NULL
    WHERE r.id = rotation AND r.lease_owner = worker AND r.claim_number = claim;
    RETURN FOUND;
END;
$$;

-- Record that the attempt failed. The rotation is due again after retry_seconds; after attempts_max attempts it has failed.
CREATE FUNCTION cryptography.fail_rotation(
    rotation UUID, worker UUID, claim BIGINT, message TEXT, retry_seconds DOUBLE PRECISION, attempts_max INTEGER
) RETURNS BOOLEAN
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    UPDATE cryptography.key_rotations AS r
    SET migration_status = CASE WHEN r.attempts >= attempts_max THEN 'failed' ELSE 'pending' END, lease_owner = NULL,
        error_message = message, next_attempt_at = clock_timestamp() + make_interval(secs => retry_seconds)
    WHERE r.id = rotation AND r.lease_owner = worker AND r.claim_number = claim;
    RETURN FOUND;
END;
$$;

-- Give the rotation back unharmed: it is due at once, and the attempt does not count.
CREATE FUNCTION cryptography.release_rotation(rotation UUID, worker UUID, claim BIGINT) RETURNS BOOLEAN
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    UPDATE cryptography.key_rotations AS r
    SET migration_status = 'pending', lease_owner = NULL, attempts = greatest(r.attempts - 1, 0),
        next_attempt_at = clock_timestamp()
    WHERE r.id = rotation AND r.lease_owner = worker AND r.claim_number = claim;
    RETURN FOUND;
END;
$$;

REVOKE ALL ON FUNCTION
    cryptography.claim_rotations(UUID, INTEGER, DOUBLE PRECISION, INTEGER, UUID),
    cryptography.extend_rotation_lease(UUID, UUID, BIGINT, DOUBLE PRECISION),
    cryptography.finish_rotation_step(UUID, UUID, BIGINT, TEXT, JSONB, DOUBLE PRECISION),
    cryptography.complete_rotation(UUID, UUID, BIGINT, UUID, BIGINT),
    cryptography.fail_rotation(UUID, UUID, BIGINT, TEXT, DOUBLE PRECISION, INTEGER),
    cryptography.release_rotation(UUID, UUID, BIGINT)
    FROM PUBLIC;
GRANT EXECUTE ON FUNCTION
    cryptography.claim_rotations(UUID, INTEGER, DOUBLE PRECISION, INTEGER, UUID),
    cryptography.extend_rotation_lease(UUID, UUID, BIGINT, DOUBLE PRECISION),
    cryptography.finish_rotation_step(UUID, UUID, BIGINT, TEXT, JSONB, DOUBLE PRECISION),
    cryptography.complete_rotation(UUID, UUID, BIGINT, UUID, BIGINT),
    cryptography.fail_rotation(UUID, UUID, BIGINT, TEXT, DOUBLE PRECISION, INTEGER),
    cryptography.release_rotation(UUID, UUID, BIGINT)
    TO job_runner;

GRANT CREATE ON SCHEMA cryptography TO kms_lifecycle;
ALTER FUNCTION cryptography.claim_rotations(UUID, INTEGER, DOUBLE PRECISION, INTEGER, UUID) OWNER TO kms_lifecycle;
ALTER FUNCTION cryptography.extend_rotation_lease(UUID, UUID, BIGINT, DOUBLE PRECISION) OWNER TO kms_lifecycle;
ALTER FUNCTION cryptography.finish_rotation_step(UUID, UUID, BIGINT, TEXT, JSONB, DOUBLE PRECISION) OWNER TO kms_lifecycle;
ALTER FUNCTION cryptography.complete_rotation(UUID, UUID, BIGINT, UUID, BIGINT) OWNER TO kms_lifecycle;
ALTER FUNCTION cryptography.fail_rotation(UUID, UUID, BIGINT, TEXT, DOUBLE PRECISION, INTEGER) OWNER TO kms_lifecycle;
ALTER FUNCTION cryptography.release_rotation(UUID, UUID, BIGINT) OWNER TO kms_lifecycle;
REVOKE CREATE ON SCHEMA cryptography FROM kms_lifecycle;
