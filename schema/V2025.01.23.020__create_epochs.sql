-- Epochs. A backup that is restored rolls back what must not be rolled back: counters, revocations, ended sessions. So a
-- restored database begins a new epoch, and the service serves no database that lies elsewhere than its epoch says.

-- Where this database lies. A recovery to a point in time and a promoted standby have another timeline, a cluster that was
-- made anew another identifier, and a database that was made of a dump another oid.
CREATE FUNCTION cryptography.location() RETURNS TABLE (system_identifier BIGINT, timeline TEXT, database_oid BIGINT)
LANGUAGE sql STABLE
BEGIN ATOMIC
    SELECT c.system_identifier, left(pg_walfile_name(pg_current_wal_insert_lsn()), 8), d.oid::BIGINT
    FROM pg_control_system() AS c, pg_database AS d
    WHERE d.datname = current_database();
END;
REVOKE ALL ON FUNCTION cryptography.location() FROM PUBLIC;
GRANT EXECUTE ON FUNCTION cryptography.location() TO job_runner, admin_users, kms_lifecycle;

CREATE TABLE cryptography.epochs (
    number INTEGER PRIMARY KEY CHECK (number > 0),
    cause TEXT NOT NULL CHECK (cause IN ('FIRST_START', 'RESTORED', 'RECOVERED', 'MOVED')), -- MOVED: nothing was lost
    begun_at TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp(),
    backup_created_at TIMESTAMPTZ, -- of the backup that was restored
    system_identifier BIGINT NOT NULL,
    timeline TEXT NOT NULL,
    database_oid BIGINT NOT NULL,
    CONSTRAINT backup_only_if_restored CHECK (backup_created_at IS NULL OR cause = 'RESTORED'),
    CONSTRAINT timeline_form CHECK (timeline ~ '^[0-9A-F]{8}$')
);

-- Keys whose count of uses, or whose standing, a restore has put in doubt. Each stays inactive (reason RESTORED) until an
-- administrator states how often it was used.
CREATE TABLE cryptography.restored_keys (
    key_id UUID PRIMARY KEY,
    user_id UUID NOT NULL,
    epoch INTEGER NOT NULL REFERENCES cryptography.epochs (number),
    status_before VARCHAR(20) NOT NULL,
    deactivated_by_restore BOOLEAN NOT NULL, -- false: it was inactive before, and stays so when it is confirmed
    confirmed_at TIMESTAMPTZ,
    confirmed_count BIGINT CHECK (confirmed_count >= 0),
    confirmed_by UUID REFERENCES authentication.users (id) ON DELETE RESTRICT, -- NULL: the operator, at the command line
    FOREIGN KEY (key_id, user_id) REFERENCES cryptography.keys (id, user_id),
    CONSTRAINT confirmed_with_a_count CHECK ((confirmed_at IS NULL) = (confirmed_count IS NULL)),
    CONSTRAINT confirmed_by_only_if_confirmed CHECK (confirmed_by IS NULL OR confirmed_at IS NOT NULL)
);

-- `kms restore` empties every table whose comment begins so.
COMMENT ON TABLE authentication.user_sessions IS 'Emptied by a restore: a session that was ended would come back.';

ALTER TABLE cryptography.epochs ENABLE ROW LEVEL SECURITY;
ALTER TABLE cryptography.epochs FORCE ROW LEVEL SECURITY;
ALTER TABLE cryptography.restored_keys ENABLE ROW LEVEL SECURITY;
ALTER TABLE cryptography.restored_keys FORCE ROW LEVEL SECURITY;

CREATE POLICY epochs_read ON cryptography.epochs
    FOR SELECT TO job_runner, admin_users
    USING (TRUE);
CREATE POLICY epochs_lifecycle ON cryptography.epochs
    FOR ALL TO kms_lifecycle
    USING (TRUE)
    WITH CHECK (TRUE);
CREATE POLICY restored_keys_own_data ON cryptography.restored_keys
    FOR SELECT TO authenticated_users
    USING (user_id = authentication.current_user_id());
CREATE POLICY restored_keys_admin_read ON cryptography.restored_keys
    FOR SELECT TO admin_users
    USING (TRUE);
CREATE POLICY restored_keys_lifecycle ON cryptography.restored_keys
    FOR ALL TO kms_lifecycle
    USING (TRUE)
    WITH CHECK (TRUE);
CREATE POLICY keys_restored_lifecycle ON cryptography.keys
    FOR ALL TO kms_lifecycle
    USING (TRUE)
    WITH CHECK (TRUE);

GRANT SELECT (number, cause, begun_at, backup_created_at, system_identifier, timeline, database_oid)
    ON cryptography.epochs TO job_runner, admin_users;
GRANT SELECT (number) ON cryptography.epochs TO kms_lifecycle;
GRANT INSERT (number, cause, system_identifier, timeline, database_oid) ON cryptography.epochs TO kms_lifecycle;
GRANT SELECT (
    key_id, user_id, epoch, status_before, deactivated_by_restore, confirmed_at, confirmed_count, confirmed_by
) ON cryptography.restored_keys TO authenticated_users, admin_users;
GRANT SELECT (key_id, status_before, deactivated_by_restore, confirmed_at) ON cryptography.restored_keys TO kms_lifecycle;
GRANT UPDATE (confirmed_at, confirmed_count, confirmed_by) ON cryptography.restored_keys TO kms_lifecycle;
GRANT SELECT (id, user_id, key_type, key_status, usage_counter, max_usage_count, deactivated_at)
    ON cryptography.keys TO kms_lifecycle;
GRANT UPDATE (key_status, usage_counter, deactivated_at) ON cryptography.keys TO kms_lifecycle;
GRANT EXECUTE ON FUNCTION authentication.current_user_id() TO kms_lifecycle;

-- The epoch of a database that has none: it was never served. Of two services that start at once, one finds it done.
CREATE FUNCTION cryptography.begin_first_epoch() RETURNS VOID
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    INSERT INTO cryptography.epochs (number, cause, system_identifier, timeline, database_oid)
    SELECT 1, 'FIRST_START', here.system_identifier, here.timeline, here.database_oid
    FROM cryptography.location() AS here
    WHERE NOT EXISTS (SELECT FROM cryptography.epochs)
    ON CONFLICT DO NOTHING;
END;
$$;

-- An administrator states how often a restored key was used; it is then what it was before. Raises no_data_found for a key
-- that waits for nothing, insufficient_privilege for its owner, invalid_parameter_value for a count that cannot be.
CREATE FUNCTION cryptography.confirm_restored_key(restored_key_id UUID, stated_count BIGINT) RETURNS BOOLEAN
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    restored RECORD;
    held RECORD;
    use_limit BIGINT;
    reactivates BOOLEAN;
    changed BIGINT;
BEGIN
    SELECT r.status_before, r.deactivated_by_restore INTO restored
    FROM cryptography.restored_keys AS r
    WHERE r.key_id = restored_key_id AND r.confirmed_at IS NULL
    FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'no restored key of that id waits for a confirmation' USING ERRCODE = 'no_data_found';
    END IF;
    SELECT k.user_id, k.usage_counter, k.max_usage_count, k.key_type, k.key_status INTO STRICT held
    FROM cryptography.keys AS k
    WHERE k.id = restored_key_id
    FOR NO KEY UPDATE;
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
    reactivates = restored.deactivated_by_restore AND held.key_status = 'inactive' AND (stated_count < use_limit) IS NOT FALSE;
    UPDATE cryptography.restored_keys
    SET confirmed_at = clock_timestamp(), confirmed_count = stated_count, confirmed_by = authentication.current_user_id()
    WHERE key_id = restored_key_id;
    UPDATE cryptography.keys AS k
    SET usage_counter = stated_count,
        key_status = CASE WHEN reactivates THEN restored.status_before ELSE k.key_status END,
        deactivated_at = CASE WHEN NOT reactivates THEN k.deactivated_at END
    WHERE k.id = restored_key_id;
    GET DIAGNOSTICS changed = ROW_COUNT;
    IF changed <> 1 THEN
        RAISE EXCEPTION 'changed % keys instead of one', changed;
    END IF;
    RETURN reactivates;
END;
$$;

-- Whatever reactivates keys, it does not reactivate one that waits for its confirmation.
CREATE FUNCTION cryptography.refuse_unconfirmed_key() RETURNS TRIGGER
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF EXISTS (SELECT FROM cryptography.restored_keys AS r WHERE r.key_id = NEW.id AND r.confirmed_at IS NULL) THEN
        RAISE EXCEPTION 'the key was restored, and waits until an administrator confirms its count'
            USING ERRCODE = 'object_not_in_prerequisite_state', CONSTRAINT = 'restored_key_unconfirmed';
    END IF;
    RETURN NEW;
END;
$$;
CREATE TRIGGER tr_keys_refuse_unconfirmed
    BEFORE UPDATE OF deactivated_at ON cryptography.keys
    FOR EACH ROW WHEN (OLD.deactivated_at IS NOT NULL AND NEW.deactivated_at IS NULL)
    EXECUTE FUNCTION cryptography.refuse_unconfirmed_key();

REVOKE ALL ON FUNCTION
    cryptography.begin_first_epoch(), cryptography.confirm_restored_key(UUID, BIGINT), cryptography.refuse_unconfirmed_key()
    FROM PUBLIC;
GRANT EXECUTE ON FUNCTION cryptography.begin_first_epoch() TO job_runner;
GRANT EXECUTE ON FUNCTION cryptography.confirm_restored_key(UUID, BIGINT) TO admin_users;
GRANT CREATE ON SCHEMA cryptography TO kms_lifecycle;
ALTER FUNCTION cryptography.begin_first_epoch() OWNER TO kms_lifecycle;
ALTER FUNCTION cryptography.confirm_restored_key(UUID, BIGINT) OWNER TO kms_lifecycle;
ALTER FUNCTION cryptography.refuse_unconfirmed_key() OWNER TO kms_lifecycle;
REVOKE CREATE ON SCHEMA cryptography FROM kms_lifecycle;
