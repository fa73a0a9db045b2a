-- What the service does about a history of the trail that does not go on from its checkpoints is in the trail.

-- Record that a history was refused, that a machine began to remember checkpoints, or that one was put back. The service says
-- which and what; how grave it is stands here.
CREATE FUNCTION audit.record_history_event(event TEXT, details JSONB) RETURNS VOID
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    is_refused CONSTANT BOOLEAN := event = 'audit.history_refused';
BEGIN
    IF event NOT IN ('audit.history_refused', 'audit.memory_begun', 'audit.checkpoint_restored') THEN
        RAISE EXCEPTION '% is no event of the history', event USING ERRCODE = 'invalid_parameter_value';
    END IF;
    INSERT INTO audit.security_events (event_type, severity, action, outcome, risk_score, event_details, created_at)
    VALUES (
        event, CASE WHEN is_refused THEN 'critical' ELSE 'high' END, 'sign_trail',
        CASE WHEN is_refused THEN 'blocked' ELSE 'success' END, CASE WHEN is_refused THEN 95 ELSE 60 END, details,
        clock_timestamp()
    );
END;
$$;
REVOKE ALL ON FUNCTION audit.record_history_event(TEXT, JSONB) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION audit.record_history_event(TEXT, JSONB) TO job_runner;

GRANT CREATE ON SCHEMA audit TO kms_ledger;
ALTER FUNCTION audit.record_history_event(TEXT, JSONB) OWNER TO kms_ledger;
REVOKE CREATE ON SCHEMA audit FROM kms_ledger;
