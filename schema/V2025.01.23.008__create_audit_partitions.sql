-- Partitions of the trail: a month of security events each, a year of domain events each. What has no partition lands in
-- the DEFAULT one, is reported by audit.default_partition_rows() and moved by audit.drain_default(). All bounds are UTC.
--
-- The functions belong to the owner of these tables, for only an owner attaches. Forced row security holds for him as for
-- everyone; the policies *_upkeep show him the rows.

-- What is partitioned by time: the length of a partition, and how its name says when it begins.
CREATE FUNCTION audit.partitioned_by_time()
RETURNS TABLE (parent REGCLASS, key_column NAME, unit TEXT, suffix TEXT)
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
AS $$
    VALUES
        ('audit.security_events'::REGCLASS, 'created_at'::NAME, 'month', 'YYYY_MM'),
        ('audit.domain_events'::REGCLASS, 'occurred_at'::NAME, 'year', 'YYYY');
$$;

-- Make an empty table like a parent, with its constraints, indexes and row security: policies are not inherited.
CREATE FUNCTION audit.make_like(parent REGCLASS, new_name TEXT) RETURNS REGCLASS
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    made REGCLASS;
    policy RECORD;
BEGIN
    EXECUTE format(
        'CREATE TABLE audit.%I (LIKE %s INCLUDING DEFAULTS INCLUDING CONSTRAINTS INCLUDING INDEXES INCLUDING STORAGE)',
        new_name, parent
    );
    made := format('audit.%I', new_name)::REGCLASS;
    EXECUTE format('ALTER TABLE %s ENABLE ROW LEVEL SECURITY', made);
    EXECUTE format('ALTER TABLE %s FORCE ROW LEVEL SECURITY', made);
    FOR policy IN
        SELECT p.polname, p.polcmd, pg_get_expr(p.polqual, p.polrelid) AS shown, pg_get_expr(p.polwithcheck, p.polrelid) AS taken,
            (SELECT string_agg(r::REGROLE::TEXT, ', ') FROM unnest(p.polroles) AS r) AS roles
        FROM pg_policy AS p
        WHERE p.polrelid = parent
    LOOP
        EXECUTE format(
            'CREATE POLICY %I ON %s FOR %s TO %s %s %s', policy.polname, made,
            CASE policy.polcmd WHEN 'r' THEN 'SELECT' WHEN 'a' THEN 'INSERT' WHEN 'w' THEN 'UPDATE' WHEN 'd' THEN 'DELETE' ELSE 'ALL' END,
            policy.roles,
            CASE WHEN policy.shown IS NOT NULL THEN format('USING (%s)', policy.shown) ELSE '' END,
            CASE WHEN policy.taken IS NOT NULL THEN format('WITH CHECK (%s)', policy.taken) ELSE '' END
        );
    END LOOP;
    RETURN made;
END;
$$;

-- Run a statement that needs a strong lock for a moment: ask briefly and often, so that those who queue behind do not wait.
-- Raises lock_not_available when it has asked in vain for some five seconds.
CREATE FUNCTION audit.with_brief_locks(statement TEXT) RETURNS VOID
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp SET lock_timeout = '100ms'
AS $$
BEGIN
    FOR attempt IN 1..25 LOOP
        BEGIN
            EXECUTE statement;
            RETURN;
        EXCEPTION WHEN lock_not_available THEN
            IF attempt = 25 THEN
                RAISE;
            END IF;
        END;
        PERFORM pg_sleep(0.05 + random() * 0.1);
    END LOOP;
END;
$$;

-- Make the table of the partition in which a moment falls, with a CHECK of its range: with it ATTACH need not read the
-- rows. Returns its name and bounds; does not attach it.
CREATE FUNCTION audit.make_range(
    parent REGCLASS, moment TIMESTAMPTZ, OUT made REGCLASS, OUT lower_bound TIMESTAMPTZ, OUT upper_bound TIMESTAMPTZ
)
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp SET timezone = 'UTC' SET datestyle = 'ISO'
AS $$
DECLARE
    kind RECORD;
    new_name TEXT;
BEGIN
    SELECT * INTO STRICT kind FROM audit.partitioned_by_time() AS k WHERE k.parent = make_range.parent;
    lower_bound := date_trunc(kind.unit, moment);
    upper_bound := lower_bound + ('1 ' || kind.unit)::INTERVAL;
    SELECT format('%s_%s', c.relname, to_char(lower_bound, kind.suffix)) INTO STRICT new_name FROM pg_class AS c WHERE c.oid = make_range.parent;
    IF to_regclass(format('audit.%I', new_name)) IS NOT NULL THEN
        RETURN;
    END IF;
    made := audit.make_like(make_range.parent, new_name);
    EXECUTE format(
        'ALTER TABLE %s ADD CONSTRAINT %I CHECK (%I >= %L AND %I < %L)', made, new_name || '_range',
        kind.key_column, lower_bound, kind.key_column, upper_bound
    );
END;
$$;

-- Make the missing partitions from a moment to another, and return their names. A range of which DEFAULT has rows is left
-- out with a warning: drain_default() makes it.
CREATE FUNCTION audit.ensure_range(first_moment TIMESTAMPTZ, last_moment TIMESTAMPTZ) RETURNS SETOF REGCLASS
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp SET timezone = 'UTC' SET datestyle = 'ISO'
AS $$
DECLARE
    kind RECORD;
    moment TIMESTAMPTZ;
    new_one RECORD;
BEGIN
    PERFORM pg_advisory_xact_lock(hashtext('audit.ensure_partitions'));
    FOR kind IN SELECT * FROM audit.partitioned_by_time() LOOP
        FOR moment IN
            SELECT generate_series(date_trunc(kind.unit, first_moment), last_moment, ('1 ' || kind.unit)::INTERVAL)
        LOOP
            BEGIN
                SELECT * INTO STRICT new_one FROM audit.make_range(kind.parent, moment);
                CONTINUE WHEN new_one.made IS NULL;
                PERFORM audit.with_brief_locks(format(
                    'ALTER TABLE %s ATTACH PARTITION %s FOR VALUES FROM (%L) TO (%L)',
                    kind.parent, new_one.made, new_one.lower_bound, new_one.upper_bound
                ));
                RETURN NEXT new_one.made;
            EXCEPTION WHEN check_violation THEN
                RAISE WARNING 'the DEFAULT partition of % has rows from % on', kind.parent, moment
                    USING HINT = 'Run audit.drain_default().';
            END;
        END LOOP;
    END LOOP;
END;
$$;

-- Make the partitions that are missing from now until *ahead* of now, and return their names. At most ten years.
CREATE FUNCTION audit.ensure_partitions(ahead INTERVAL DEFAULT '2 years') RETURNS SETOF REGCLASS
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF ahead IS NULL OR ahead < INTERVAL '0' OR ahead > INTERVAL '10 years' THEN
        RAISE EXCEPTION 'expected an interval from 0 to 10 years, not %', ahead USING ERRCODE = 'invalid_parameter_value';
    END IF;
    RETURN QUERY SELECT * FROM audit.ensure_range(clock_timestamp(), clock_timestamp() + ahead);
END;
$$;

-- How many rows lie in each DEFAULT partition; counted up to 10,000. No row is as it should be.
CREATE FUNCTION audit.default_partition_rows()
RETURNS TABLE (parent REGCLASS, default_partition REGCLASS, row_count BIGINT)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
BEGIN
    FOR parent, default_partition IN
        SELECT k.parent, t.partdefid::REGCLASS
        FROM audit.partitioned_by_time() AS k JOIN pg_partitioned_table AS t ON t.partrelid = k.parent
    LOOP
        EXECUTE format('SELECT count(*) FROM (SELECT FROM %s LIMIT 10000) AS first_rows', default_partition) INTO row_count;
        IF row_count > 0 THEN
            RETURN NEXT;
        END IF;
    END LOOP;
END;
$$;

-- Move the rows of the DEFAULT partitions into partitions of their own, in one transaction: detach, copy, attach. Returns
-- how many were moved. Writers of the table wait meanwhile. Raises lock_not_available, and then has changed nothing.
CREATE FUNCTION audit.drain_default() RETURNS BIGINT
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET timezone = 'UTC' SET datestyle = 'ISO'
AS $$
DECLARE
    kind RECORD;
    rest REGCLASS;
    moment TIMESTAMPTZ;
    new_one RECORD;
    copied BIGINT;
    deleted BIGINT;
    moved BIGINT := 0;
BEGIN
    PERFORM pg_advisory_xact_lock(hashtext('audit.ensure_partitions'));
    FOR kind IN
        SELECT k.*
        FROM audit.partitioned_by_time() AS k JOIN audit.default_partition_rows() AS d ON d.parent = k.parent
    LOOP
        SELECT partdefid::REGCLASS INTO STRICT rest FROM pg_partitioned_table WHERE partrelid = kind.parent;
        PERFORM audit.with_brief_locks(format('ALTER TABLE %s DETACH PARTITION %s', kind.parent, rest));
        FOR moment IN
            EXECUTE format('SELECT DISTINCT date_trunc(%L, %I) FROM %s', kind.unit, kind.key_column, rest)
        LOOP
            SELECT * INTO STRICT new_one FROM audit.make_range(kind.parent, moment);
            IF new_one.made IS NULL THEN
                RAISE EXCEPTION 'the partition of % that begins at % is there, but not attached', kind.parent, moment;
            END IF;
            EXECUTE format(
                'INSERT INTO %s SELECT * FROM %s WHERE %I >= %L AND %I < %L', new_one.made, rest,
                kind.key_column, new_one.lower_bound, kind.key_column, new_one.upper_bound
            );
            GET DIAGNOSTICS copied = ROW_COUNT;
            EXECUTE format(
                'DELETE FROM %s WHERE %I >= %L AND %I < %L', rest,
                kind.key_column, new_one.lower_bound, kind.key_column, new_one.upper_bound
            );
            GET DIAGNOSTICS deleted = ROW_COUNT;
            IF copied <> deleted OR copied = 0 THEN
                RAISE EXCEPTION 'copied % rows but removed %', copied, deleted;
            END IF;
            EXECUTE format(
                'ALTER TABLE %s ATTACH PARTITION %s FOR VALUES FROM (%L) TO (%L)',
                kind.parent, new_one.made, new_one.lower_bound, new_one.upper_bound
            );
            moved := moved + copied;
        END LOOP;
        EXECUTE format('ALTER TABLE %s ATTACH PARTITION %s DEFAULT', kind.parent, rest);
    END LOOP;
    RETURN moved;
END;
$$;

REVOKE ALL ON FUNCTION
    audit.partitioned_by_time(), audit.make_like(REGCLASS, TEXT), audit.with_brief_locks(TEXT),
    audit.make_range(REGCLASS, TIMESTAMPTZ), audit.ensure_range(TIMESTAMPTZ, TIMESTAMPTZ),
    audit.ensure_partitions(INTERVAL), audit.default_partition_rows(), audit.drain_default()
    FROM PUBLIC;
GRANT EXECUTE ON FUNCTION audit.ensure_partitions(INTERVAL), audit.drain_default() TO job_runner;
GRANT EXECUTE ON FUNCTION audit.default_partition_rows() TO job_runner, admin_users, auditor_users;

ALTER FUNCTION audit.partitioned_by_time() OWNER TO kms_partitions;
ALTER FUNCTION audit.make_like(REGCLASS, TEXT) OWNER TO kms_partitions;
ALTER FUNCTION audit.with_brief_locks(TEXT) OWNER TO kms_partitions;
ALTER FUNCTION audit.make_range(REGCLASS, TIMESTAMPTZ) OWNER TO kms_partitions;
ALTER FUNCTION audit.ensure_range(TIMESTAMPTZ, TIMESTAMPTZ) OWNER TO kms_partitions;
ALTER FUNCTION audit.ensure_partitions(INTERVAL) OWNER TO kms_partitions;
ALTER FUNCTION audit.default_partition_rows() OWNER TO kms_partitions;
ALTER FUNCTION audit.drain_default() OWNER TO kms_partitions;

-- As their owner, so that the partitions are his too.
SET LOCAL ROLE kms_partitions;
DO $$
DECLARE
    kind RECORD;
    made REGCLASS;
BEGIN
    FOR kind IN SELECT parent, relname FROM audit.partitioned_by_time() JOIN pg_class ON oid = parent LOOP
        made := audit.make_like(kind.parent, kind.relname || '_default');
        EXECUTE format('ALTER TABLE %s ATTACH PARTITION %s DEFAULT', kind.parent, made);
    END LOOP;
    PERFORM audit.ensure_range(
        '2024-01-01 00:00:00+00', date_trunc('year', now(), 'UTC') + INTERVAL '3 years' - INTERVAL '1 day'
    );
END $$;
RESET ROLE;
