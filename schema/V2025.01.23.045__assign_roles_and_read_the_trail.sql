-- Roles that come with the service, what they permit told with the user who calls, and the reading of the trail, which is
-- itself recorded. kms/domain/permissions.py says which permission opens what.

-- The migrator owns the table, and its row security is forced.
ALTER TABLE authentication.roles NO FORCE ROW LEVEL SECURITY;
INSERT INTO authentication.roles (name, description, permissions, is_system_role)
VALUES ('auditor', 'reads the trail and nothing else', '["audit:read"]', TRUE);
ALTER TABLE authentication.roles FORCE ROW LEVEL SECURITY;

CREATE POLICY roles_login ON authentication.roles
    FOR SELECT TO kms_login
    USING (TRUE);
CREATE POLICY roles_lifecycle ON authentication.roles
    FOR SELECT TO kms_lifecycle
    USING (TRUE);
CREATE POLICY user_roles_login ON authentication.user_roles
    FOR SELECT TO kms_login
    USING (TRUE);
CREATE POLICY user_roles_lifecycle ON authentication.user_roles
    FOR INSERT TO kms_lifecycle
    WITH CHECK (TRUE);
GRANT SELECT (id, permissions) ON authentication.roles TO kms_login;
GRANT SELECT (id, name) ON authentication.roles TO kms_lifecycle;
GRANT SELECT (user_id, role_id, expires_at) ON authentication.user_roles TO kms_login;
GRANT INSERT (user_id, role_id, granted_by) ON authentication.user_roles TO kms_lifecycle;
GRANT SELECT (id, version), UPDATE (version) ON authentication.users TO kms_lifecycle;

-- The user whom the URI of a client certificate names, if in good standing, with what his roles permit at this moment. Runs
-- before there is a caller. An older program reads the columns that were there before.
-- squawk-ignore ban-drop-function
DROP FUNCTION authentication.find_user_by_uri(UUID);
CREATE FUNCTION authentication.find_user_by_uri(uri_user_id UUID)
RETURNS TABLE (id UUID, username VARCHAR, version INTEGER, permissions TEXT[])
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    SELECT u.id, u.username, u.version, ARRAY(
        SELECT DISTINCT p.permission
        FROM authentication.user_roles AS held
            JOIN authentication.roles AS r ON r.id = held.role_id
            CROSS JOIN LATERAL jsonb_array_elements_text(r.permissions) AS p (permission)
        WHERE held.user_id = u.id AND (held.expires_at IS NULL OR held.expires_at > clock_timestamp())
    )
    FROM authentication.users AS u
    WHERE u.id = uri_user_id
        AND u.deleted_at IS NULL
        AND (u.locked_until IS NULL OR u.locked_until <= clock_timestamp());
END;
$$;

-- Give a user a role, on behalf of the user for whom the transaction acts. Raises no_data_found for a user or a role that is
-- not there, unique_violation where he has it, insufficient_privilege for oneself.
CREATE FUNCTION authentication.assign_role(assigned_user UUID, role_name TEXT) RETURNS VOID
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    assigned_role CONSTANT UUID := (SELECT r.id FROM authentication.roles AS r WHERE r.name = role_name);
    advanced BIGINT;
BEGIN
    IF assigned_user = authentication.current_user_id() THEN
        RAISE EXCEPTION 'nobody assigns a role to himself' USING ERRCODE = 'insufficient_privilege';
    END IF;
    UPDATE authentication.users AS u SET version = u.version + 1 WHERE u.id = assigned_user;
    GET DIAGNOSTICS advanced = ROW_COUNT;
    IF advanced <> 1 OR assigned_role IS NULL THEN
        RAISE EXCEPTION 'there is no such user or role' USING ERRCODE = 'no_data_found';
    END IF;
    INSERT INTO authentication.user_roles (user_id, role_id, granted_by)
    VALUES (assigned_user, assigned_role, authentication.current_user_id());
    PERFORM audit.record_security_event(
        'role.assigned', 'medium', NULL, NULL, NULL, 'user', assigned_user, 'assign_role', 'success', 30,
        jsonb_build_object('role', role_name)
    );
END;
$$;

-- Record that the user for whom the transaction acts reads the trail, if at this moment he may. Returns OK, CREDENTIALS_INVALID or
-- PERMISSION_DENIED; only OK leaves a record.
CREATE FUNCTION audit.record_reading(action TEXT, request_id TEXT, peer TEXT, details JSONB) RETURNS TEXT
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    held CONSTANT TEXT[] := (
        SELECT u.permissions FROM authentication.find_user_by_uri(authentication.current_user_id()) AS u
    );
BEGIN
    IF held IS NULL THEN
        RETURN 'CREDENTIALS_INVALID';
    ELSIF 'audit:read' <> ALL (held) THEN
        RETURN 'PERMISSION_DENIED';
    END IF;
    PERFORM audit.record_security_event(
        'audit.read', 'low', NULL, CASE WHEN pg_input_is_valid(peer, 'inet') THEN peer::INET END, NULL, 'trail', NULL, action,
        'success', 0, coalesce(details, '{}') || jsonb_build_object('request_id', request_id)
    );
    RETURN 'OK';
END;
$$;

REVOKE ALL ON FUNCTION
    authentication.find_user_by_uri(UUID), authentication.assign_role(UUID, TEXT),
    audit.record_reading(TEXT, TEXT, TEXT, JSONB)
    FROM PUBLIC;
GRANT EXECUTE ON FUNCTION authentication.find_user_by_uri(UUID) TO kms_service, kms_ledger;
GRANT EXECUTE ON FUNCTION authentication.assign_role(UUID, TEXT) TO admin_users;
GRANT EXECUTE ON FUNCTION audit.record_reading(TEXT, TEXT, TEXT, JSONB) TO auditor_users;

GRANT CREATE ON SCHEMA authentication TO kms_login, kms_lifecycle;
GRANT CREATE ON SCHEMA audit TO kms_ledger;
ALTER FUNCTION authentication.find_user_by_uri(UUID) OWNER TO kms_login;
ALTER FUNCTION authentication.assign_role(UUID, TEXT) OWNER TO kms_lifecycle;
ALTER FUNCTION audit.record_reading(TEXT, TEXT, TEXT, JSONB) OWNER TO kms_ledger;
REVOKE CREATE ON SCHEMA authentication FROM kms_login, kms_lifecycle;
REVOKE CREATE ON SCHEMA audit FROM kms_ledger;
