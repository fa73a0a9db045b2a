-- Who sees and changes what in the authentication schema. Policies say which rows, column grants which columns:
-- a grant on a table would undo the hiding of a column.

-- Partitions do not inherit policies, and one that is read directly would show everything.
DO $$
DECLARE
    relation REGCLASS;
BEGIN
    FOREACH relation IN ARRAY ARRAY[
        'authentication.users', 'authentication.user_profiles', 'authentication.roles', 'authentication.user_roles',
        'authentication.login_history', 'authentication.user_sessions', 'authentication.user_sessions_0',
        'authentication.user_sessions_1', 'authentication.user_sessions_2', 'authentication.user_sessions_3'
    ]::REGCLASS[] LOOP
        EXECUTE format('ALTER TABLE %s ENABLE ROW LEVEL SECURITY', relation);
        EXECUTE format('ALTER TABLE %s FORCE ROW LEVEL SECURITY', relation);
    END LOOP;

    FOREACH relation IN ARRAY ARRAY[
        'authentication.user_sessions', 'authentication.user_sessions_0', 'authentication.user_sessions_1',
        'authentication.user_sessions_2', 'authentication.user_sessions_3'
    ]::REGCLASS[] LOOP
        EXECUTE format(
            'CREATE POLICY user_sessions_own_data ON %s FOR SELECT TO authenticated_users
                 USING (user_id = authentication.current_user_id())', relation
        );
        EXECUTE format('CREATE POLICY user_sessions_admin_read ON %s FOR SELECT TO admin_users USING (TRUE)', relation);
    END LOOP;
END $$;

CREATE POLICY users_own_data ON authentication.users
    FOR ALL TO authenticated_users
    USING (id = authentication.current_user_id())
    WITH CHECK (id = authentication.current_user_id());
CREATE POLICY admin_full_access ON authentication.users
    FOR ALL TO admin_users
    USING (TRUE)
    WITH CHECK (TRUE);
CREATE POLICY users_login ON authentication.users
    FOR SELECT TO kms_login
    USING (TRUE);
CREATE POLICY users_lifecycle ON authentication.users
    FOR ALL TO kms_lifecycle
    USING (TRUE)
    WITH CHECK (TRUE);

CREATE POLICY user_profiles_own_data ON authentication.user_profiles
    FOR ALL TO authenticated_users
    USING (user_id = authentication.current_user_id())
    WITH CHECK (user_id = authentication.current_user_id());
CREATE POLICY user_profiles_admin_read ON authentication.user_profiles
    FOR SELECT TO admin_users
    USING (TRUE);

CREATE POLICY roles_read ON authentication.roles
    FOR SELECT TO authenticated_users, admin_users, auditor_users
    USING (TRUE);

CREATE POLICY user_roles_own_data ON authentication.user_roles
    FOR SELECT TO authenticated_users
    USING (user_id = authentication.current_user_id());
CREATE POLICY user_roles_admin_read ON authentication.user_roles
    FOR SELECT TO admin_users
    USING (TRUE);

CREATE POLICY login_history_own_data ON authentication.login_history
    FOR SELECT TO authenticated_users
    USING (user_id = authentication.current_user_id());
CREATE POLICY login_history_read ON authentication.login_history
    FOR SELECT TO admin_users, auditor_users
    USING (TRUE);

GRANT SELECT (
    id, username, email, email_verified, mfa_enabled, failed_login_attempts, locked_until, last_login_at,
    password_changed_at, created_at, updated_at, deleted_at, version
) ON authentication.users TO authenticated_users, admin_users;
GRANT SELECT (id, username, locked_until, deleted_at, version) ON authentication.users TO kms_login;
GRANT INSERT (id, username, email, password_hash, salt) ON authentication.users TO kms_lifecycle;

GRANT SELECT (
    user_id, first_name, last_name, display_name, avatar_url, preferred_language, timezone, date_format, time_format,
    theme, notifications_enabled, marketing_emails, metadata, created_at, updated_at
) ON authentication.user_profiles TO authenticated_users, admin_users;
GRANT INSERT (
    user_id, first_name, last_name, display_name, avatar_url, preferred_language, timezone, date_format, time_format,
    theme, notifications_enabled, marketing_emails, metadata
) ON authentication.user_profiles TO authenticated_users;
GRANT UPDATE (
    first_name, last_name, display_name, avatar_url, preferred_language, timezone, date_format, time_format,
    theme, notifications_enabled, marketing_emails, metadata
) ON authentication.user_profiles TO authenticated_users;

GRANT SELECT (id, name, description, permissions, is_system_role, created_at, updated_at)
    ON authentication.roles TO authenticated_users, admin_users, auditor_users;

GRANT SELECT (user_id, role_id, granted_by, granted_at, expires_at)
    ON authentication.user_roles TO authenticated_users, admin_users;

GRANT SELECT (
    id, user_id, device_info, ip_address, user_agent, is_active, expires_at, created_at, last_accessed_at
) ON authentication.user_sessions TO authenticated_users, admin_users;

GRANT SELECT (id, user_id, login_method, success, ip_address, user_agent, failure_reason, created_at)
    ON authentication.login_history TO authenticated_users, admin_users, auditor_users;
