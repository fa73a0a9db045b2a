-- What a login needs before there is a caller: the user by name, a live session by its token, and the record of attempts,
-- which decides whether one is let in. All belong to kms_login, which can do this and nothing else.

GRANT SELECT (password_hash, mfa_enabled, mfa_secret, failed_login_attempts, last_login_at) ON authentication.users TO kms_login;
GRANT UPDATE (failed_login_attempts, locked_until, last_login_at, version) ON authentication.users TO kms_login;
GRANT SELECT (id, user_id, session_token, is_active, expires_at) ON authentication.user_sessions TO kms_login;
GRANT INSERT (user_id, login_method, success, ip_address, user_agent, failure_reason, created_at)
    ON authentication.login_history TO kms_login;

CREATE POLICY users_login_attempts ON authentication.users
    FOR UPDATE TO kms_login
    USING (password_hash <> '!') -- services have no password, and are not locked by guesses
    WITH CHECK (password_hash <> '!');
CREATE POLICY login_history_login ON authentication.login_history
    FOR INSERT TO kms_login
    WITH CHECK (TRUE);
-- Partitions do not inherit policies.
DO $$
DECLARE
    relation REGCLASS;
BEGIN
    FOREACH relation IN ARRAY ARRAY[
        'authentication.user_sessions', 'authentication.user_sessions_0', 'authentication.user_sessions_1',
        'authentication.user_sessions_2', 'authentication.user_sessions_3'
    ]::REGCLASS[] LOOP
        EXECUTE format('CREATE POLICY user_sessions_login ON %s FOR SELECT TO kms_login USING (TRUE)', relation);
    END LOOP;
END $$;

-- The person of a name, with what his password and code are checked against. No row for a name that is not there, a deleted
-- user or a service, which has no password. Of a locked one it tells: the caller is answered alike, and after the same work.
CREATE FUNCTION authentication.find_user_by_name(login_name TEXT)
RETURNS TABLE (
    id UUID, password_hash VARCHAR, mfa_enabled BOOLEAN, mfa_secret VARCHAR, version INTEGER, is_locked BOOLEAN
)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    SELECT u.id, u.password_hash, coalesce(u.mfa_enabled, FALSE), u.mfa_secret, u.version,
        coalesce(u.locked_until > clock_timestamp(), FALSE)
    FROM authentication.users AS u
    WHERE u.username = login_name AND u.deleted_at IS NULL AND u.password_hash <> '!';
END;
$$;

-- The session of a token, if neither ended nor run out, of a user in good standing, with what his roles permit at this moment.
-- The token that a client holds carries the user's id; token_hash is the SHA-256 of the whole token, in hex.
CREATE FUNCTION authentication.find_session(session_user_id UUID, token_hash TEXT)
RETURNS TABLE (session_id UUID, id UUID, username VARCHAR, version INTEGER, permissions TEXT[], expires_at TIMESTAMPTZ)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    SELECT s.id, u.id, u.username, u.version, u.permissions, s.expires_at
    FROM authentication.user_sessions AS s
        CROSS JOIN LATERAL authentication.find_user_by_uri(s.user_id) AS u
    WHERE s.user_id = session_user_id AND s.session_token = token_hash
        AND s.is_active AND s.expires_at > clock_timestamp();
END;
$$;

-- Record an attempt to log in, and return whether it is let in. The attempt decides: success says that password and code, if
-- wanted, were right; that is refused to a user who meanwhile was locked or deleted, so of many guesses at once no more than
-- attempts_max are judged. Every further failure in a row locks anew, a success ends the row. What is tried while a user is
-- locked neither counts nor prolongs it. attempted_user NULL: the name was not found. Raises no_data_found for an id that is
-- not a person's: nobody locks a service, which has no password to guess.
CREATE FUNCTION authentication.record_attempt(
    attempted_user UUID, login_method TEXT, success BOOLEAN, failure_reason TEXT, peer INET, user_agent TEXT
) RETURNS BOOLEAN
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    attempts_max CONSTANT INTEGER := 5;
    lock_time CONSTANT INTERVAL := '15 minutes';
    moment TIMESTAMPTZ;
    failures INTEGER;
    locked TIMESTAMPTZ;
    deleted TIMESTAMPTZ;
    refusal TEXT;
    changed BIGINT;
BEGIN
    IF attempted_user IS NOT NULL THEN
        SELECT coalesce(u.failed_login_attempts, 0), u.locked_until, u.deleted_at INTO failures, locked, deleted
        FROM authentication.users AS u
        WHERE u.id = attempted_user AND u.password_hash <> '!'
        FOR NO KEY UPDATE;
        IF NOT FOUND THEN
            RAISE EXCEPTION 'there is no such person' USING ERRCODE = 'no_data_found';
        END IF;
    END IF;
    moment := clock_timestamp(); -- after the lock
    refusal := CASE
        WHEN attempted_user IS NULL THEN 'unknown'
        WHEN deleted IS NOT NULL THEN 'deleted'
        WHEN locked > moment THEN 'locked'
    END;
    IF refusal IS NULL THEN
        failures := CASE WHEN record_attempt.success THEN 0 ELSE failures + 1 END;
        UPDATE authentication.users AS u
        SET failed_login_attempts = failures,
            locked_until = CASE WHEN failures >= attempts_max THEN moment + lock_time END,
            last_login_at = CASE WHEN record_attempt.success THEN moment ELSE u.last_login_at END,
            version = u.version + CASE WHEN failures >= attempts_max THEN 1 ELSE 0 END
        WHERE u.id = attempted_user;
        GET DIAGNOSTICS changed = ROW_COUNT;
        IF changed <> 1 THEN
            RAISE EXCEPTION 'counted an attempt of % users instead of one', changed;
        END IF;
    END IF;
    INSERT INTO authentication.login_history (
        user_id, login_method, success, ip_address, user_agent, failure_reason, created_at
    ) VALUES (
        attempted_user, record_attempt.login_method, record_attempt.success AND refusal IS NULL,
        peer, record_attempt.user_agent,
        CASE WHEN refusal IS NOT NULL OR NOT record_attempt.success THEN coalesce(refusal, record_attempt.failure_reason) END,
        moment
    );
    RETURN record_attempt.success AND refusal IS NULL;
END;
$$;

REVOKE ALL ON FUNCTION
    authentication.find_user_by_name(TEXT), authentication.find_session(UUID, TEXT),
    authentication.record_attempt(UUID, TEXT, BOOLEAN, TEXT, INET, TEXT)
    FROM PUBLIC;
GRANT EXECUTE ON FUNCTION
    authentication.find_user_by_name(TEXT), authentication.find_session(UUID, TEXT),
    authentication.record_attempt(UUID, TEXT, BOOLEAN, TEXT, INET, TEXT)
    TO kms_service;

GRANT CREATE ON SCHEMA authentication TO kms_login;
ALTER FUNCTION authentication.find_user_by_name(TEXT) OWNER TO kms_login;
ALTER FUNCTION authentication.find_session(UUID, TEXT) OWNER TO kms_login;
ALTER FUNCTION authentication.record_attempt(UUID, TEXT, BOOLEAN, TEXT, INET, TEXT) OWNER TO kms_login;
REVOKE CREATE ON SCHEMA authentication FROM kms_login;
