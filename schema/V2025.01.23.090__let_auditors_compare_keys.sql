-- Auditors compare the keys with what the trail says of them. They see each column but the envelope, as administrators do.

CREATE POLICY keys_audit_read ON cryptography.keys
    FOR SELECT TO auditor_users
    USING (TRUE);
GRANT SELECT (
    id, user_id, key_name, key_type, key_purpose, key_curve, public_key, key_derivation_path, parent_key_id, hsm_key_id, key_status,
    encryption_algorithm, key_strength, usage_counter, max_usage_count, created_at, activated_at, expires_at, compromised_at,
    revoked_at, last_used_at, metadata, custody, origin, bound_to, version, deactivated_at, superseded_at,
    destruction_scheduled_at, destroyed_at, compromise_occurred_at
) ON cryptography.keys TO auditor_users;
