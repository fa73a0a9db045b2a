-- Users, their profiles, roles, sessions and login history.

CREATE SCHEMA authentication;
GRANT USAGE ON SCHEMA authentication TO
    authenticated_users, admin_users, auditor_users, job_runner, kms_login, kms_lifecycle, kms_service;

-- Who the caller is, as the service said at the beginning of the transaction. NULL, and so no rows, where it said nothing.
CREATE FUNCTION authentication.current_user_id() RETURNS UUID
LANGUAGE sql STABLE PARALLEL SAFE
RETURN nullif(current_setting('app.user_id', TRUE), '')::UUID;
REVOKE ALL ON FUNCTION authentication.current_user_id() FROM PUBLIC;
GRANT EXECUTE ON FUNCTION authentication.current_user_id() TO authenticated_users, admin_users, auditor_users, job_runner;

CREATE FUNCTION public.update_updated_at() RETURNS TRIGGER
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    NEW.updated_at = NOW();
    RETURN NEW;
END;
$$;
REVOKE ALL ON FUNCTION public.update_updated_at() FROM PUBLIC;

-- Users are never deleted: deleted_at is set. Hence RESTRICT, not CASCADE, in everything that refers to them.
CREATE TABLE authentication.users (
    id UUID PRIMARY KEY DEFAULT gen_random_uuid(),
    username VARCHAR(100) UNIQUE NOT NULL,
    email VARCHAR(255) UNIQUE NOT NULL,
    email_verified BOOLEAN DEFAULT FALSE,
    password_hash VARCHAR(255) NOT NULL, -- Argon2id PHC string; '!' for a service, which has no password
    salt VARCHAR(255) NOT NULL,          -- keys the HMAC of the user's backup codes; '!' for a service
    mfa_enabled BOOLEAN DEFAULT FALSE,
    mfa_secret VARCHAR(255),             -- an envelope
    failed_login_attempts INTEGER DEFAULT 0,
    locked_until TIMESTAMPTZ,
    last_login_at TIMESTAMPTZ,
    password_changed_at TIMESTAMPTZ DEFAULT NOW(),
    created_at TIMESTAMPTZ DEFAULT NOW(),
    updated_at TIMESTAMPTZ DEFAULT NOW(),
    deleted_at TIMESTAMPTZ,
    version INTEGER NOT NULL DEFAULT 0,  -- advances with every change of roles, grants, password or standing

    CONSTRAINT email_format CHECK (email ~* '^[A-Za-z0-9._%+-]+@[A-Za-z0-9.-]+\.[A-Za-z]{2,}$'),
    CONSTRAINT username_length CHECK (char_length(username) >= 3 AND char_length(username) <= 100),
    CONSTRAINT password_changed_required CHECK (password_changed_at IS NOT NULL)
);

CREATE TABLE authentication.user_profiles (
    user_id UUID PRIMARY KEY REFERENCES authentication.users (id) ON DELETE RESTRICT,
    first_name VARCHAR(100),
    last_name VARCHAR(100),
    display_name VARCHAR(200),
    avatar_url TEXT,
    preferred_language VARCHAR(10) DEFAULT 'en',
    timezone VARCHAR(50) DEFAULT 'UTC',
    date_format VARCHAR(20) DEFAULT 'YYYY-MM-DD',
    time_format VARCHAR(20) DEFAULT '24h',
    theme VARCHAR(20) DEFAULT 'light',
    notifications_enabled BOOLEAN DEFAULT TRUE,
    marketing_emails BOOLEAN DEFAULT FALSE,
    two_factor_backup_codes JSONB, -- HMACs
    metadata JSONB DEFAULT '{}',
    created_at TIMESTAMPTZ DEFAULT NOW(),
    updated_at TIMESTAMPTZ DEFAULT NOW()
);

CREATE TABLE authentication.roles (
    id UUID PRIMARY KEY DEFAULT gen_random_uuid(),
    name VARCHAR(50) UNIQUE NOT NULL,
    description TEXT,
    permissions JSONB NOT NULL DEFAULT '[]',
    is_system_role BOOLEAN DEFAULT FALSE,
    created_at TIMESTAMPTZ DEFAULT NOW(),
    updated_at TIMESTAMPTZ DEFAULT NOW()
);

CREATE TABLE authentication.user_roles (
    user_id UUID REFERENCES authentication.users (id) ON DELETE RESTRICT,
    role_id UUID REFERENCES authentication.roles (id) ON DELETE RESTRICT,
    granted_by UUID REFERENCES authentication.users (id),
    granted_at TIMESTAMPTZ DEFAULT NOW(),
    expires_at TIMESTAMPTZ,
    PRIMARY KEY (user_id, role_id)
);

-- The tokens are SHA-256 hashes in hex: whoever reads the table cannot log in with what he reads.
CREATE TABLE authentication.user_sessions (
    id UUID DEFAULT gen_random_uuid(),
    user_id UUID NOT NULL REFERENCES authentication.users (id) ON DELETE RESTRICT,
    session_token VARCHAR(255) NOT NULL,
    refresh_token VARCHAR(255) NOT NULL,
    device_info JSONB,
    ip_address INET,
    user_agent TEXT,
    is_active BOOLEAN DEFAULT TRUE,
    expires_at TIMESTAMPTZ NOT NULL,
    created_at TIMESTAMPTZ DEFAULT NOW(),
    last_accessed_at TIMESTAMPTZ DEFAULT NOW(),
    PRIMARY KEY (id, user_id),
    UNIQUE (user_id, session_token),
    UNIQUE (user_id, refresh_token),
    CONSTRAINT session_token_is_a_hash CHECK (session_token ~ '^[0-9a-f]{64}$'),
    CONSTRAINT refresh_token_is_a_hash CHECK (refresh_token ~ '^[0-9a-f]{64}$')
) PARTITION BY HASH (user_id);

CREATE TABLE authentication.user_sessions_0 PARTITION OF authentication.user_sessions
    FOR VALUES WITH (MODULUS 4, REMAINDER 0);
CREATE TABLE authentication.user_sessions_1 PARTITION OF authentication.user_sessions
    FOR VALUES WITH (MODULUS 4, REMAINDER 1);
CREATE TABLE authentication.user_sessions_2 PARTITION OF authentication.user_sessions
    FOR VALUES WITH (MODULUS 4, REMAINDER 2);
CREATE TABLE authentication.user_sessions_3 PARTITION OF authentication.user_sessions
    FOR VALUES WITH (MODULUS 4, REMAINDER 3);

CREATE TABLE authentication.login_history (
    id UUID PRIMARY KEY DEFAULT gen_random_uuid(),
    user_id UUID REFERENCES authentication.users (id) ON DELETE RESTRICT,
    login_method VARCHAR(50) NOT NULL, -- password, oauth, mfa
    success BOOLEAN NOT NULL,
    ip_address INET,
    user_agent TEXT,
    failure_reason VARCHAR(100),
    created_at TIMESTAMPTZ DEFAULT NOW()
);

CREATE INDEX idx_users_email ON authentication.users (email) WHERE deleted_at IS NULL;
CREATE INDEX idx_users_username ON authentication.users (username) WHERE deleted_at IS NULL;
CREATE INDEX idx_user_sessions_token ON authentication.user_sessions (session_token);
CREATE INDEX idx_user_sessions_user_active ON authentication.user_sessions (user_id) WHERE is_active = TRUE;
CREATE INDEX idx_active_user_sessions ON authentication.user_sessions (user_id, expires_at DESC) WHERE is_active = TRUE;
CREATE INDEX idx_login_history_user_time ON authentication.login_history (user_id, created_at DESC);

CREATE TRIGGER tr_users_updated_at
    BEFORE UPDATE ON authentication.users
    FOR EACH ROW EXECUTE FUNCTION public.update_updated_at();
CREATE TRIGGER tr_user_profiles_updated_at
    BEFORE UPDATE ON authentication.user_profiles
    FOR EACH ROW EXECUTE FUNCTION public.update_updated_at();
