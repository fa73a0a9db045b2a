-- What an owner lets another user do with a key. Grants are made and revoked by functions of kms_lifecycle alone; how a grant
-- opens a key to its user comes with the calls that use it.

-- The owner stands in the row, so that its policy need not read the keys: a policy of the keys that read grants would have the
-- two refer to each other without end. That a grant has run out advances nobody's version: whoever uses it looks at expires_at.
CREATE TABLE cryptography.key_grants (
    id UUID PRIMARY KEY DEFAULT gen_random_uuid(),
    owner_id UUID NOT NULL,
    key_id UUID NOT NULL,
    grantee_id UUID NOT NULL REFERENCES authentication.users (id) ON DELETE RESTRICT,
    operations TEXT[] NOT NULL,
    granted_by UUID NOT NULL REFERENCES authentication.users (id) ON DELETE RESTRICT,
    created_at TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp(),
    expires_at TIMESTAMPTZ,
    revoked_at TIMESTAMPTZ, -- by the owner, or when it had run out and another took its place
    FOREIGN KEY (key_id, owner_id) REFERENCES cryptography.keys (id, user_id),
    CONSTRAINT granted_to_another CHECK (owner_id <> grantee_id),
    CONSTRAINT nobody_grants_to_himself CHECK (granted_by <> grantee_id),
    CONSTRAINT operations_of_a_grant CHECK (
        cardinality(operations) > 0 AND array_ndims(operations) = 1
        AND operations <@ ARRAY['sign', 'verify', 'encrypt', 'decrypt', 'generate_data_key']
    ),
    CONSTRAINT grant_expiration_logic CHECK (expires_at IS NULL OR expires_at > created_at),
    CONSTRAINT revoked_after_granted CHECK (revoked_at IS NULL OR revoked_at >= created_at)
);
CREATE UNIQUE INDEX idx_key_grants_one_live ON cryptography.key_grants (key_id, grantee_id) WHERE revoked_at IS NULL;
CREATE INDEX idx_key_grants_grantee ON cryptography.key_grants (grantee_id, created_at DESC);
CREATE INDEX idx_key_grants_owner ON cryptography.key_grants (owner_id, created_at DESC);
COMMENT ON TABLE cryptography.key_grants IS 'Emptied by a restore: a grant that was revoked would come back.';

ALTER TABLE cryptography.key_grants ENABLE ROW LEVEL SECURITY;
ALTER TABLE cryptography.key_grants FORCE ROW LEVEL SECURITY;
CREATE POLICY key_grants_own_data ON cryptography.key_grants
    FOR SELECT TO authenticated_users
    USING (authentication.current_user_id() IN (owner_id, grantee_id));
CREATE POLICY key_grants_admin_read ON cryptography.key_grants
    FOR SELECT TO admin_users
    USING (TRUE);
CREATE POLICY key_grants_lifecycle ON cryptography.key_grants
    FOR ALL TO kms_lifecycle
    USING (TRUE)
    WITH CHECK (TRUE);
GRANT SELECT (id, owner_id, key_id, grantee_id, operations, granted_by, created_at, expires_at, revoked_at)
    ON cryptography.key_grants TO authenticated_users, admin_users;
GRANT SELECT (id, owner_id, key_id, grantee_id, expires_at, revoked_at) ON cryptography.key_grants TO kms_lifecycle;
GRANT INSERT (id, owner_id, key_id, grantee_id, operations, granted_by, created_at, expires_at)
    ON cryptography.key_grants TO kms_lifecycle;
GRANT UPDATE (revoked_at) ON cryptography.key_grants TO kms_lifecycle;

-- Advance the version of the user whose grants change, which locks him until the end: changes of his grants wait for each other.
-- Then check that the user for whom the transaction acts is in good standing and still at the version at which he was admitted.
CREATE FUNCTION cryptography.begin_grant_change(grantee UUID, user_version INTEGER) RETURNS VOID
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    advanced BIGINT;
BEGIN
    UPDATE authentication.users AS u SET version = u.version + 1 WHERE u.id = grantee;
    GET DIAGNOSTICS advanced = ROW_COUNT;
    IF advanced <> 1 THEN
        RAISE EXCEPTION 'there is no such user' USING ERRCODE = 'no_data_found';
    END IF;
    IF NOT EXISTS (
        SELECT FROM authentication.users AS u
        WHERE u.id = authentication.current_user_id() AND u.version = user_version AND u.deleted_at IS NULL
            AND (u.locked_until IS NULL OR u.locked_until <= clock_timestamp())
    ) THEN
        RAISE EXCEPTION 'the user who acts is not in good standing' USING ERRCODE = 'invalid_authorization_specification';
    END IF;
END;
$$;

-- Let a user do operations with a key of the user for whom the transaction acts, who is at user_version, until expires_at (NULL:
-- until it is revoked), and return the id of the grant. Raises no_data_found for a key that is not his and a user who is not
-- there, insufficient_privilege for oneself, unique_violation where the user has a live grant of the key, check_violation for
-- operations or a moment that are none.
CREATE FUNCTION cryptography.grant_key(
    granted_key UUID, grantee UUID, operations TEXT[], expires_at TIMESTAMPTZ, user_version INTEGER
) RETURNS UUID
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    new_id CONSTANT UUID := gen_random_uuid();
    acting_user CONSTANT UUID := authentication.current_user_id();
    moment TIMESTAMPTZ;
    made BIGINT;
BEGIN
    IF acting_user IS NULL OR grantee = acting_user THEN
        RAISE EXCEPTION 'nobody grants a key to himself, or for nobody' USING ERRCODE = 'insufficient_privilege';
    END IF;
    IF NOT EXISTS (SELECT FROM cryptography.keys AS k WHERE k.id = granted_key AND k.user_id = acting_user) THEN
        RAISE EXCEPTION 'there is no such key' USING ERRCODE = 'no_data_found';
    END IF;
    PERFORM cryptography.begin_grant_change(grantee, grant_key.user_version);
    IF EXISTS (SELECT FROM authentication.users AS u WHERE u.id = grantee AND u.deleted_at IS NOT NULL) THEN
        RAISE EXCEPTION 'there is no such user' USING ERRCODE = 'no_data_found';
    END IF;
    moment := clock_timestamp(); -- after the lock
    UPDATE cryptography.key_grants AS g SET revoked_at = moment
    WHERE g.key_id = granted_key AND g.grantee_id = grantee AND g.revoked_at IS NULL AND g.expires_at <= moment;
    INSERT INTO cryptography.key_grants (id, owner_id, key_id, grantee_id, operations, granted_by, created_at, expires_at)
    VALUES (
        new_id, acting_user, granted_key, grantee, ARRAY(SELECT DISTINCT o FROM unnest(grant_key.operations) AS o ORDER BY o),
        acting_user, moment, grant_key.expires_at
    );
    GET DIAGNOSTICS made = ROW_COUNT;
    IF made <> 1 THEN
        RAISE EXCEPTION 'made % grants instead of one', made;
    END IF;
    PERFORM audit.record_security_event(
        'key.granted', 'medium', NULL, NULL, NULL, 'key', granted_key, 'grant_key', 'success', 30, jsonb_build_object(
            'grant', new_id, 'grantee', grantee, 'operations', grant_key.operations, 'expires_at', grant_key.expires_at
        )
    );
    RETURN new_id;
END;
$$;

-- Revoke a grant that the user for whom the transaction acts, who is at user_version, has given. Raises no_data_found for one that
-- is not his, or is revoked.
CREATE FUNCTION cryptography.revoke_grant(revoked_grant UUID, user_version INTEGER) RETURNS VOID
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    held RECORD;
    revoked BIGINT;
BEGIN
    SELECT g.key_id, g.grantee_id INTO held
    FROM cryptography.key_grants AS g
    WHERE g.id = revoked_grant AND g.owner_id = authentication.current_user_id() AND g.revoked_at IS NULL;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'there is no such grant' USING ERRCODE = 'no_data_found';
    END IF;
    PERFORM cryptography.begin_grant_change(held.grantee_id, user_version);
    UPDATE cryptography.key_grants AS g SET revoked_at = clock_timestamp()
    WHERE g.id = revoked_grant AND g.revoked_at IS NULL;
    GET DIAGNOSTICS revoked = ROW_COUNT;
    IF revoked <> 1 THEN
        RAISE EXCEPTION 'there is no such grant' USING ERRCODE = 'no_data_found';
    END IF;
    PERFORM audit.record_security_event(
        'key.grant_revoked', 'medium', NULL, NULL, NULL, 'key', held.key_id, 'revoke_grant', 'success', 30,
        jsonb_build_object('grant', revoked_grant, 'grantee', held.grantee_id)
    );
END;
$$;

REVOKE ALL ON FUNCTION
    cryptography.begin_grant_change(UUID, INTEGER), cryptography.grant_key(UUID, UUID, TEXT[], TIMESTAMPTZ, INTEGER),
    cryptography.revoke_grant(UUID, INTEGER)
    FROM PUBLIC;
GRANT EXECUTE ON FUNCTION cryptography.begin_grant_change(UUID, INTEGER) TO kms_lifecycle;
GRANT EXECUTE ON FUNCTION
    cryptography.grant_key(UUID, UUID, TEXT[], TIMESTAMPTZ, INTEGER), cryptography.revoke_grant(UUID, INTEGER)
    TO authenticated_users;

GRANT CREATE ON SCHEMA cryptography TO kms_lifecycle;
ALTER FUNCTION cryptography.grant_key(UUID, UUID, TEXT[], TIMESTAMPTZ, INTEGER) OWNER TO kms_lifecycle;
ALTER FUNCTION cryptography.revoke_grant(UUID, INTEGER) OWNER TO kms_lifecycle;
REVOKE CREATE ON SCHEMA cryptography FROM kms_lifecycle;
