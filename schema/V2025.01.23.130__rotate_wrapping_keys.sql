-- Master keys are rotated: the token gets another generation of KEK and sealing key, and every envelope moves to it.
--
--   register ──► the service makes new envelopes under the new generation
--            ──► plan_rewrapping ──► claim, store_rewrapped … (leased slices)
--            ──► retire_wrapping_keys ──► note_wrapping_keys_destroyed
--
-- No envelope is believed here: the token opens each before it makes the next, and the seal says whose it is. What this file
-- knows of an envelope are the ids of its keys, which stand in it in the clear.

ALTER TABLE cryptography.wrapping_keys
    -- When no envelope named the key any more, and none may name it again.
    ADD COLUMN retired_at TIMESTAMPTZ,
    -- When the key was removed from the token.
    ADD COLUMN destroyed_at TIMESTAMPTZ
        CONSTRAINT destroyed_only_if_retired CHECK (destroyed_at IS NULL OR retired_at IS NOT NULL);

-- The id that stands in an envelope before the byte `place` (docs/formats.md): 2 for the KEK, 18 for the sealing key. NULL for a
-- text that is no envelope.
CREATE FUNCTION cryptography.envelope_key(envelope TEXT, place INTEGER) RETURNS UUID
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
RETURN CASE
    WHEN substr(envelope, 1, 64) ~ '^[A-Za-z0-9+/]{64}$'
        THEN encode(substr(decode(substr(envelope, 1, 64), 'base64'), place + 1, 16), 'hex')::UUID
END;
REVOKE ALL ON FUNCTION cryptography.envelope_key(TEXT, INTEGER) FROM PUBLIC;
-- Whoever changes keys computes the index below.
GRANT EXECUTE ON FUNCTION cryptography.envelope_key(TEXT, INTEGER)
    TO authenticated_users, kms_lifecycle, kms_ledger, job_runner;

-- Of a million envelopes the search for those of an old generation reads no other.
-- squawk-ignore require-concurrent-index-creation
CREATE INDEX idx_keys_sealing_key ON cryptography.keys (cryptography.envelope_key(encrypted_private_key, 18), id)
    WHERE encrypted_private_key <> '';

-- An envelope alone is no other version of a key: whoever uses the key, or moves it, goes on undisturbed. The record's MAC does
-- not cover the envelope.
DROP TRIGGER tr_keys_advance_version ON cryptography.keys;
CREATE TRIGGER tr_keys_advance_version
    BEFORE UPDATE OF
        id, user_id, key_name, key_type, key_purpose, key_curve, public_key, key_derivation_path,
        parent_key_id, hsm_key_id, key_status, encryption_algorithm, key_strength, max_usage_count, created_at,
        activated_at, expires_at, compromised_at, revoked_at, metadata, custody, origin, bound_to, version,
        deactivated_at, superseded_at, destruction_scheduled_at, destroyed_at, compromise_occurred_at
    ON cryptography.keys
    FOR EACH ROW EXECUTE FUNCTION cryptography.advance_key_version();

-- The envelopes that leave a sealing key, in sixteen slices: those of keys whose id begins with the same hexadecimal digit. A slice
-- is leased work; it is due as long as an envelope of it names the key.
CREATE TABLE cryptography.rewrapping (
    id UUID PRIMARY KEY DEFAULT gen_random_uuid(),
    sealing_key_id UUID NOT NULL REFERENCES cryptography.wrapping_keys (id),
    slice INTEGER NOT NULL CHECK (slice BETWEEN 0 AND 15),
    -- How many were moved so far, and how many of these passed through the host.
    moved BIGINT NOT NULL DEFAULT 0 CHECK (moved >= 0),
    moved_sealed BIGINT NOT NULL DEFAULT 0 CHECK (moved_sealed >= 0),
    -- How many did not open when they were last tried.
    not_opened BIGINT NOT NULL DEFAULT 0 CHECK (not_opened >= 0),
    last_moved_at TIMESTAMPTZ,
    error_message TEXT,
    -- As in key_rotations.
    lease_owner UUID,
    claim_number BIGINT NOT NULL DEFAULT 0 CHECK (claim_number >= 0),
    attempts INTEGER NOT NULL DEFAULT 0 CHECK (attempts >= 0),
    next_attempt_at TIMESTAMPTZ NOT NULL DEFAULT NOW(),
    step TEXT NOT NULL DEFAULT '' CHECK (char_length(step) <= 50),
    step_state JSONB NOT NULL DEFAULT '{}' CHECK (jsonb_typeof(step_state) = 'object'),
    UNIQUE (sealing_key_id, slice)
);
ALTER TABLE cryptography.rewrapping ENABLE ROW LEVEL SECURITY;
ALTER TABLE cryptography.rewrapping FORCE ROW LEVEL SECURITY;
CREATE POLICY rewrapping_job_read ON cryptography.rewrapping
    FOR SELECT TO job_runner
    USING (TRUE);
CREATE POLICY rewrapping_lifecycle ON cryptography.rewrapping
    FOR ALL TO kms_lifecycle
    USING (TRUE)
    WITH CHECK (TRUE);
GRANT SELECT (id, sealing_key_id, slice, moved, moved_sealed, not_opened, last_moved_at, error_message)
    ON cryptography.rewrapping TO job_runner;
GRANT SELECT (
    id, sealing_key_id, slice, moved, moved_sealed, not_opened, last_moved_at, error_message, lease_owner, claim_number, attempts,
    next_attempt_at, step, step_state
) ON cryptography.rewrapping TO kms_lifecycle;
GRANT INSERT (sealing_key_id, slice) ON cryptography.rewrapping TO kms_lifecycle;
GRANT UPDATE (
    moved, moved_sealed, not_opened, last_moved_at, error_message, lease_owner, claim_number, attempts, next_attempt_at, step,
    step_state
) ON cryptography.rewrapping TO kms_lifecycle;

CREATE POLICY wrapping_keys_lifecycle_read ON cryptography.wrapping_keys
    FOR SELECT TO kms_lifecycle
    USING (TRUE);
CREATE POLICY wrapping_keys_lifecycle_change ON cryptography.wrapping_keys
    FOR UPDATE TO kms_lifecycle
    USING (TRUE)
    WITH CHECK (TRUE);
GRANT SELECT (id, kind, generation, retired_at, destroyed_at) ON cryptography.wrapping_keys TO kms_lifecycle;
GRANT UPDATE (retired_at, destroyed_at) ON cryptography.wrapping_keys TO kms_lifecycle;
GRANT SELECT (retired_at, destroyed_at) ON cryptography.wrapping_keys TO job_runner;
GRANT SELECT (key_purpose, key_strength, bound_to, origin, custody, public_key, hsm_key_id, encrypted_private_key)
    ON cryptography.keys TO kms_lifecycle;
GRANT UPDATE (encrypted_private_key) ON cryptography.keys TO kms_lifecycle;

-- Whether an envelope of the slice names the key. The ids of a slice are those between two.
CREATE FUNCTION cryptography.slice_has_envelopes(sealing_key UUID, slice INTEGER) RETURNS BOOLEAN
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN EXISTS (
        SELECT FROM cryptography.keys AS k
        WHERE k.encrypted_private_key <> '' AND cryptography.envelope_key(k.encrypted_private_key, 18) = sealing_key
            AND k.id BETWEEN rpad(to_hex(slice), 32, '0')::UUID AND rpad(to_hex(slice), 32, 'f')::UUID
    );
END;
$$;

-- Plan that envelopes leave the generations before `newest`, as far as that is not planned yet.
CREATE FUNCTION cryptography.plan_rewrapping(newest INTEGER) RETURNS VOID
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    INSERT INTO cryptography.rewrapping (sealing_key_id, slice)
    SELECT w.id, s.slice
    FROM cryptography.wrapping_keys AS w CROSS JOIN generate_series(0, 15) AS s (slice)
    WHERE w.kind = 'sealing' AND w.generation < newest AND w.destroyed_at IS NULL
        AND NOT EXISTS (SELECT FROM cryptography.rewrapping AS r WHERE r.sealing_key_id = w.id AND r.slice = s.slice)
    ON CONFLICT (sealing_key_id, slice) DO NOTHING;
END;
$$;

-- Claim at most claims_max slices that are due, as claim_rotations claims rotations: those that leave one of the sealing keys
-- `leavable`, which the worker can open and has a later generation for. A slice never fails for good: there is no other way to its end.
CREATE FUNCTION cryptography.claim_rewrapping(
    worker UUID, claims_max INTEGER, lease_seconds DOUBLE PRECISION, wanted UUID, leavable UUID[]
)
RETURNS TABLE (
    id UUID, claim_number BIGINT, attempts INTEGER, step TEXT, step_state JSONB, sealing_key_id UUID, slice INTEGER
)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    moment CONSTANT TIMESTAMPTZ := clock_timestamp();
BEGIN
    RETURN QUERY
    UPDATE cryptography.rewrapping AS r
    SET lease_owner = worker, claim_number = r.claim_number + 1, attempts = r.attempts + 1,
        next_attempt_at = moment + make_interval(secs => lease_seconds)
    WHERE r.id = ANY (ARRAY(
        SELECT d.id
        FROM cryptography.rewrapping AS d
        WHERE d.next_attempt_at <= moment AND (wanted IS NULL OR d.id = wanted) AND d.sealing_key_id = ANY (leavable)
            AND cryptography.slice_has_envelopes(d.sealing_key_id, d.slice)
        ORDER BY d.next_attempt_at
        LIMIT claims_max
        FOR NO KEY UPDATE SKIP LOCKED
    ))
    RETURNING r.id, r.claim_number, r.attempts, r.step, r.step_state, r.sealing_key_id, r.slice;
END;
$$;

-- The functions below return FALSE, or NULL, where the claim is no longer the slice's.

CREATE FUNCTION cryptography.extend_rewrapping_lease(
    item UUID, worker UUID, claim BIGINT, lease_seconds DOUBLE PRECISION
) RETURNS BOOLEAN
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    UPDATE cryptography.rewrapping AS r SET next_attempt_at = clock_timestamp() + make_interval(secs => lease_seconds)
    WHERE r.id = item AND r.lease_owner = worker AND r.claim_number = claim;
    RETURN FOUND;
END;
$$;

CREATE FUNCTION cryptography.finish_rewrapping_step(
    item UUID, worker UUID, claim BIGINT, finished TEXT, state JSONB, lease_seconds DOUBLE PRECISION
) RETURNS BOOLEAN
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    UPDATE cryptography.rewrapping AS r
    SET step = finished, step_state = state, attempts = 1,
        next_attempt_at = clock_timestamp() + make_interval(secs => lease_seconds)
    WHERE r.id = item AND r.lease_owner = worker AND r.claim_number = claim;
    RETURN FOUND;
END;
$$;

-- Record that the slice was gone through. If it still has envelopes it is due again after retry_seconds: some did not open, or a
-- worker that did not know of the new generation yet has made one.
CREATE FUNCTION cryptography.complete_rewrapping(
    item UUID, worker UUID, claim BIGINT, not_opened_now BIGINT, retry_seconds DOUBLE PRECISION
) RETURNS BOOLEAN
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    UPDATE cryptography.rewrapping AS r
    SET lease_owner = NULL, attempts = 0, step = '', step_state = '{}', not_opened = not_opened_now, error_message = NULL,
        next_attempt_at = clock_timestamp() + make_interval(secs => retry_seconds)
    WHERE r.id = item AND r.lease_owner = worker AND r.claim_number = claim;
    RETURN FOUND;
END;
$$;

CREATE FUNCTION cryptography.fail_rewrapping(
    item UUID, worker UUID, claim BIGINT, message TEXT, retry_seconds DOUBLE PRECISION
) RETURNS BOOLEAN
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    UPDATE cryptography.rewrapping AS r
    SET lease_owner = NULL, error_message = message,
        next_attempt_at = clock_timestamp() + make_interval(secs => retry_seconds)
    WHERE r.id = item AND r.lease_owner = worker AND r.claim_number = claim;
    RETURN FOUND;
END;
$$;

CREATE FUNCTION cryptography.release_rewrapping(item UUID, worker UUID, claim BIGINT) RETURNS BOOLEAN
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    UPDATE cryptography.rewrapping AS r
    SET lease_owner = NULL, attempts = greatest(r.attempts - 1, 0), next_attempt_at = clock_timestamp()
    WHERE r.id = item AND r.lease_owner = worker AND r.claim_number = claim;
    RETURN FOUND;
END;
$$;

-- The next rows_max envelopes of a slice that name the key, behind the id `following`, with what each is bound to.
CREATE FUNCTION cryptography.envelopes_to_move(sealing_key UUID, slice INTEGER, following UUID, rows_max INTEGER)
RETURNS TABLE (
    id UUID, user_id UUID, key_type VARCHAR, key_purpose VARCHAR, key_strength INTEGER, bound_to TEXT, origin TEXT, custody TEXT,
    public_key TEXT, hsm_key_id VARCHAR, version BIGINT, encrypted_private_key TEXT
)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    SELECT k.id, k.user_id, k.key_type, k.key_purpose, k.key_strength, k.bound_to, k.origin, k.custody, k.public_key, k.hsm_key_id,
        k.version, k.encrypted_private_key
    FROM cryptography.keys AS k
    WHERE k.encrypted_private_key <> '' AND cryptography.envelope_key(k.encrypted_private_key, 18) = sealing_key
        AND k.id BETWEEN coalesce(following, rpad(to_hex(slice), 32, '0')::UUID) AND rpad(to_hex(slice), 32, 'f')::UUID
        AND k.id IS DISTINCT FROM following
    ORDER BY k.id
    LIMIT rows_max;
END;
$$;

-- Put envelopes of a slice in the place of those before, for the worker that holds its claim. An envelope that has changed
-- meanwhile stays, as does one that somebody holds: a wait for it would have the uses of all others wait. So does one whose
-- replacement has another custody, or names no later generation in use. Nothing else of a key changes. Returns how many were moved.
CREATE FUNCTION cryptography.store_rewrapped(
    item UUID, worker UUID, claim BIGINT, moved_keys UUID[], envelopes_before TEXT[], envelopes_after TEXT[]
) RETURNS BIGINT
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    source RECORD;
    free_keys UUID[];
    counted RECORD;
BEGIN
    SELECT r.sealing_key_id, w.generation INTO source
    FROM cryptography.rewrapping AS r JOIN cryptography.wrapping_keys AS w ON w.id = r.sealing_key_id
    WHERE r.id = item AND r.lease_owner = worker AND r.claim_number = claim
    FOR NO KEY UPDATE OF r;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    free_keys := ARRAY(
        SELECT k.id FROM cryptography.keys AS k WHERE k.id = ANY (moved_keys) ORDER BY k.id FOR NO KEY UPDATE SKIP LOCKED
    );
    WITH changed AS (
        UPDATE cryptography.keys AS k
        SET encrypted_private_key = m.after
        FROM unnest(moved_keys, envelopes_before, envelopes_after) AS m (key_id, before, after)
        JOIN cryptography.wrapping_keys AS w ON w.id = cryptography.envelope_key(m.after, 18)
        WHERE k.id = m.key_id AND k.id = ANY (free_keys) AND k.encrypted_private_key = m.before
            AND cryptography.envelope_key(m.before, 18) = source.sealing_key_id
            AND w.kind = 'sealing' AND w.generation > source.generation AND w.retired_at IS NULL
            -- The version and the custody are the first two bytes.
            AND substr(decode(left(m.after, 4), 'base64'), 1, 2) = substr(decode(left(m.before, 4), 'base64'), 1, 2)
        RETURNING k.custody
    )
    SELECT count(*) AS moved, count(*) FILTER (WHERE c.custody = 'SEALED') AS moved_sealed INTO counted FROM changed AS c;
    IF counted.moved > 0 THEN
        UPDATE cryptography.rewrapping AS r
        SET moved = r.moved + counted.moved, moved_sealed = r.moved_sealed + counted.moved_sealed, last_moved_at = clock_timestamp()
        WHERE r.id = item;
    END IF;
    RETURN counted.moved;
END;
$$;

-- How many envelopes name each pair of wrapping keys, and one key that has such an envelope, read from all envelopes. An id is NULL
-- in what is no envelope.
CREATE FUNCTION cryptography.count_envelopes() RETURNS TABLE (kek_id UUID, sealing_key_id UUID, envelopes BIGINT, example UUID)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    SELECT n.kek_id, n.sealing_key_id, count(*), min(k.id::TEXT)::UUID
    FROM cryptography.keys AS k
    CROSS JOIN LATERAL (SELECT
        cryptography.envelope_key(k.encrypted_private_key, 2) AS kek_id,
        cryptography.envelope_key(k.encrypted_private_key, 18) AS sealing_key_id
    ) AS n
    WHERE k.encrypted_private_key <> ''
    GROUP BY n.kek_id, n.sealing_key_id;
END;
$$;

-- From the retirement of a wrapping key on no envelope names it: whoever stores one waits for a retirement that is under way.
CREATE FUNCTION cryptography.refuse_retired_wrapping_key() RETURNS TRIGGER
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    named RECORD;
BEGIN
    FOR named IN
        SELECT w.retired_at
        FROM cryptography.wrapping_keys AS w
        WHERE w.id IN (
            cryptography.envelope_key(NEW.encrypted_private_key, 2), cryptography.envelope_key(NEW.encrypted_private_key, 18)
        )
        ORDER BY w.id
        FOR SHARE
    LOOP
        IF named.retired_at IS NOT NULL THEN
            RAISE EXCEPTION 'the envelope names a wrapping key that is retired'
                USING ERRCODE = 'object_not_in_prerequisite_state', CONSTRAINT = 'retired_wrapping_key';
        END IF;
    END LOOP;
    RETURN NEW;
END;
$$;

-- Retire a generation, unless an envelope names a key of it: one that is registered, or one of those that the token holds. Returns
-- how many do.
CREATE FUNCTION cryptography.retire_wrapping_keys(retired INTEGER, held UUID[]) RETURNS BIGINT
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    used BIGINT;
BEGIN
    -- Whoever stores an envelope of the generation has ended before this lock is had, or begins after this transaction.
    PERFORM FROM cryptography.wrapping_keys AS w WHERE w.generation = retired ORDER BY w.id FOR NO KEY UPDATE;
    SELECT count(*) INTO used
    FROM cryptography.keys AS k
    WHERE k.encrypted_private_key <> '' AND EXISTS (
        SELECT FROM (
            SELECT w.id FROM cryptography.wrapping_keys AS w WHERE w.generation = retired
            UNION ALL SELECT unnest(held)
        ) AS g (id)
        WHERE g.id IN (
            cryptography.envelope_key(k.encrypted_private_key, 2), cryptography.envelope_key(k.encrypted_private_key, 18)
        )
    );
    IF used = 0 THEN
        UPDATE cryptography.wrapping_keys AS w SET retired_at = clock_timestamp() WHERE w.generation = retired AND w.retired_at IS NULL;
    END IF;
    RETURN used;
END;
$$;

-- Record that the keys of a retired generation were removed from the token.
CREATE FUNCTION cryptography.note_wrapping_keys_destroyed(destroyed INTEGER) RETURNS VOID
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    UPDATE cryptography.wrapping_keys AS w SET destroyed_at = clock_timestamp()
    WHERE w.generation = destroyed AND w.destroyed_at IS NULL;
END;
$$;

-- A generation that is not the first, its retirement and its end are in the trail. They are the operator's doing, and no user's.
CREATE FUNCTION cryptography.record_wrapping_key_change() RETURNS TRIGGER
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    what CONSTANT TEXT := CASE
        WHEN TG_OP = 'INSERT' THEN 'registered' WHEN OLD.destroyed_at IS DISTINCT FROM NEW.destroyed_at THEN 'destroyed' ELSE 'retired'
    END;
BEGIN
    PERFORM audit.record_security_event(
        'wrapping_key.' || what, 'high', NULL, NULL, NULL, 'wrapping_key', NEW.id, what, 'success', 60,
        jsonb_build_object('kind', NEW.kind, 'generation', NEW.generation)
    );
    RETURN NULL;
END;
$$;

REVOKE ALL ON FUNCTION
    cryptography.slice_has_envelopes(UUID, INTEGER),
    cryptography.plan_rewrapping(INTEGER),
    cryptography.claim_rewrapping(UUID, INTEGER, DOUBLE PRECISION, UUID, UUID[]),
    cryptography.extend_rewrapping_lease(UUID, UUID, BIGINT, DOUBLE PRECISION),
    cryptography.finish_rewrapping_step(UUID, UUID, BIGINT, TEXT, JSONB, DOUBLE PRECISION),
    cryptography.complete_rewrapping(UUID, UUID, BIGINT, BIGINT, DOUBLE PRECISION),
    cryptography.fail_rewrapping(UUID, UUID, BIGINT, TEXT, DOUBLE PRECISION),
    cryptography.release_rewrapping(UUID, UUID, BIGINT),
    cryptography.envelopes_to_move(UUID, INTEGER, UUID, INTEGER),
    cryptography.store_rewrapped(UUID, UUID, BIGINT, UUID[], TEXT[], TEXT[]),
    cryptography.count_envelopes(),
    cryptography.refuse_retired_wrapping_key(),
    cryptography.retire_wrapping_keys(INTEGER, UUID[]),
    cryptography.note_wrapping_keys_destroyed(INTEGER),
    cryptography.record_wrapping_key_change()
    FROM PUBLIC;
GRANT EXECUTE ON FUNCTION cryptography.slice_has_envelopes(UUID, INTEGER) TO kms_lifecycle;
GRANT EXECUTE ON FUNCTION
    cryptography.plan_rewrapping(INTEGER),
    cryptography.claim_rewrapping(UUID, INTEGER, DOUBLE PRECISION, UUID, UUID[]),
    cryptography.extend_rewrapping_lease(UUID, UUID, BIGINT, DOUBLE PRECISION),
    cryptography.finish_rewrapping_step(UUID, UUID, BIGINT, TEXT, JSONB, DOUBLE PRECISION),
    cryptography.complete_rewrapping(UUID, UUID, BIGINT, BIGINT, DOUBLE PRECISION),
    cryptography.fail_rewrapping(UUID, UUID, BIGINT, TEXT, DOUBLE PRECISION),
    cryptography.release_rewrapping(UUID, UUID, BIGINT),
    cryptography.envelopes_to_move(UUID, INTEGER, UUID, INTEGER),
    cryptography.store_rewrapped(UUID, UUID, BIGINT, UUID[], TEXT[], TEXT[]),
    cryptography.count_envelopes(),
    cryptography.retire_wrapping_keys(INTEGER, UUID[]),
    cryptography.note_wrapping_keys_destroyed(INTEGER)
    TO job_runner;

CREATE TRIGGER tr_keys_refuse_retired_wrapping_key
    BEFORE INSERT OR UPDATE OF encrypted_private_key ON cryptography.keys
    FOR EACH ROW WHEN (NEW.encrypted_private_key <> '')
    EXECUTE FUNCTION cryptography.refuse_retired_wrapping_key();
CREATE TRIGGER tr_wrapping_keys_record_creation
    AFTER INSERT ON cryptography.wrapping_keys
    FOR EACH ROW WHEN (NEW.generation > 1)
    EXECUTE FUNCTION cryptography.record_wrapping_key_change();
CREATE TRIGGER tr_wrapping_keys_record_change
    AFTER UPDATE ON cryptography.wrapping_keys
    FOR EACH ROW WHEN (
        (OLD.retired_at, OLD.destroyed_at) IS DISTINCT FROM (NEW.retired_at, NEW.destroyed_at)
    )
    EXECUTE FUNCTION cryptography.record_wrapping_key_change();

GRANT CREATE ON SCHEMA cryptography TO kms_lifecycle;
ALTER FUNCTION cryptography.plan_rewrapping(INTEGER) OWNER TO kms_lifecycle;
ALTER FUNCTION cryptography.claim_rewrapping(UUID, INTEGER, DOUBLE PRECISION, UUID, UUID[]) OWNER TO kms_lifecycle;
ALTER FUNCTION cryptography.extend_rewrapping_lease(UUID, UUID, BIGINT, DOUBLE PRECISION) OWNER TO kms_lifecycle;
ALTER FUNCTION cryptography.finish_rewrapping_step(UUID, UUID, BIGINT, TEXT, JSONB, DOUBLE PRECISION) OWNER TO kms_lifecycle;
ALTER FUNCTION cryptography.complete_rewrapping(UUID, UUID, BIGINT, BIGINT, DOUBLE PRECISION) OWNER TO kms_lifecycle;
ALTER FUNCTION cryptography.fail_rewrapping(UUID, UUID, BIGINT, TEXT, DOUBLE PRECISION) OWNER TO kms_lifecycle;
ALTER FUNCTION cryptography.release_rewrapping(UUID, UUID, BIGINT) OWNER TO kms_lifecycle;
ALTER FUNCTION cryptography.envelopes_to_move(UUID, INTEGER, UUID, INTEGER) OWNER TO kms_lifecycle;
ALTER FUNCTION cryptography.store_rewrapped(UUID, UUID, BIGINT, UUID[], TEXT[], TEXT[]) OWNER TO kms_lifecycle;
ALTER FUNCTION cryptography.count_envelopes() OWNER TO kms_lifecycle;
ALTER FUNCTION cryptography.refuse_retired_wrapping_key() OWNER TO kms_lifecycle;
ALTER FUNCTION cryptography.retire_wrapping_keys(INTEGER, UUID[]) OWNER TO kms_lifecycle;
ALTER FUNCTION cryptography.note_wrapping_keys_destroyed(INTEGER) OWNER TO kms_lifecycle;
ALTER FUNCTION cryptography.record_wrapping_key_change() OWNER TO kms_lifecycle;
REVOKE CREATE ON SCHEMA cryptography FROM kms_lifecycle;
