-- To attach a partition takes locks that last to the end of the transaction: on DEFAULT, for which who reads the whole trail waits,
-- and on authentication.users, which no one changes meanwhile. One partition each time, they are gone in some milliseconds.

SET LOCAL ROLE kms_partitions; -- only its owner replaces a function

-- Make one of the partitions that are missing from now until *ahead* of now, at most ten years, and return its name; no row where
-- none is missing any more. A range of which DEFAULT has rows is left out; the call that makes nothing warns of it:
-- drain_default() makes it.
CREATE OR REPLACE FUNCTION audit.ensure_partitions(ahead INTERVAL DEFAULT '2 years') RETURNS SETOF REGCLASS
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET timezone = 'UTC' SET datestyle = 'ISO'
AS $$
DECLARE
    kind RECORD;
    moment TIMESTAMPTZ;
    new_one RECORD;
    left_out TEXT[] := '{}';
    told TEXT;
BEGIN
    IF ahead IS NULL OR ahead < INTERVAL '0' OR ahead > INTERVAL '10 years' THEN
        RAISE EXCEPTION 'expected an interval from 0 to 10 years, not %', ahead USING ERRCODE = 'invalid_parameter_value';
    END IF;
    PERFORM pg_advisory_xact_lock(hashtext('audit.ensure_partitions'));
    FOR kind IN SELECT * FROM audit.partitioned_by_time() LOOP
        FOR moment IN
            SELECT generate_series(
                date_trunc(kind.unit, clock_timestamp()), clock_timestamp() + ahead, ('1 ' || kind.unit)::INTERVAL
            )
        LOOP
            BEGIN
                SELECT * INTO STRICT new_one FROM audit.make_range(kind.parent, moment);
                CONTINUE WHEN new_one.made IS NULL;
                PERFORM audit.with_brief_locks(format(
                    'ALTER TABLE %s ATTACH PARTITION %s FOR VALUES FROM (%L) TO (%L)',
                    kind.parent, new_one.made, new_one.lower_bound, new_one.upper_bound
                ));
                RETURN NEXT new_one.made;
                RETURN;
            EXCEPTION WHEN check_violation THEN
                left_out := left_out || format('the DEFAULT partition of %s has rows from %s on', kind.parent, moment);
            END;
        END LOOP;
    END LOOP;
    FOREACH told IN ARRAY left_out LOOP
        RAISE WARNING '%', told USING HINT = 'Run audit.drain_default().';
    END LOOP;
END;
$$;

RESET ROLE;
