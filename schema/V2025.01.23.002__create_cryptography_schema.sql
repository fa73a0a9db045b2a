-- Keys, their rotations and certificates, and the keys of the token that wrap and seal them.

CREATE SCHEMA cryptography;
GRANT USAGE ON SCHEMA cryptography TO authenticated_users, admin_users, auditor_users, job_runner, kms_lifecycle;

-- The state of a key at a moment: the mirror of effective_state in kms/domain/lifecycle.py, with which a test compares it
-- exhaustively. It takes columns, not the row: a reference to the whole row would need the right to see all of it.
CREATE FUNCTION cryptography.effective_status(
    key_status TEXT,
    activated_at TIMESTAMPTZ,
    deactivated_at TIMESTAMPTZ,
    superseded_at TIMESTAMPTZ,
    expires_at TIMESTAMPTZ,
    destruction_scheduled_at TIMESTAMPTZ,
    destroyed_at TIMESTAMPTZ,
    moment TIMESTAMPTZ
) RETURNS TEXT
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN CASE
    WHEN destroyed_at IS NOT NULL OR destruction_scheduled_at <= moment THEN 'destroyed'
    WHEN destruction_scheduled_at IS NOT NULL THEN 'pending_destruction'
    WHEN key_status IN ('revoked', 'compromised') THEN key_status
    WHEN key_status = 'expired' OR expires_at <= moment THEN 'expired'
    WHEN deactivated_at IS NOT NULL OR superseded_at IS NOT NULL THEN 'inactive'
    WHEN activated_at <= moment OR (activated_at IS NULL AND key_status = 'active') THEN 'active'
    ELSE 'pre_active'
END;

-- key_name is compared byte by byte: names are ASCII, and an order that depends on the system's locale changes under an
-- index when the system is upgraded.
CREATE TABLE cryptography.keys (
    id UUID PRIMARY KEY DEFAULT gen_random_uuid(),
    user_id UUID NOT NULL REFERENCES authentication.users (id) ON DELETE RESTRICT,
    key_name VARCHAR(100) COLLATE "C" NOT NULL,
    key_type VARCHAR(20) NOT NULL CHECK (key_type IN ('secp256k1', 'secp256r1', 'ed25519', 'rsa', 'aes')),
    key_purpose VARCHAR(50) NOT NULL CHECK (key_purpose IN ('signing', 'encryption', 'authentication', 'derivation')),
    key_curve VARCHAR(20),
    public_key TEXT NOT NULL,            -- SPKI PEM; of a symmetric key the check value
    encrypted_private_key TEXT NOT NULL, -- the envelope; empty once destroyed
    key_derivation_path VARCHAR(100),
    parent_key_id UUID,
    hsm_key_id VARCHAR(100),             -- the CKA_ID in hex of a RESIDENT key
    key_status VARCHAR(20) NOT NULL DEFAULT 'active'
        CHECK (key_status IN ('active', 'inactive', 'expired', 'compromised', 'revoked')),
    encryption_algorithm VARCHAR(50) DEFAULT 'AES-256-GCM',
    key_strength INTEGER NOT NULL,       -- bits
    usage_counter BIGINT NOT NULL DEFAULT 0,
    max_usage_count BIGINT,
    created_at TIMESTAMPTZ NOT NULL DEFAULT NOW(),
    activated_at TIMESTAMPTZ,
    expires_at TIMESTAMPTZ,
    compromised_at TIMESTAMPTZ,
    revoked_at TIMESTAMPTZ,
    last_used_at TIMESTAMPTZ,
    metadata JSONB NOT NULL DEFAULT '{}',
    custody TEXT NOT NULL CHECK (custody IN ('SEALED', 'WRAPPED', 'RESIDENT')),
    origin TEXT NOT NULL CHECK (origin IN ('GENERATED', 'IMPORTED')),
    bound_to TEXT NOT NULL DEFAULT '' CHECK (char_length(bound_to) <= 50),
    version BIGINT NOT NULL DEFAULT 1 CHECK (version > 0), -- advances with every change but a charge
    deactivated_at TIMESTAMPTZ,
    superseded_at TIMESTAMPTZ,
    destruction_scheduled_at TIMESTAMPTZ, -- when destruction falls due
    destroyed_at TIMESTAMPTZ,
    compromise_occurred_at TIMESTAMPTZ,

    UNIQUE (user_id, key_name),
    -- What references between the rows of a user point at. Foreign keys ignore row security: a reference without the
    -- user would let anyone hang a key under another's, and learn which ids exist.
    UNIQUE (id, user_id),
    FOREIGN KEY (parent_key_id, user_id) REFERENCES cryptography.keys (id, user_id),

    CONSTRAINT key_hierarchy_check CHECK (parent_key_id IS NULL OR parent_key_id <> id),
    CONSTRAINT key_expiration_logic CHECK (expires_at IS NULL OR expires_at > created_at),
    CONSTRAINT key_name_form CHECK (
        key_name ~ '^[A-Za-z0-9][A-Za-z0-9._/-]{0,89}(@[1-9][0-9]{0,8})?$'
        AND key_name !~* '^[0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}$'
    ),
    CONSTRAINT key_curve_fits_type CHECK (
        CASE WHEN key_type IN ('rsa', 'aes') THEN key_curve IS NULL ELSE key_curve IS NOT DISTINCT FROM key_type END
    ),
    CONSTRAINT key_strength_fits_type CHECK (
        CASE key_type
            WHEN 'rsa' THEN key_strength IN (2048, 3072, 4096)
            WHEN 'aes' THEN key_strength IN (128, 192, 256)
            ELSE key_strength = 256
        END
    ),
    CONSTRAINT public_key_form CHECK (
        CASE WHEN key_type = 'aes'
            THEN public_key ~ '^kcv:[0-9a-f]{6}$'
            ELSE starts_with(public_key, '-----BEGIN PUBLIC KEY-----')
        END
    ),
    CONSTRAINT hsm_key_id_iff_resident CHECK ((custody = 'RESIDENT') = (hsm_key_id IS NOT NULL)),
    CONSTRAINT hsm_key_id_form CHECK (hsm_key_id ~ '^([0-9a-f]{2})+$'),
    CONSTRAINT envelope_until_destroyed CHECK ((destroyed_at IS NULL) = (encrypted_private_key <> '')),
    CONSTRAINT usage_counter_not_negative CHECK (usage_counter >= 0),
    CONSTRAINT usage_limit_positive CHECK (max_usage_count IS NULL OR max_usage_count > 0),
    CONSTRAINT usage_within_limit CHECK (max_usage_count IS NULL OR usage_counter <= max_usage_count),
    CONSTRAINT revoked_at_iff_revoked CHECK ((key_status = 'revoked') = (revoked_at IS NOT NULL)),
    CONSTRAINT compromised_at_if_compromised CHECK (key_status <> 'compromised' OR compromised_at IS NOT NULL),
    CONSTRAINT compromise_has_a_report CHECK (compromise_occurred_at IS NULL OR compromised_at IS NOT NULL),
    CONSTRAINT metadata_is_an_object CHECK (jsonb_typeof(metadata) = 'object')
);

-- A charge (usage_counter, last_used_at) does not fire it, and so costs nothing more.
CREATE FUNCTION cryptography.advance_key_version() RETURNS TRIGGER
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    NEW.version = OLD.version + 1;
    RETURN NEW;
END;
$$;
REVOKE ALL ON FUNCTION cryptography.advance_key_version() FROM PUBLIC;
CREATE TRIGGER tr_keys_advance_version
    BEFORE UPDATE OF
        id, user_id, key_name, key_type, key_purpose, key_curve, public_key, encrypted_private_key, key_derivation_path,
        parent_key_id, hsm_key_id, key_status, encryption_algorithm, key_strength, max_usage_count, created_at,
        activated_at, expires_at, compromised_at, revoked_at, metadata, custody, origin, bound_to, version,
        deactivated_at, superseded_at, destruction_scheduled_at, destroyed_at, compromise_occurred_at
    ON cryptography.keys
    FOR EACH ROW EXECUTE FUNCTION cryptography.advance_key_version();

CREATE TABLE cryptography.key_rotations (
    id UUID PRIMARY KEY DEFAULT gen_random_uuid(),
    user_id UUID NOT NULL REFERENCES authentication.users (id) ON DELETE RESTRICT, -- the owner of both keys
    old_key_id UUID NOT NULL,
    new_key_id UUID,
    rotation_reason VARCHAR(100) NOT NULL,
    initiated_by UUID REFERENCES authentication.users (id),
    completed_at TIMESTAMPTZ,
    migration_status VARCHAR(20) NOT NULL DEFAULT 'pending'
        CHECK (migration_status IN ('pending', 'in_progress', 'completed', 'failed')),
    affected_records_count BIGINT DEFAULT 0,
    error_message TEXT,
    created_at TIMESTAMPTZ DEFAULT NOW(),
    FOREIGN KEY (old_key_id, user_id) REFERENCES cryptography.keys (id, user_id),
    FOREIGN KEY (new_key_id, user_id) REFERENCES cryptography.keys (id, user_id),
    CONSTRAINT rotation_to_another_key CHECK (new_key_id <> old_key_id),
    CONSTRAINT completed_rotation_has_a_successor CHECK (migration_status <> 'completed' OR new_key_id IS NOT NULL),
    CONSTRAINT completed_at_iff_completed CHECK ((migration_status = 'completed') = (completed_at IS NOT NULL))
);

CREATE TABLE cryptography.certificates (
    id UUID PRIMARY KEY DEFAULT gen_random_uuid(),
    user_id UUID NOT NULL REFERENCES authentication.users (id) ON DELETE RESTRICT, -- the owner of the key
    key_id UUID NOT NULL,
    -- x509: DER in base64; pem and der: as imported
    certificate_type VARCHAR(50) NOT NULL CHECK (certificate_type IN ('x509', 'pem', 'der')),
    certificate_data TEXT NOT NULL,
    issuer VARCHAR(255),
    subject VARCHAR(255),
    serial_number VARCHAR(100),
    not_before TIMESTAMPTZ,
    not_after TIMESTAMPTZ,
    fingerprint VARCHAR(128),
    is_ca_certificate BOOLEAN DEFAULT FALSE,
    revocation_status VARCHAR(20) DEFAULT 'valid' CHECK (revocation_status IN ('valid', 'revoked', 'expired')),
    created_at TIMESTAMPTZ DEFAULT NOW(),
    revoked_at TIMESTAMPTZ,
    FOREIGN KEY (key_id, user_id) REFERENCES cryptography.keys (id, user_id)
);

-- The token's own keys, by the id that envelopes name. They are nobody's: the service uses them for everybody.
CREATE TABLE cryptography.wrapping_keys (
    id UUID PRIMARY KEY, -- the CKA_ID
    kind TEXT NOT NULL CHECK (kind IN ('kek', 'sealing')),
    generation INTEGER NOT NULL CHECK (generation > 0),
    token_serial TEXT NOT NULL, -- where last seen; a clone or another node of a cluster has another
    created_at TIMESTAMPTZ NOT NULL DEFAULT NOW(),
    backup_confirmed_at TIMESTAMPTZ, -- when an operator said that a tested copy of the token exists
    UNIQUE (kind, generation)
);

CREATE INDEX idx_keys_user_status ON cryptography.keys (user_id, key_status);
CREATE INDEX idx_keys_purpose_status ON cryptography.keys (key_purpose, key_status);
CREATE INDEX idx_keys_expires_at ON cryptography.keys (expires_at) WHERE expires_at IS NOT NULL;
CREATE INDEX idx_keys_user_purpose_status_time ON cryptography.keys
    (user_id, key_purpose, key_status, created_at DESC);
CREATE INDEX idx_key_rotations_status ON cryptography.key_rotations (migration_status);
