-- Refused calls are recorded many at once, by users and for nobody, apart from the charges.

-- Record refusals: a JSON array of user_id, peer, action, key_id, reason, severity, outcome, risk_score, details and age_seconds
-- (how long ago); one that stands for many has first_age_seconds too. A user that does not exist is left out of the row.
-- Returns how many rows were written.
CREATE FUNCTION audit.record_refusals(refusals JSON) RETURNS BIGINT
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    written BIGINT;
BEGIN
    INSERT INTO audit.security_events (
        event_type, severity, user_id, source_ip, resource_type, resource_id, action, outcome, risk_score, event_details,
        created_at
    )
    SELECT 'request.refused', r.severity, (SELECT u.id FROM authentication.users AS u WHERE u.id = r.user_id),
        CASE WHEN pg_input_is_valid(r.peer, 'inet') THEN r.peer::INET END,
        CASE WHEN r.key_id IS NOT NULL THEN 'key' END, r.key_id, r.action, r.outcome, r.risk_score,
        coalesce(r.details, '{}') || jsonb_build_object('reason', r.reason)
            || CASE WHEN r.first_age_seconds IS NULL THEN '{}' ELSE jsonb_build_object(
                'first', clock_timestamp() - make_interval(secs => r.first_age_seconds),
                'last', clock_timestamp() - make_interval(secs => r.age_seconds)
            ) END,
        clock_timestamp() - make_interval(secs => r.age_seconds)
    FROM json_to_recordset(refusals) AS r (
        user_id UUID, peer TEXT, action TEXT, key_id UUID, reason TEXT, severity TEXT, outcome TEXT, risk_score INTEGER,
        details JSONB, age_seconds DOUBLE PRECISION,
        first_age_seconds DOUBLE PRECISION
    );
    GET DIAGNOSTICS written = ROW_COUNT;
    RETURN written;
END;
$$;
REVOKE ALL ON FUNCTION audit.record_refusals(JSON) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION audit.record_refusals(JSON) TO kms_service;
GRANT USAGE ON SCHEMA audit TO kms_service;

GRANT CREATE ON SCHEMA audit TO kms_ledger;
ALTER FUNCTION audit.record_refusals(JSON) OWNER TO kms_ledger;
REVOKE CREATE ON SCHEMA audit FROM kms_ledger;
