-- squawk-ignore-file adding-required-field, adding-not-nullable-field, adding-foreign-key-constraint, constraint-missing-not-valid
-- squawk-ignore-file ban-drop-not-null
-- Certificate authorities, and the certificates that they issue.
--
--   create_authority ──► pending ──► active ──► superseded       (change_authority; disabled is reached from each)
--   add_certificate  ──► intended ──► issued                     (complete_certificate)
--                                └──► abandoned, revoked         (abandon_certificate: a job, where no outcome was recorded)
--                    ──► imported                                (a certificate of an authority elsewhere)
--
-- The service makes record_mac of each row before SQL changes it, and believes no row without it. So a function changes nothing but
-- what the service has read: it compares the version, and answers STALE otherwise.

-- Who issues and who manages -------------------------------------------------------------------------------------------------

-- The migrator owns the table, and its row security is forced.
ALTER TABLE authentication.roles NO FORCE ROW LEVEL SECURITY;
INSERT INTO authentication.roles (name, description, permissions, is_system_role)
VALUES
    ('key-manager', 'creates certificate authorities and manages those', '["certs:manage"]', TRUE),
    ('certificate-issuer', 'issues certificates where an authority lets it', '["certs:issue"]', TRUE);
ALTER TABLE authentication.roles FORCE ROW LEVEL SECURITY;

-- Authorities ----------------------------------------------------------------------------------------------------------------

-- A row is one issuer: one key and one certificate. Rolling an authority over makes the next generation of its name.
CREATE TABLE cryptography.certificate_authorities (
    id UUID PRIMARY KEY,
    name TEXT COLLATE "C" NOT NULL CONSTRAINT authority_name_form CHECK (name ~ '^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$'),
    generation INTEGER NOT NULL CONSTRAINT authority_generation_positive CHECK (generation > 0),
    manager_id UUID NOT NULL REFERENCES authentication.users (id) ON DELETE RESTRICT,
    key_id UUID NOT NULL,
    key_owner_id UUID NOT NULL, -- a user of the service itself: no caller uses the key
    parent_id UUID REFERENCES cryptography.certificate_authorities (id) ON DELETE RESTRICT, -- NULL: a root, or signed elsewhere
    status TEXT NOT NULL
        CONSTRAINT authority_status CHECK (status IN ('pending', 'active', 'superseded', 'disabled')),
    subject TEXT NOT NULL, -- RFC 4514
    path_length INTEGER CONSTRAINT authority_path_length CHECK (path_length BETWEEN 0 AND 16),
    certificate BYTEA, -- DER; NULL while the authority waits for it
    chain BYTEA [] NOT NULL DEFAULT '{}', -- DER of the issuers elsewhere, the nearest first
    issuers TEXT [] NOT NULL DEFAULT '{}', -- a user's id, a space, and the profile that he may issue
    self_service TEXT [] NOT NULL DEFAULT '{}', -- profiles of which each user gets certificates for himself
    base_url TEXT NOT NULL DEFAULT '', -- where certificates, CRLs and OCSP answers are published
    crl_shards INTEGER NOT NULL DEFAULT 0 CONSTRAINT authority_crl_shards CHECK (crl_shards BETWEEN 0 AND 65536), -- 0: one CRL
    created_at TIMESTAMPTZ NOT NULL,
    not_after TIMESTAMPTZ, -- of the certificate
    superseded_at TIMESTAMPTZ,
    version BIGINT NOT NULL CONSTRAINT authority_version_positive CHECK (version > 0),
    record_mac BYTEA NOT NULL CONSTRAINT authority_mac_size CHECK (octet_length(record_mac) = 32),
    CONSTRAINT authority_generations UNIQUE (name, generation),
    FOREIGN KEY (key_id, key_owner_id) REFERENCES cryptography.keys (id, user_id),
    CONSTRAINT active_authority_has_a_certificate CHECK (status NOT IN ('active', 'superseded') OR certificate IS NOT NULL),
    CONSTRAINT authority_ends_with_its_certificate CHECK ((certificate IS NULL) = (not_after IS NULL)),
    CONSTRAINT superseded_authority_since CHECK (status <> 'superseded' OR superseded_at IS NOT NULL)
);
CREATE UNIQUE INDEX idx_certificate_authorities_one_active ON cryptography.certificate_authorities (name)
    WHERE status = 'active';
CREATE INDEX idx_certificate_authorities_manager ON cryptography.certificate_authorities (manager_id);
CREATE INDEX idx_certificate_authorities_key ON cryptography.certificate_authorities (key_id);
CREATE INDEX idx_certificate_authorities_parent ON cryptography.certificate_authorities (parent_id) WHERE parent_id IS NOT NULL;
ALTER TABLE cryptography.certificate_authorities ENABLE ROW LEVEL SECURITY;
ALTER TABLE cryptography.certificate_authorities FORCE ROW LEVEL SECURITY;

-- What an authority is, everybody may know: its certificate is published.
CREATE POLICY certificate_authorities_read ON cryptography.certificate_authorities
    FOR SELECT TO authenticated_users, admin_users, auditor_users, job_runner
    USING (TRUE);
CREATE POLICY certificate_authorities_lifecycle ON cryptography.certificate_authorities
    FOR ALL TO kms_lifecycle
    USING (TRUE)
    WITH CHECK (TRUE);
GRANT SELECT (
    id, name, generation, manager_id, key_id, key_owner_id, parent_id, status, subject, path_length, certificate, chain, issuers,
    self_service, base_url, crl_shards, created_at, not_after, superseded_at, version, record_mac
) ON cryptography.certificate_authorities TO authenticated_users, admin_users, auditor_users, job_runner;
GRANT SELECT, INSERT ON cryptography.certificate_authorities TO kms_lifecycle;
GRANT UPDATE (
    manager_id, status, certificate, chain, issuers, self_service, base_url, crl_shards, not_after, superseded_at, version, record_mac
) ON cryptography.certificate_authorities TO kms_lifecycle;

-- Certificates ---------------------------------------------------------------------------------------------------------------

-- Nothing has written the table before: a row without a MAC would be nobody's.
ALTER TABLE cryptography.certificates NO FORCE ROW LEVEL SECURITY;
ALTER TABLE cryptography.certificates
    ALTER COLUMN key_id DROP NOT NULL, -- NULL: the key is held elsewhere
    ALTER COLUMN revocation_status SET NOT NULL,
    ALTER COLUMN is_ca_certificate SET NOT NULL,
    ALTER COLUMN created_at SET NOT NULL,
    ADD COLUMN issuer_id UUID REFERENCES cryptography.certificate_authorities (id) ON DELETE RESTRICT, -- NULL: an authority elsewhere
    ADD COLUMN profile TEXT NOT NULL,
    ADD COLUMN issuance_status TEXT NOT NULL
        CONSTRAINT certificate_issuance_status CHECK (issuance_status IN ('intended', 'issued', 'abandoned', 'imported')),
    ADD COLUMN names TEXT [] NOT NULL DEFAULT '{}', -- subject alternative names, as kind:value
    ADD COLUMN tbs_sha256 BYTEA NOT NULL CONSTRAINT certificate_tbs_size CHECK (octet_length(tbs_sha256) = 32), -- of what is signed
    ADD COLUMN revocation_reason INTEGER -- CRLReason of RFC 5280
        CONSTRAINT certificate_revocation_reason CHECK (revocation_reason BETWEEN 0 AND 10 AND revocation_reason <> 7),
    ADD COLUMN superseded_at TIMESTAMPTZ, -- since when another certificate should be used
    ADD COLUMN replaces UUID REFERENCES cryptography.certificates (id) ON DELETE RESTRICT,
    ADD COLUMN requested_by UUID REFERENCES authentication.users (id) ON DELETE RESTRICT, -- NULL: the service itself
    ADD COLUMN crl_shard INTEGER NOT NULL DEFAULT 0 CONSTRAINT certificate_crl_shard CHECK (crl_shard >= 0), -- 0: the one CRL
    ADD COLUMN version BIGINT NOT NULL DEFAULT 1 CONSTRAINT certificate_version_positive CHECK (version > 0),
    ADD COLUMN record_mac BYTEA NOT NULL CONSTRAINT certificate_mac_size CHECK (octet_length(record_mac) = 32),
    ADD CONSTRAINT certificate_serial_form CHECK (serial_number ~ '^[0-9a-f]{1,40}$'),
    ADD CONSTRAINT imported_certificate_has_no_issuer CHECK ((issuer_id IS NULL) = (issuance_status = 'imported')),
    ADD CONSTRAINT certificate_data_iff_issued
        CHECK ((issuance_status IN ('issued', 'imported')) = (certificate_data <> '' AND fingerprint IS NOT NULL)),
    ADD CONSTRAINT abandoned_certificate_is_revoked CHECK (issuance_status <> 'abandoned' OR revocation_status = 'revoked'),
    ADD CONSTRAINT revoked_at_iff_revoked CHECK (
        (revocation_status = 'revoked') = (revoked_at IS NOT NULL) AND (revoked_at IS NULL) = (revocation_reason IS NULL)
    );
ALTER TABLE cryptography.certificates FORCE ROW LEVEL SECURITY;

-- squawk-ignore require-concurrent-index-creation
CREATE UNIQUE INDEX idx_certificates_serial ON cryptography.certificates (issuer_id, serial_number) WHERE issuer_id IS NOT NULL;
-- Lists, the newest first.
-- squawk-ignore require-concurrent-index-creation
CREATE INDEX idx_certificates_user ON cryptography.certificates (user_id, created_at DESC, id DESC);
-- squawk-ignore require-concurrent-index-creation
CREATE INDEX idx_certificates_issuer ON cryptography.certificates (issuer_id, created_at DESC, id DESC);
-- squawk-ignore require-concurrent-index-creation
CREATE INDEX idx_certificates_key ON cryptography.certificates (key_id, created_at DESC) WHERE key_id IS NOT NULL;
-- What a CRL lists, and what was begun and has no outcome.
-- squawk-ignore require-concurrent-index-creation
CREATE INDEX idx_certificates_revoked ON cryptography.certificates (issuer_id, crl_shard, not_after)
    WHERE revocation_status = 'revoked';
-- squawk-ignore require-concurrent-index-creation
CREATE INDEX idx_certificates_intended ON cryptography.certificates (created_at) WHERE issuance_status = 'intended';
-- squawk-ignore require-concurrent-index-creation
CREATE INDEX idx_certificates_replaces ON cryptography.certificates (replaces) WHERE replaces IS NOT NULL;

-- The manager of an authority and its issuers see what it issued.
CREATE POLICY certificates_authority_read ON cryptography.certificates
    FOR SELECT TO authenticated_users
    USING (issuer_id IN (
        SELECT a.id FROM cryptography.certificate_authorities AS a
        WHERE a.manager_id = (SELECT authentication.current_user_id()) OR EXISTS (
            SELECT FROM unnest(a.issuers) AS i (entry)
            WHERE starts_with(i.entry, (SELECT authentication.current_user_id())::TEXT || ' ')
        )
    ));
CREATE POLICY certificates_service_read ON cryptography.certificates
    FOR SELECT TO auditor_users, job_runner
    USING (TRUE);
CREATE POLICY certificates_lifecycle ON cryptography.certificates
    FOR ALL TO kms_lifecycle
    USING (TRUE)
    WITH CHECK (TRUE);
GRANT SELECT (
    issuer_id, profile, issuance_status, names, tbs_sha256, revocation_reason, superseded_at, replaces, requested_by, crl_shard,
    version, record_mac
) ON cryptography.certificates TO authenticated_users, admin_users;
GRANT SELECT (
    id, user_id, key_id, certificate_type, certificate_data, issuer, subject, serial_number, not_before, not_after, fingerprint,
    is_ca_certificate, revocation_status, created_at, revoked_at, issuer_id, profile, issuance_status, names, tbs_sha256,
    revocation_reason, superseded_at, replaces, requested_by, crl_shard, version, record_mac
) ON cryptography.certificates TO auditor_users, job_runner;
GRANT SELECT, INSERT ON cryptography.certificates TO kms_lifecycle;
GRANT UPDATE (
    certificate_data, fingerprint, issuance_status, revocation_status, revoked_at, revocation_reason, superseded_at, version,
    record_mac
) ON cryptography.certificates TO kms_lifecycle;

-- What changes them ----------------------------------------------------------------------------------------------------------

GRANT CREATE ON SCHEMA cryptography TO kms_lifecycle;
SET LOCAL ROLE kms_lifecycle;

-- Record what happened to an authority or a certificate, for the user for whom the transaction acts.
CREATE FUNCTION cryptography.record_certificate_event(
    event TEXT, severity TEXT, kind TEXT, subject UUID, request_id TEXT, peer TEXT, details JSONB
) RETURNS VOID
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    address INET;
BEGIN
    -- Not in one expression: the planner would convert an empty peer, which the service itself has, before it looks at the condition.
    IF pg_input_is_valid(peer, 'inet') THEN
        address := peer;
    END IF;
    PERFORM audit.record_security_event(
        event, severity, NULL, address, NULL, kind, subject, event, 'success',
        30, details || jsonb_build_object('request_id', request_id)
    );
END;
$$;

-- Store a new authority, pending or active, for the user for whom the transaction acts, who is at user_version and becomes its
-- manager. Raises invalid_authorization_specification for a user who is not in good standing, unique_violation where the generation
-- of the name is there.
CREATE FUNCTION cryptography.create_authority(authority JSONB, user_version INTEGER, request_id TEXT, peer TEXT) RETURNS VOID
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    made CONSTANT cryptography.certificate_authorities
    := jsonb_populate_record(NULL::cryptography.certificate_authorities, authority);
BEGIN
    PERFORM cryptography.check_standing(user_version);
    IF made.manager_id <> authentication.current_user_id() OR made.version <> 1 OR made.status <> 'pending' THEN
        RAISE EXCEPTION 'not a new authority of this user' USING ERRCODE = 'check_violation';
    END IF;
    INSERT INTO cryptography.certificate_authorities SELECT made.*;
    PERFORM cryptography.record_certificate_event(
        'authority.created', 'high', 'certificate_authority', made.id, request_id, peer,
        jsonb_build_object('name', made.name, 'generation', made.generation, 'key', made.key_id)
    );
END;
$$;

-- Change an authority that is at expected_version: authority holds the columns that may change, as they are then, and its MAC. event
-- says what happened. For the user for whom the transaction acts, who is at user_version. Returns 'OK' or 'STALE'.
CREATE FUNCTION cryptography.change_authority(
    changed UUID, expected_version BIGINT, authority JSONB, event TEXT, details JSONB, user_version INTEGER, request_id TEXT,
    peer TEXT
) RETURNS TEXT
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    made CONSTANT cryptography.certificate_authorities
    := jsonb_populate_record(NULL::cryptography.certificate_authorities, authority);
BEGIN
    PERFORM cryptography.check_standing(user_version);
    UPDATE cryptography.certificate_authorities AS a
    SET manager_id = made.manager_id, status = made.status, certificate = made.certificate, chain = made.chain,
        issuers = made.issuers, self_service = made.self_service, base_url = made.base_url, crl_shards = made.crl_shards,
        not_after = made.not_after, superseded_at = made.superseded_at, version = expected_version + 1, record_mac = made.record_mac
    WHERE a.id = changed AND a.version = expected_version;
    IF NOT FOUND THEN
        RETURN 'STALE';
    END IF;
    PERFORM cryptography.record_certificate_event(
        event, 'high', 'certificate_authority', changed, request_id, peer, details
    );
    RETURN 'OK';
END;
$$;

-- Store a certificate that is about to be signed, or one of an authority elsewhere. The issuer must be at issuer_version. For the user
-- for whom the transaction acts, who is at user_version; where it acts for nobody, for the service itself. Returns 'OK' or 'STALE'.
CREATE FUNCTION cryptography.add_certificate(
    certificate JSONB, issuer_version BIGINT, user_version INTEGER, request_id TEXT, peer TEXT
) RETURNS TEXT
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    made CONSTANT cryptography.certificates := jsonb_populate_record(NULL::cryptography.certificates, certificate);
BEGIN
    IF authentication.current_user_id() IS NOT NULL THEN
        PERFORM cryptography.check_standing(user_version);
    END IF;
    IF made.version <> 1 OR made.revocation_status <> 'valid' OR made.issuance_status NOT IN ('intended', 'imported')
        OR made.requested_by IS DISTINCT FROM authentication.current_user_id() THEN
        RAISE EXCEPTION 'not a new certificate of this user' USING ERRCODE = 'check_violation';
    END IF;
    IF made.issuer_id IS NOT NULL AND NOT EXISTS (
        SELECT FROM cryptography.certificate_authorities AS a
        WHERE a.id = made.issuer_id AND a.version = issuer_version AND (a.status <> 'disabled' OR made.profile = 'ocsp')
    ) THEN
        RETURN 'STALE';
    END IF;
    INSERT INTO cryptography.certificates (
        id, user_id, key_id, certificate_type, certificate_data, issuer, subject, serial_number, not_before, not_after, fingerprint,
        is_ca_certificate, revocation_status, created_at, revoked_at, issuer_id, profile, issuance_status, names, tbs_sha256,
        revocation_reason, superseded_at, replaces, requested_by, crl_shard, version, record_mac
    ) VALUES (
        made.id, made.user_id, made.key_id, made.certificate_type, made.certificate_data, made.issuer, made.subject,
        made.serial_number, made.not_before, made.not_after, made.fingerprint, made.is_ca_certificate, made.revocation_status,
        made.created_at, made.revoked_at, made.issuer_id, made.profile, made.issuance_status, made.names, made.tbs_sha256,
        made.revocation_reason, made.superseded_at, made.replaces, made.requested_by, made.crl_shard, made.version,
        made.record_mac
    );
    PERFORM cryptography.record_certificate_event(
        CASE WHEN made.issuer_id IS NULL THEN 'certificate.imported' ELSE 'certificate.intended' END,
        'low', 'certificate', made.id, request_id, peer, jsonb_build_object(
            'issuer', made.issuer_id, 'serial', made.serial_number, 'subject', made.subject, 'names', made.names,
            'profile', made.profile, 'owner', made.user_id, 'tbs_sha256', encode(made.tbs_sha256, 'hex')
        )
    );
    RETURN 'OK';
END;
$$;

-- Record that an intended certificate was signed. data is its DER in base64. The row is at version 2 then. Returns 'OK' or 'STALE'.
CREATE FUNCTION cryptography.complete_certificate(
    completed UUID, data TEXT, new_fingerprint TEXT, new_mac BYTEA, request_id TEXT, peer TEXT
) RETURNS TEXT
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    serial TEXT;
BEGIN
    UPDATE cryptography.certificates AS c
    SET certificate_data = data, fingerprint = new_fingerprint, issuance_status = 'issued', version = 2, record_mac = new_mac
    WHERE c.id = completed AND c.issuance_status = 'intended' AND c.version = 1
        AND c.requested_by IS NOT DISTINCT FROM authentication.current_user_id()
    RETURNING c.serial_number INTO serial;
    IF NOT FOUND THEN
        RETURN 'STALE';
    END IF;
    PERFORM cryptography.record_certificate_event(
        'certificate.issued', 'medium', 'certificate', completed, request_id, peer,
        jsonb_build_object('serial', serial, 'fingerprint', new_fingerprint)
    );
    RETURN 'OK';
END;
$$;

-- Intended certificates without an outcome for so many seconds, the oldest first.
CREATE FUNCTION cryptography.certificates_without_outcome(seconds DOUBLE PRECISION, certificates_max INTEGER)
RETURNS SETOF UUID
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    SELECT c.id FROM cryptography.certificates AS c
    WHERE c.issuance_status = 'intended' AND c.created_at <= clock_timestamp() - make_interval(secs => seconds)
    ORDER BY c.created_at
    LIMIT certificates_max;
END;
$$;

-- Record that an intended certificate was never handed out. It is revoked, since the token may have signed it. Returns 'OK' or 'STALE'.
CREATE FUNCTION cryptography.abandon_certificate(abandoned UUID, reason INTEGER, moment TIMESTAMPTZ, new_mac BYTEA) RETURNS TEXT
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    serial TEXT;
BEGIN
    UPDATE cryptography.certificates AS c
    SET issuance_status = 'abandoned', revocation_status = 'revoked', revoked_at = moment, revocation_reason = reason, version = 2,
        record_mac = new_mac
    WHERE c.id = abandoned AND c.issuance_status = 'intended' AND c.version = 1
    RETURNING c.serial_number INTO serial;
    IF NOT FOUND THEN
        RETURN 'STALE';
    END IF;
    PERFORM cryptography.record_certificate_event(
        'certificate.abandoned', 'medium', 'certificate', abandoned, '', '', jsonb_build_object('serial', serial)
    );
    RETURN 'OK';
END;
$$;

-- Revoke a certificate that is at expected_version, for the user for whom the transaction acts, who is at user_version; where it acts
-- for nobody, for the service itself. Returns 'OK' or 'STALE'.
CREATE FUNCTION cryptography.revoke_certificate(
    revoked UUID, expected_version BIGINT, reason INTEGER, moment TIMESTAMPTZ, new_mac BYTEA, user_version INTEGER,
    request_id TEXT, peer TEXT
) RETURNS TEXT
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    held RECORD;
BEGIN
    IF authentication.current_user_id() IS NOT NULL THEN
        PERFORM cryptography.check_standing(user_version);
    END IF;
    UPDATE cryptography.certificates AS c
    SET revocation_status = 'revoked', revoked_at = moment, revocation_reason = reason, version = expected_version + 1,
        record_mac = new_mac
    WHERE c.id = revoked AND c.version = expected_version AND c.revocation_status = 'valid'
        AND c.issuance_status = 'issued'
    RETURNING c.serial_number, c.issuer_id INTO held;
    IF NOT FOUND THEN
        RETURN 'STALE';
    END IF;
    PERFORM cryptography.record_certificate_event(
        'certificate.revoked', 'high', 'certificate', revoked, request_id, peer,
        jsonb_build_object('serial', held.serial_number, 'issuer', held.issuer_id, 'reason', reason)
    );
    RETURN 'OK';
END;
$$;

-- Say from when on another certificate should be used instead of one that is at expected_version. Returns 'OK' or 'STALE'.
CREATE FUNCTION cryptography.supersede_certificate(
    superseded UUID, expected_version BIGINT, moment TIMESTAMPTZ, new_mac BYTEA, request_id TEXT, peer TEXT
) RETURNS TEXT
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    serial TEXT;
BEGIN
    UPDATE cryptography.certificates AS c
    SET superseded_at = moment, version = expected_version + 1, record_mac = new_mac
    WHERE c.id = superseded AND c.version = expected_version AND c.issuance_status IN ('issued', 'imported')
    RETURNING c.serial_number INTO serial;
    IF NOT FOUND THEN
        RETURN 'STALE';
    END IF;
    PERFORM cryptography.record_certificate_event(
        'certificate.superseded', 'low', 'certificate', superseded, request_id, peer,
        jsonb_build_object('serial', serial, 'superseded_at', moment)
    );
    RETURN 'OK';
END;
$$;

RESET ROLE;
REVOKE ALL ON FUNCTION
    cryptography.record_certificate_event(TEXT, TEXT, TEXT, UUID, TEXT, TEXT, JSONB),
    cryptography.create_authority(JSONB, INTEGER, TEXT, TEXT),
    cryptography.change_authority(UUID, BIGINT, JSONB, TEXT, JSONB, INTEGER, TEXT, TEXT),
    cryptography.add_certificate(JSONB, BIGINT, INTEGER, TEXT, TEXT),
    cryptography.complete_certificate(UUID, TEXT, TEXT, BYTEA, TEXT, TEXT),
    cryptography.certificates_without_outcome(DOUBLE PRECISION, INTEGER),
    cryptography.abandon_certificate(UUID, INTEGER, TIMESTAMPTZ, BYTEA),
    cryptography.revoke_certificate(UUID, BIGINT, INTEGER, TIMESTAMPTZ, BYTEA, INTEGER, TEXT, TEXT),
    cryptography.supersede_certificate(UUID, BIGINT, TIMESTAMPTZ, BYTEA, TEXT, TEXT)
    FROM PUBLIC;
GRANT EXECUTE ON FUNCTION
    cryptography.create_authority(JSONB, INTEGER, TEXT, TEXT),
    cryptography.change_authority(UUID, BIGINT, JSONB, TEXT, JSONB, INTEGER, TEXT, TEXT)
    TO authenticated_users;
GRANT EXECUTE ON FUNCTION
    cryptography.add_certificate(JSONB, BIGINT, INTEGER, TEXT, TEXT),
    cryptography.complete_certificate(UUID, TEXT, TEXT, BYTEA, TEXT, TEXT),
    cryptography.revoke_certificate(UUID, BIGINT, INTEGER, TIMESTAMPTZ, BYTEA, INTEGER, TEXT, TEXT),
    cryptography.supersede_certificate(UUID, BIGINT, TIMESTAMPTZ, BYTEA, TEXT, TEXT)
    TO authenticated_users, job_runner;
GRANT EXECUTE ON FUNCTION
    cryptography.certificates_without_outcome(DOUBLE PRECISION, INTEGER),
    cryptography.abandon_certificate(UUID, INTEGER, TIMESTAMPTZ, BYTEA)
    TO job_runner;
REVOKE CREATE ON SCHEMA cryptography FROM kms_lifecycle;
