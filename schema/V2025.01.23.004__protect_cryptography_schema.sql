-- Who sees and changes what in the cryptography schema. States, counters and limits have no grant for any role that the
-- service can take: they will change through functions of kms_lifecycle.

ALTER TABLE cryptography.keys ENABLE ROW LEVEL SECURITY;
ALTER TABLE cryptography.keys FORCE ROW LEVEL SECURITY;
ALTER TABLE cryptography.key_rotations ENABLE ROW LEVEL SECURITY;
ALTER TABLE cryptography.key_rotations FORCE ROW LEVEL SECURITY;
ALTER TABLE cryptography.certificates ENABLE ROW LEVEL SECURITY;
ALTER TABLE cryptography.certificates FORCE ROW LEVEL SECURITY;
ALTER TABLE cryptography.wrapping_keys ENABLE ROW LEVEL SECURITY;
ALTER TABLE cryptography.wrapping_keys FORCE ROW LEVEL SECURITY;

CREATE POLICY keys_own_data ON cryptography.keys
    FOR ALL TO authenticated_users
    USING (user_id = authentication.current_user_id())
    WITH CHECK (user_id = authentication.current_user_id());
CREATE POLICY keys_admin_read ON cryptography.keys
    FOR SELECT TO admin_users
    USING (TRUE);

CREATE POLICY key_rotations_own_data ON cryptography.key_rotations
    FOR SELECT TO authenticated_users
    USING (user_id = authentication.current_user_id());
CREATE POLICY key_rotations_admin_read ON cryptography.key_rotations
    FOR SELECT TO admin_users
    USING (TRUE);

CREATE POLICY certificates_own_data ON cryptography.certificates
    FOR SELECT TO authenticated_users
    USING (user_id = authentication.current_user_id());
CREATE POLICY certificates_admin_read ON cryptography.certificates
    FOR SELECT TO admin_users
    USING (TRUE);

CREATE POLICY wrapping_keys_job ON cryptography.wrapping_keys
    FOR ALL TO job_runner
    USING (TRUE)
    WITH CHECK (TRUE);

GRANT SELECT (
    id, user_id, key_name, key_type, key_purpose, key_curve, public_key, key_derivation_path, parent_key_id, hsm_key_id,
    key_status, encryption_algorithm, key_strength, usage_counter, max_usage_count, created_at, activated_at, expires_at,
    compromised_at, revoked_at, last_used_at, metadata, custody, origin, bound_to, version, deactivated_at, superseded_at,
    destruction_scheduled_at, destroyed_at, compromise_occurred_at
) ON cryptography.keys TO authenticated_users, admin_users;
GRANT SELECT (encrypted_private_key) ON cryptography.keys TO authenticated_users;
GRANT INSERT (
    id, user_id, key_name, key_type, key_purpose, key_curve, public_key, encrypted_private_key, key_derivation_path,
    parent_key_id, hsm_key_id, encryption_algorithm, key_strength, metadata, custody, origin, bound_to
) ON cryptography.keys TO authenticated_users;
GRANT UPDATE (key_name, metadata) ON cryptography.keys TO authenticated_users;
GRANT EXECUTE ON FUNCTION cryptography.effective_status(
    TEXT, TIMESTAMPTZ, TIMESTAMPTZ, TIMESTAMPTZ, TIMESTAMPTZ, TIMESTAMPTZ, TIMESTAMPTZ, TIMESTAMPTZ
) TO authenticated_users, admin_users, job_runner, kms_lifecycle;

GRANT SELECT (
    id, user_id, old_key_id, new_key_id, rotation_reason, initiated_by, completed_at, migration_status,
    affected_records_count, error_message, created_at
) ON cryptography.key_rotations TO authenticated_users, admin_users;

GRANT SELECT (
    id, user_id, key_id, certificate_type, certificate_data, issuer, subject, serial_number, not_before, not_after,
    fingerprint, is_ca_certificate, revocation_status, created_at, revoked_at
) ON cryptography.certificates TO authenticated_users, admin_users;

GRANT SELECT (id, kind, generation, token_serial, created_at, backup_confirmed_at)
    ON cryptography.wrapping_keys TO job_runner;
GRANT INSERT (id, kind, generation, token_serial) ON cryptography.wrapping_keys TO job_runner;
GRANT UPDATE (token_serial, backup_confirmed_at) ON cryptography.wrapping_keys TO job_runner;
