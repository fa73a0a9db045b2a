-- One look at the clock judges a batch. A volatile argument kept effective_status from being inlined: an eighth of what settling
-- one use costs the server.

-- Only its owner replaces a function, and a migrator that is no superuser is not the owner.
GRANT CREATE ON SCHEMA cryptography TO kms_ledger;
SET LOCAL ROLE kms_ledger;

-- What stands against each use, but for its limit and earlier answers: 'OK' or a reason. The keys are locked, and one moment behind
-- the locks holds for all of them.
CREATE OR REPLACE FUNCTION cryptography.judge_uses(uses cryptography.key_use[]) RETURNS TEXT[]
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN (
        SELECT array_agg(
            CASE
                WHEN u.id IS NULL THEN 'CREDENTIALS_INVALID'
                WHEN k.id IS NULL THEN 'KEY_NOT_FOUND'
                WHEN e.is_charged AND now.state IN ('active', 'inactive')
                    AND k.usage_counter >= cryptography.usage_limit(k.key_type, k.max_usage_count)
                    THEN 'USAGE_LIMIT_REACHED'
                WHEN cryptography.use_refusal(now.state, e.use) IS NOT NULL THEN cryptography.use_refusal(now.state, e.use)
                WHEN k.version IS DISTINCT FROM e.key_version THEN 'STALE'
                ELSE 'OK'
            END
            ORDER BY e.n
        )
        FROM unnest(uses) AS e
            CROSS JOIN (SELECT clock_timestamp()) AS clock (moment)
            LEFT JOIN authentication.users AS u ON u.id = e.user_id AND u.version = e.user_version
                AND u.deleted_at IS NULL AND (u.locked_until IS NULL OR u.locked_until <= clock.moment)
            LEFT JOIN cryptography.keys AS k ON k.id = e.key_id AND k.user_id = e.user_id
            CROSS JOIN LATERAL (
                SELECT cryptography.effective_status(
                    k.key_status, k.activated_at, k.deactivated_at, k.superseded_at, k.expires_at,
                    k.destruction_scheduled_at, k.destroyed_at, clock.moment
                )
            ) AS now (state)
    );
END;
$$;

RESET ROLE;
REVOKE CREATE ON SCHEMA cryptography FROM kms_ledger;
