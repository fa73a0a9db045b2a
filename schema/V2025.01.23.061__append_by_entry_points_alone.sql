-- What the service can become appends to the trail through functions that also do what the line says, and by no others. A user
-- who appends an event of his key by himself leaves the key at another version than its head: then every change of it raises.

SET LOCAL ROLE kms_ledger; -- a migrator that is no superuser does not own them, and revokes nothing
REVOKE EXECUTE ON FUNCTION
    audit.append_event(UUID, TEXT, TEXT, JSONB, BIGINT, INTEGER, UUID, UUID),
    audit.record_security_event(TEXT, TEXT, UUID, INET, TEXT, TEXT, UUID, TEXT, TEXT, INTEGER, JSONB),
    audit.record_data_access(TEXT, TEXT, UUID, JSONB, JSONB, JSONB, TEXT, INTEGER)
    FROM authenticated_users, admin_users, auditor_users, job_runner, kms_service;
RESET ROLE;

-- Only its owner replaces a function.
GRANT CREATE ON SCHEMA cryptography TO kms_lifecycle;
SET LOCAL ROLE kms_lifecycle;

-- Destroy at most 100 keys whose time has come: the envelope goes; the row, the public key and the history stay. Returns them
-- with the token objects of RESIDENT keys. Keys that are in use at the moment wait for the next call,
-- and so does one that cannot be destroyed: a warning says why. Of such keys a call tries so many that a few keep no other waiting.
CREATE OR REPLACE FUNCTION cryptography.destroy_due_keys() RETURNS TABLE (destroyed_id UUID, token_object TEXT)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    due RECORD;
    destroyed INTEGER := 0;
BEGIN
    FOR due IN
        -- By the index of what is due: a bare clock_timestamp() is volatile and no condition of an index.
        SELECT d.id, d.hsm_key_id
        FROM cryptography.keys AS d
        WHERE d.destroyed_at IS NULL AND d.destruction_scheduled_at <= (SELECT clock_timestamp())
        ORDER BY d.destruction_scheduled_at
        LIMIT 1000
        FOR NO KEY UPDATE SKIP LOCKED
    LOOP
        BEGIN
            UPDATE cryptography.keys AS k
            SET encrypted_private_key = '', destroyed_at = clock_timestamp()
            WHERE k.id = due.id;
        EXCEPTION WHEN OTHERS THEN
            RAISE WARNING 'key % cannot be destroyed: %', due.id, sqlerrm;
            CONTINUE;
        END;
        destroyed_id := due.id;
        token_object := due.hsm_key_id;
        RETURN NEXT;
        destroyed := destroyed + 1;
        EXIT WHEN destroyed = 100;
    END LOOP;
END;
$$;

RESET ROLE;
REVOKE CREATE ON SCHEMA cryptography FROM kms_lifecycle;
