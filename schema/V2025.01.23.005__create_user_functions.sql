-- Functions of the definer roles. A function owned by the owner of its table would change no row under forced row
-- security, and say nothing; so each belongs to a role that has a policy and column grants for exactly what it does.

-- The user whom the URI of a client certificate names, if in good standing. Runs before there is a caller.
-- PL/pgSQL, because PostgreSQL plans the body of an SQL function when it is made, and the migrating role may not read the table.
CREATE FUNCTION authentication.find_user_by_uri(uri_user_id UUID)
RETURNS TABLE (id UUID, username VARCHAR, version INTEGER)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    SELECT u.id, u.username, u.version
    FROM authentication.users AS u
    WHERE u.id = uri_user_id
        AND u.deleted_at IS NULL
        AND (u.locked_until IS NULL OR u.locked_until <= clock_timestamp());
END;
$$;

-- A user that is a service: known by its client certificate, without a password. Raises unique_violation for a taken name.
CREATE FUNCTION authentication.create_service_user(service_name TEXT)
RETURNS UUID
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    new_id CONSTANT UUID := gen_random_uuid();
    made BIGINT;
BEGIN
    INSERT INTO authentication.users (id, username, email, password_hash, salt)
    VALUES (new_id, service_name, new_id || '@service.invalid', '!', '!');
    GET DIAGNOSTICS made = ROW_COUNT;
    IF made <> 1 THEN
        RAISE EXCEPTION 'made % users instead of one', made;
    END IF;
    RETURN new_id;
END;
$$;

REVOKE ALL ON FUNCTION authentication.find_user_by_uri(UUID), authentication.create_service_user(TEXT) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION authentication.find_user_by_uri(UUID) TO kms_service;
GRANT EXECUTE ON FUNCTION authentication.create_service_user(TEXT) TO admin_users;

-- Whoever is to own a function needs CREATE on its schema at the moment of the change, and only then.
GRANT CREATE ON SCHEMA authentication TO kms_login, kms_lifecycle;
ALTER FUNCTION authentication.find_user_by_uri(UUID) OWNER TO kms_login;
ALTER FUNCTION authentication.create_service_user(TEXT) OWNER TO kms_lifecycle;
REVOKE CREATE ON SCHEMA authentication FROM kms_login, kms_lifecycle;
