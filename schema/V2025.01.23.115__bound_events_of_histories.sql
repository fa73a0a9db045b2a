-- An event about the history of the trail is a few words of the service: nobody fills the trail with one.

-- Only its owner replaces a function.
GRANT CREATE ON SCHEMA audit TO kms_ledger;
SET LOCAL ROLE kms_ledger;

-- Record that a history was refused, that a machine began to remember checkpoints, or that one was put back. The service says
-- which and what, in at most 8,000 bytes; how grave it is stands here.
CREATE OR REPLACE FUNCTION audit.record_history_event(event TEXT, details JSONB) RETURNS VOID
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    is_refused CONSTANT BOOLEAN := event = 'audit.history_refused';
BEGIN
    IF event IS NULL OR event NOT IN ('audit.history_refused', 'audit.memory_begun', 'audit.checkpoint_restored') THEN
        RAISE EXCEPTION '% is no event of the history', left(event, 100) USING ERRCODE = 'invalid_parameter_value';
    END IF;
    IF jsonb_typeof(details) IS DISTINCT FROM 'object' OR octet_length(details::TEXT) > 8000 THEN
        RAISE EXCEPTION 'expected the details of an event, at most 8,000 bytes of them' USING ERRCODE = 'invalid_parameter_value';
    END IF;
    INSERT INTO audit.security_events (event_type, severity, action, outcome, risk_score, event_details, created_at)
    VALUES (
        event, CASE WHEN is_refused THEN 'critical' ELSE 'high' END, 'sign_trail',
        CASE WHEN is_refused THEN 'blocked' ELSE 'success' END, CASE WHEN is_refused THEN 95 ELSE 60 END, details,
        clock_timestamp()
    );
END;
$$;

RESET ROLE;
REVOKE CREATE ON SCHEMA audit FROM kms_ledger;
