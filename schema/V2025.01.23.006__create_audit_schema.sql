-- The trail: domain events with the heads that order them, snapshots, security events, accesses to data.

CREATE SCHEMA audit;
GRANT USAGE ON SCHEMA audit TO authenticated_users, admin_users, auditor_users, job_runner, kms_ledger, kms_lifecycle;
-- Permanently, unlike other definer roles: it makes partitions as time goes by.
GRANT USAGE, CREATE ON SCHEMA audit TO kms_partitions;
GRANT USAGE ON SCHEMA authentication TO kms_partitions; -- the policies of its tables name a function there

-- Where each aggregate stands. A unique constraint on the partitioned events could not span their partitions.
CREATE TABLE audit.aggregate_heads (
    aggregate_id UUID PRIMARY KEY,
    aggregate_type VARCHAR(100) NOT NULL,
    aggregate_version BIGINT NOT NULL,
    -- whose aggregate it is: no other user appends to it; NULL: the service's own
    user_id UUID REFERENCES authentication.users (id) ON DELETE RESTRICT,
    CONSTRAINT head_version_positive CHECK (aggregate_version > 0)
);

-- Moments before our era or without end have no partition that could be named for them.
CREATE TABLE audit.domain_events (
    id UUID DEFAULT gen_random_uuid(),
    aggregate_id UUID NOT NULL,
    aggregate_type VARCHAR(100) NOT NULL,
    aggregate_version BIGINT NOT NULL,
    event_type VARCHAR(100) NOT NULL,
    event_data JSONB NOT NULL,
    event_version INTEGER DEFAULT 1,
    correlation_id UUID,
    causation_id UUID,
    initiated_by VARCHAR(255),
    occurred_at TIMESTAMPTZ DEFAULT NOW(),
    processed_at TIMESTAMPTZ,
    processing_status VARCHAR(20) DEFAULT 'pending' CHECK (processing_status IN ('pending', 'processed', 'failed')),
    retry_count INTEGER DEFAULT 0,
    error_message TEXT,
    PRIMARY KEY (id, occurred_at),
    CONSTRAINT event_version_positive CHECK (event_version > 0 AND aggregate_version > 0),
    CONSTRAINT occurred_at_has_a_year CHECK (occurred_at >= '0001-01-01 00:00:00+00' AND occurred_at < 'infinity')
) PARTITION BY RANGE (occurred_at);

CREATE TABLE audit.aggregate_snapshots (
    aggregate_id UUID PRIMARY KEY,
    aggregate_type VARCHAR(100) NOT NULL,
    aggregate_version BIGINT NOT NULL,
    snapshot_data JSONB NOT NULL,
    created_at TIMESTAMPTZ DEFAULT NOW(),
    CONSTRAINT snapshot_version_positive CHECK (aggregate_version > 0)
);

-- One row per operation. No reference to sessions: they are purged, and checking it costs 14 µs a row.
CREATE TABLE audit.security_events (
    id UUID DEFAULT gen_random_uuid(),
    event_type VARCHAR(100) NOT NULL,
    severity VARCHAR(20) NOT NULL CHECK (severity IN ('low', 'medium', 'high', 'critical')),
    user_id UUID REFERENCES authentication.users (id),
    session_id UUID,
    source_ip INET,
    user_agent TEXT,
    resource_type VARCHAR(100),
    resource_id UUID,
    action VARCHAR(100),
    outcome VARCHAR(20) CHECK (outcome IN ('success', 'failure', 'blocked')),
    risk_score INTEGER CHECK (risk_score BETWEEN 0 AND 100),
    event_details JSONB DEFAULT '{}',
    created_at TIMESTAMPTZ DEFAULT NOW(),
    PRIMARY KEY (id, created_at),
    CONSTRAINT session_has_a_user CHECK (session_id IS NULL OR user_id IS NOT NULL),
    CONSTRAINT created_at_has_a_year CHECK (created_at >= '0001-01-01 00:00:00+00' AND created_at < 'infinity')
) PARTITION BY RANGE (created_at);

CREATE TABLE audit.data_access_log (
    id UUID PRIMARY KEY DEFAULT gen_random_uuid(),
    user_id UUID REFERENCES authentication.users (id),
    table_name VARCHAR(100) NOT NULL,
    operation VARCHAR(20) NOT NULL CHECK (operation IN ('SELECT', 'INSERT', 'UPDATE', 'DELETE')),
    record_id UUID,
    affected_columns JSONB DEFAULT '[]',
    old_values JSONB,
    new_values JSONB,
    query_hash VARCHAR(64),
    execution_time_ms INTEGER,
    created_at TIMESTAMPTZ DEFAULT NOW()
);

CREATE INDEX idx_domain_events_aggregate ON audit.domain_events (aggregate_id, aggregate_version);
CREATE INDEX idx_domain_events_type_time ON audit.domain_events (event_type, occurred_at DESC);
CREATE INDEX idx_domain_events_processing ON audit.domain_events (processing_status, occurred_at)
    WHERE processing_status <> 'processed';
CREATE INDEX idx_domain_events_aggregate_processed ON audit.domain_events
    (aggregate_id, processing_status, occurred_at DESC);
CREATE INDEX idx_failed_events ON audit.domain_events (retry_count, occurred_at) WHERE processing_status = 'failed';
CREATE INDEX idx_security_events_user_time ON audit.security_events (user_id, created_at DESC);
CREATE INDEX idx_security_events_severity ON audit.security_events (severity, created_at DESC);

ALTER TABLE audit.aggregate_heads ENABLE ROW LEVEL SECURITY;
ALTER TABLE audit.aggregate_heads FORCE ROW LEVEL SECURITY;
ALTER TABLE audit.domain_events ENABLE ROW LEVEL SECURITY;
ALTER TABLE audit.domain_events FORCE ROW LEVEL SECURITY;
ALTER TABLE audit.aggregate_snapshots ENABLE ROW LEVEL SECURITY;
ALTER TABLE audit.aggregate_snapshots FORCE ROW LEVEL SECURITY;
ALTER TABLE audit.security_events ENABLE ROW LEVEL SECURITY;
ALTER TABLE audit.security_events FORCE ROW LEVEL SECURITY;
ALTER TABLE audit.data_access_log ENABLE ROW LEVEL SECURITY;
ALTER TABLE audit.data_access_log FORCE ROW LEVEL SECURITY;

CREATE POLICY aggregate_heads_read ON audit.aggregate_heads
    FOR SELECT TO auditor_users
    USING (TRUE);
CREATE POLICY aggregate_heads_ledger ON audit.aggregate_heads
    FOR ALL TO kms_ledger
    USING (TRUE)
    WITH CHECK (TRUE);

CREATE POLICY domain_events_read ON audit.domain_events
    FOR SELECT TO auditor_users
    USING (TRUE);
CREATE POLICY domain_events_job ON audit.domain_events
    FOR SELECT TO job_runner
    USING (TRUE);
CREATE POLICY domain_events_processing ON audit.domain_events
    FOR UPDATE TO job_runner
    USING (TRUE)
    WITH CHECK (TRUE);
CREATE POLICY domain_events_ledger ON audit.domain_events
    FOR INSERT TO kms_ledger
    WITH CHECK (TRUE);
CREATE POLICY domain_events_upkeep ON audit.domain_events
    FOR ALL TO kms_partitions
    USING (TRUE)
    WITH CHECK (TRUE);

CREATE POLICY aggregate_snapshots_read ON audit.aggregate_snapshots
    FOR SELECT TO auditor_users
    USING (TRUE);
CREATE POLICY aggregate_snapshots_job ON audit.aggregate_snapshots
    FOR ALL TO job_runner
    USING (TRUE)
    WITH CHECK (TRUE);

CREATE POLICY security_events_own_data ON audit.security_events
    FOR SELECT TO authenticated_users
    USING (user_id = authentication.current_user_id());
CREATE POLICY security_events_read ON audit.security_events
    FOR SELECT TO admin_users, auditor_users
    USING (TRUE);
CREATE POLICY security_events_ledger ON audit.security_events
    FOR INSERT TO kms_ledger
    WITH CHECK (TRUE);
CREATE POLICY security_events_upkeep ON audit.security_events
    FOR ALL TO kms_partitions
    USING (TRUE)
    WITH CHECK (TRUE);

CREATE POLICY data_access_log_own_data ON audit.data_access_log
    FOR SELECT TO authenticated_users
    USING (user_id = authentication.current_user_id());
CREATE POLICY data_access_log_read ON audit.data_access_log
    FOR SELECT TO auditor_users
    USING (TRUE);
CREATE POLICY data_access_log_ledger ON audit.data_access_log
    FOR INSERT TO kms_ledger
    WITH CHECK (TRUE);

GRANT SELECT ON audit.aggregate_heads TO auditor_users, kms_ledger;
GRANT INSERT (aggregate_id, aggregate_type, aggregate_version, user_id) ON audit.aggregate_heads TO kms_ledger;
GRANT UPDATE (aggregate_version) ON audit.aggregate_heads TO kms_ledger;

GRANT SELECT ON audit.domain_events TO auditor_users, job_runner;
GRANT UPDATE (processed_at, processing_status, retry_count, error_message) ON audit.domain_events TO job_runner;
GRANT INSERT (
    id, aggregate_id, aggregate_type, aggregate_version, event_type, event_data, event_version, correlation_id,
    causation_id, initiated_by, occurred_at
) ON audit.domain_events TO kms_ledger;

GRANT SELECT ON audit.aggregate_snapshots TO auditor_users, job_runner;
GRANT INSERT ON audit.aggregate_snapshots TO job_runner;
GRANT UPDATE (aggregate_version, snapshot_data, created_at) ON audit.aggregate_snapshots TO job_runner;

GRANT SELECT ON audit.security_events TO authenticated_users, admin_users, auditor_users;
GRANT INSERT ON audit.security_events TO kms_ledger;

GRANT SELECT ON audit.data_access_log TO authenticated_users, auditor_users;
GRANT INSERT ON audit.data_access_log TO kms_ledger;

-- After the grants: from here on the tables are another's.
ALTER TABLE audit.domain_events OWNER TO kms_partitions;
ALTER TABLE audit.security_events OWNER TO kms_partitions;
