-- A destroyed key whose object in the token could not be removed at the time, the token being away or the process killed, is found
-- again by the object, of which a token holds few.

-- Few keys are RESIDENT, and fewer of those destroyed: sorted in a moment.
-- squawk-ignore require-concurrent-index-creation
CREATE INDEX keys_destroyed_token_object ON cryptography.keys (hsm_key_id)
    WHERE hsm_key_id IS NOT NULL AND destroyed_at IS NOT NULL;

-- Which of the token's objects are those of destroyed keys.
CREATE FUNCTION cryptography.destroyed_objects(objects TEXT[]) RETURNS SETOF TEXT
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    SELECT k.hsm_key_id::TEXT
    FROM cryptography.keys AS k
    WHERE k.hsm_key_id = ANY (objects) AND k.hsm_key_id IS NOT NULL AND k.destroyed_at IS NOT NULL
        AND NOT EXISTS (
            SELECT FROM cryptography.keys AS l WHERE l.hsm_key_id = k.hsm_key_id AND l.destroyed_at IS NULL
        );
END;
$$;
REVOKE ALL ON FUNCTION cryptography.destroyed_objects(TEXT[]) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION cryptography.destroyed_objects(TEXT[]) TO job_runner;

GRANT CREATE ON SCHEMA cryptography TO kms_lifecycle;
ALTER FUNCTION cryptography.destroyed_objects(TEXT[]) OWNER TO kms_lifecycle;
REVOKE CREATE ON SCHEMA cryptography FROM kms_lifecycle;
