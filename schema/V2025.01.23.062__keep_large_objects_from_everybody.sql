-- By default everybody may make large objects, and owns them: the service's login would own something, and a backup by
-- backup_user, who may not read it, would fail. They take a superuser to forbid; without one this is left out with a notice,
-- and schema/bootstrap.sql does it.

DO $$
DECLARE
    function_name REGPROCEDURE;
BEGIN
    IF NOT (SELECT rolsuper FROM pg_catalog.pg_roles WHERE rolname = current_user) THEN
        RAISE NOTICE 'large objects take a superuser to forbid: run schema/bootstrap.sql';
        RETURN;
    END IF;
    FOR function_name IN
        SELECT oid FROM pg_catalog.pg_proc
        WHERE pronamespace = 'pg_catalog'::REGNAMESPACE AND proname ~ '^(lo_.*|loread|lowrite)$'
    LOOP
        EXECUTE format('REVOKE ALL ON FUNCTION %s FROM PUBLIC', function_name);
    END LOOP;
END $$;
