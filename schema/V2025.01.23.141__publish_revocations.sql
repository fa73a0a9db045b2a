-- What the service signs about certificates that were revoked: the last CRL of each shard, and OCSP answers.
--
-- No row here has a MAC: each document is signed by the token. The service verifies the signature, and that the document is not older
-- than what it knows, before it publishes it.

CREATE TABLE cryptography.crls (
    issuer_id UUID NOT NULL REFERENCES cryptography.certificate_authorities (id) ON DELETE RESTRICT,
    shard INTEGER NOT NULL CONSTRAINT crl_shard_range CHECK (shard BETWEEN 0 AND 65536), -- 0: of certificates without a shard
    number BIGINT NOT NULL CONSTRAINT crl_number_positive CHECK (number > 0), -- the CRL number
    crl BYTEA NOT NULL CONSTRAINT crl_not_empty CHECK (octet_length(crl) > 0), -- DER
    entries INTEGER NOT NULL CONSTRAINT crl_entries_not_negative CHECK (entries >= 0),
    this_update TIMESTAMPTZ NOT NULL,
    next_update TIMESTAMPTZ NOT NULL,
    PRIMARY KEY (issuer_id, shard),
    CONSTRAINT crl_updates_in_order CHECK (next_update > this_update)
);

-- Answers without a nonce, which anybody may get, and a cache may keep.
CREATE TABLE cryptography.ocsp_answers (
    issuer_id UUID NOT NULL REFERENCES cryptography.certificate_authorities (id) ON DELETE RESTRICT,
    serial_number TEXT COLLATE "C" NOT NULL CONSTRAINT ocsp_answer_serial_form CHECK (serial_number ~ '^[0-9a-f]{1,40}$'),
    hash_name TEXT NOT NULL CONSTRAINT ocsp_answer_hash CHECK (hash_name IN ('sha1', 'sha256')), -- by which a request names its issuer
    answer BYTEA NOT NULL CONSTRAINT ocsp_answer_not_empty CHECK (octet_length(answer) > 0), -- DER
    is_revoked BOOLEAN NOT NULL,
    this_update TIMESTAMPTZ NOT NULL,
    next_update TIMESTAMPTZ NOT NULL,
    PRIMARY KEY (issuer_id, serial_number, hash_name),
    CONSTRAINT ocsp_answer_updates_in_order CHECK (next_update > this_update)
);
CREATE INDEX idx_ocsp_answers_next_update ON cryptography.ocsp_answers (next_update);
-- The certificate that signs OCSP answers of an authority, the one that ends last.
-- squawk-ignore require-concurrent-index-creation
CREATE INDEX idx_certificates_ocsp ON cryptography.certificates (issuer_id, not_after DESC) WHERE profile = 'ocsp';

ALTER TABLE cryptography.crls ENABLE ROW LEVEL SECURITY;
ALTER TABLE cryptography.crls FORCE ROW LEVEL SECURITY;
ALTER TABLE cryptography.ocsp_answers ENABLE ROW LEVEL SECURITY;
ALTER TABLE cryptography.ocsp_answers FORCE ROW LEVEL SECURITY;
CREATE POLICY crls_read ON cryptography.crls
    FOR SELECT TO job_runner
    USING (TRUE);
CREATE POLICY crls_lifecycle ON cryptography.crls
    FOR ALL TO kms_lifecycle
    USING (TRUE)
    WITH CHECK (TRUE);
CREATE POLICY ocsp_answers_read ON cryptography.ocsp_answers
    FOR SELECT TO job_runner
    USING (TRUE);
CREATE POLICY ocsp_answers_lifecycle ON cryptography.ocsp_answers
    FOR ALL TO kms_lifecycle
    USING (TRUE)
    WITH CHECK (TRUE);
GRANT SELECT ON cryptography.crls, cryptography.ocsp_answers TO job_runner;
GRANT SELECT, INSERT ON cryptography.crls, cryptography.ocsp_answers TO kms_lifecycle;
GRANT UPDATE (number, crl, entries, this_update, next_update) ON cryptography.crls TO kms_lifecycle;
GRANT UPDATE (answer, is_revoked, this_update, next_update), DELETE ON cryptography.ocsp_answers TO kms_lifecycle;

GRANT CREATE ON SCHEMA cryptography TO kms_lifecycle;
SET LOCAL ROLE kms_lifecycle;

-- Store the CRL that follows the one with the number previous (0: there is none). Returns 'OK', or 'STALE' where another one is there.
CREATE FUNCTION cryptography.store_crl(
    issuer UUID, crl_shard INTEGER, previous BIGINT, new_number BIGINT, new_crl BYTEA, new_entries INTEGER,
    new_this_update TIMESTAMPTZ, new_next_update TIMESTAMPTZ
) RETURNS TEXT
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF previous = 0 THEN
        INSERT INTO cryptography.crls (issuer_id, shard, number, crl, entries, this_update, next_update)
        VALUES (issuer, crl_shard, new_number, new_crl, new_entries, new_this_update, new_next_update)
        ON CONFLICT DO NOTHING;
    ELSE
        UPDATE cryptography.crls AS c
        SET number = new_number, crl = new_crl, entries = new_entries, this_update = new_this_update, next_update = new_next_update
        WHERE c.issuer_id = issuer AND c.shard = crl_shard AND c.number = previous;
    END IF;
    IF NOT FOUND THEN
        RETURN 'STALE';
    END IF;
    PERFORM cryptography.record_certificate_event(
        'crl.published', 'low', 'certificate_authority', issuer, '', '', jsonb_build_object(
            'shard', crl_shard, 'number', new_number, 'entries', new_entries, 'next_update', new_next_update
        )
    );
    RETURN 'OK';
END;
$$;

-- The shards of authorities whose CRL is missing, older than so many seconds, or lacks a certificate that was revoked since it was made.
CREATE FUNCTION cryptography.crls_to_look_at(seconds DOUBLE PRECISION, crls_max INTEGER)
RETURNS TABLE (issuer_id UUID, shard INTEGER)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    moment CONSTANT TIMESTAMPTZ := clock_timestamp();
BEGIN
    RETURN QUERY
    SELECT a.id, s.number
    FROM cryptography.certificate_authorities AS a
    CROSS JOIN LATERAL generate_series(0, a.crl_shards) AS s (number)
    LEFT JOIN cryptography.crls AS c ON c.issuer_id = a.id AND c.shard = s.number
    WHERE a.certificate IS NOT NULL AND a.not_after > moment AND (
        c.number IS NULL OR c.this_update <= moment - make_interval(secs => seconds) OR EXISTS (
            -- A revocation has its moment before its row is there for others.
            SELECT FROM cryptography.certificates AS r
            WHERE r.issuer_id = a.id AND r.crl_shard = s.number AND r.revocation_status = 'revoked'
                AND r.not_after >= c.this_update AND r.revoked_at > c.this_update - INTERVAL '2 minutes'
        )
    )
    ORDER BY c.this_update NULLS FIRST
    LIMIT crls_max;
END;
$$;

-- Store an OCSP answer, unless a later one is there.
CREATE FUNCTION cryptography.store_ocsp_answer(
    issuer UUID, serial TEXT, by_hash TEXT, new_answer BYTEA, says_revoked BOOLEAN, new_this_update TIMESTAMPTZ,
    new_next_update TIMESTAMPTZ
) RETURNS VOID
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    INSERT INTO cryptography.ocsp_answers AS o (
        issuer_id, serial_number, hash_name, answer, is_revoked, this_update, next_update
    ) VALUES (issuer, serial, by_hash, new_answer, says_revoked, new_this_update, new_next_update)
    ON CONFLICT ON CONSTRAINT ocsp_answers_pkey DO UPDATE
    SET answer = new_answer, is_revoked = says_revoked, this_update = new_this_update, next_update = new_next_update
    WHERE (o.this_update, o.next_update) < (new_this_update, new_next_update) OR (says_revoked AND NOT o.is_revoked);
END;
$$;

-- Certificates of an authority that have no OCSP answer which is good until a moment and says what their row says.
CREATE FUNCTION cryptography.certificates_without_ocsp_answer(authority UUID, good_until TIMESTAMPTZ, certificates_max INTEGER)
RETURNS TABLE (id UUID, serial_number TEXT)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    SELECT c.id, c.serial_number::TEXT
    FROM cryptography.certificates AS c
    LEFT JOIN cryptography.ocsp_answers AS o
        ON o.issuer_id = c.issuer_id AND o.serial_number = c.serial_number AND o.hash_name = 'sha1'
    WHERE c.issuer_id = authority AND c.not_after > clock_timestamp() AND c.issuance_status IN ('issued', 'abandoned')
        AND c.profile <> 'ocsp'
        AND (o.next_update IS NULL OR o.next_update < good_until OR o.is_revoked <> (c.revocation_status = 'revoked'))
    ORDER BY o.next_update NULLS FIRST
    LIMIT certificates_max;
END;
$$;

-- Remove answers that are no longer good, at most so many, and return how many they were.
CREATE FUNCTION cryptography.forget_ocsp_answers(answers_max INTEGER) RETURNS BIGINT
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    removed BIGINT;
BEGIN
    DELETE FROM cryptography.ocsp_answers AS o
    USING (
        SELECT e.issuer_id, e.serial_number, e.hash_name FROM cryptography.ocsp_answers AS e
        WHERE e.next_update < clock_timestamp()
        ORDER BY e.next_update
        LIMIT answers_max
        FOR UPDATE SKIP LOCKED
    ) AS ended
    WHERE o.issuer_id = ended.issuer_id AND o.serial_number = ended.serial_number AND o.hash_name = ended.hash_name;
    GET DIAGNOSTICS removed = ROW_COUNT;
    RETURN removed;
END;
$$;

RESET ROLE;
REVOKE ALL ON FUNCTION
    cryptography.store_crl(UUID, INTEGER, BIGINT, BIGINT, BYTEA, INTEGER, TIMESTAMPTZ, TIMESTAMPTZ),
    cryptography.crls_to_look_at(DOUBLE PRECISION, INTEGER),
    cryptography.store_ocsp_answer(UUID, TEXT, TEXT, BYTEA, BOOLEAN, TIMESTAMPTZ, TIMESTAMPTZ),
    cryptography.certificates_without_ocsp_answer(UUID, TIMESTAMPTZ, INTEGER),
    cryptography.forget_ocsp_answers(INTEGER)
    FROM PUBLIC;
GRANT EXECUTE ON FUNCTION
    cryptography.store_crl(UUID, INTEGER, BIGINT, BIGINT, BYTEA, INTEGER, TIMESTAMPTZ, TIMESTAMPTZ),
    cryptography.crls_to_look_at(DOUBLE PRECISION, INTEGER),
    cryptography.store_ocsp_answer(UUID, TEXT, TEXT, BYTEA, BOOLEAN, TIMESTAMPTZ, TIMESTAMPTZ),
    cryptography.certificates_without_ocsp_answer(UUID, TIMESTAMPTZ, INTEGER),
    cryptography.forget_ocsp_answers(INTEGER)
    TO job_runner;
REVOKE CREATE ON SCHEMA cryptography FROM kms_lifecycle;
