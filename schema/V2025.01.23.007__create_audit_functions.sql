-- The only ways into the trail. Who acts is what the transaction said when it began, never an argument.

GRANT EXECUTE ON FUNCTION authentication.current_user_id() TO kms_ledger;
GRANT USAGE ON SCHEMA authentication TO kms_ledger;

-- Append an event as the successor of version expected_version of its aggregate (0: the first), and return its version.
-- Raises serialization_failure (40001) where the aggregate stands elsewhere, is of another type or is another user's.
CREATE FUNCTION audit.append_event(
    aggregate_id UUID,
    aggregate_type TEXT,
    event_type TEXT,
    event_data JSONB,
    expected_version BIGINT,
    event_version INTEGER DEFAULT 1,
    correlation_id UUID DEFAULT NULL,
    causation_id UUID DEFAULT NULL
) RETURNS BIGINT
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    -- 'none' for the migrator; within this function current_user is its owner.
    acting_role CONSTANT TEXT := current_setting('role');
    acting_user CONSTANT UUID := authentication.current_user_id();
    advanced BIGINT;
BEGIN
    IF acting_role = 'authenticated_users' AND acting_user IS NULL THEN
        RAISE EXCEPTION 'nobody is named for whom to append' USING ERRCODE = 'insufficient_privilege';
    END IF;
    IF append_event.expected_version = 0 THEN
        INSERT INTO audit.aggregate_heads (aggregate_id, aggregate_type, aggregate_version, user_id)
        VALUES (append_event.aggregate_id, append_event.aggregate_type, 1, acting_user)
        ON CONFLICT DO NOTHING;
    ELSE
        UPDATE audit.aggregate_heads AS head
        SET aggregate_version = head.aggregate_version + 1
        WHERE head.aggregate_id = append_event.aggregate_id
            AND head.aggregate_type = append_event.aggregate_type
            AND head.aggregate_version = append_event.expected_version
            AND (acting_role <> 'authenticated_users' OR head.user_id = acting_user);
    END IF;
    GET DIAGNOSTICS advanced = ROW_COUNT;
    IF advanced IS DISTINCT FROM 1 THEN
        RAISE EXCEPTION 'aggregate % is not at version %', append_event.aggregate_id, append_event.expected_version
            USING ERRCODE = 'serialization_failure';
    END IF;
    INSERT INTO audit.domain_events (
        aggregate_id, aggregate_type, aggregate_version, event_type, event_data, event_version, correlation_id,
        causation_id, initiated_by, occurred_at
    ) VALUES (
        append_event.aggregate_id, append_event.aggregate_type, append_event.expected_version + 1,
        append_event.event_type, append_event.event_data, append_event.event_version, append_event.correlation_id,
        append_event.causation_id, coalesce(acting_user::TEXT, acting_role), clock_timestamp()
    );
    RETURN append_event.expected_version + 1;
END;
$$;

-- Record what the user for whom the transaction acts did or tried (nobody: what happened before there was a user), and
-- return the id of the row.
CREATE FUNCTION audit.record_security_event(
    event_type TEXT,
    severity TEXT,
    session_id UUID,
    source_ip INET,
    user_agent TEXT,
    resource_type TEXT,
    resource_id UUID,
    action TEXT,
    outcome TEXT,
    risk_score INTEGER,
    event_details JSONB
) RETURNS UUID
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    new_id CONSTANT UUID := gen_random_uuid();
BEGIN
    INSERT INTO audit.security_events (
        id, event_type, severity, user_id, session_id, source_ip, user_agent, resource_type, resource_id, action, outcome,
        risk_score, event_details, created_at
    ) VALUES (
        new_id, record_security_event.event_type, record_security_event.severity, authentication.current_user_id(),
        record_security_event.session_id, record_security_event.source_ip, record_security_event.user_agent,
        record_security_event.resource_type, record_security_event.resource_id, record_security_event.action,
        record_security_event.outcome, record_security_event.risk_score,
        coalesce(record_security_event.event_details, '{}'), clock_timestamp()
    );
    RETURN new_id;
END;
$$;

-- Record that the user for whom the transaction acts saw or changed rows, and return the id of the record.
CREATE FUNCTION audit.record_data_access(
    table_name TEXT,
    operation TEXT,
    record_id UUID,
    affected_columns JSONB DEFAULT '[]',
    old_values JSONB DEFAULT NULL,
    new_values JSONB DEFAULT NULL,
    query_hash TEXT DEFAULT NULL,
    execution_time_ms INTEGER DEFAULT NULL
) RETURNS UUID
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    new_id CONSTANT UUID := gen_random_uuid();
BEGIN
    INSERT INTO audit.data_access_log (
        id, user_id, table_name, operation, record_id, affected_columns, old_values, new_values, query_hash,
        execution_time_ms, created_at
    ) VALUES (
        new_id, authentication.current_user_id(), record_data_access.table_name, record_data_access.operation,
        record_data_access.record_id, record_data_access.affected_columns, record_data_access.old_values,
        record_data_access.new_values, record_data_access.query_hash, record_data_access.execution_time_ms, clock_timestamp()
    );
    RETURN new_id;
END;
$$;

REVOKE ALL ON FUNCTION
    audit.append_event(UUID, TEXT, TEXT, JSONB, BIGINT, INTEGER, UUID, UUID),
    audit.record_security_event(TEXT, TEXT, UUID, INET, TEXT, TEXT, UUID, TEXT, TEXT, INTEGER, JSONB),
    audit.record_data_access(TEXT, TEXT, UUID, JSONB, JSONB, JSONB, TEXT, INTEGER)
    FROM PUBLIC;
GRANT EXECUTE ON FUNCTION
    audit.append_event(UUID, TEXT, TEXT, JSONB, BIGINT, INTEGER, UUID, UUID),
    audit.record_security_event(TEXT, TEXT, UUID, INET, TEXT, TEXT, UUID, TEXT, TEXT, INTEGER, JSONB),
    audit.record_data_access(TEXT, TEXT, UUID, JSONB, JSONB, JSONB, TEXT, INTEGER)
    TO authenticated_users, admin_users, job_runner, kms_lifecycle;

GRANT CREATE ON SCHEMA audit TO kms_ledger;
ALTER FUNCTION audit.append_event(UUID, TEXT, TEXT, JSONB, BIGINT, INTEGER, UUID, UUID) OWNER TO kms_ledger;
ALTER FUNCTION audit.record_security_event(TEXT, TEXT, UUID, INET, TEXT, TEXT, UUID, TEXT, TEXT, INTEGER, JSONB)
    OWNER TO kms_ledger;
ALTER FUNCTION audit.record_data_access(TEXT, TEXT, UUID, JSONB, JSONB, JSONB, TEXT, INTEGER) OWNER TO kms_ledger;
REVOKE CREATE ON SCHEMA audit FROM kms_ledger;
