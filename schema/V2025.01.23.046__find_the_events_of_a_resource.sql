-- What happened to a key, the newest first. The other ways into the trail have their indexes: user, severity, order.

-- CONCURRENTLY makes no index of a partitioned table.
-- squawk-ignore require-concurrent-index-creation
CREATE INDEX idx_security_events_resource_time ON audit.security_events (resource_id, created_at DESC)
    WHERE resource_id IS NOT NULL;
