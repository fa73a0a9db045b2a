-- Prepares a database to be migrated by a role that is no superuser. A superuser runs it once, in the new database:
--     createdb kms && psql -1 -d kms -f schema/bootstrap.sql && psql -d kms -c '\password kms_migrator'
-- It makes what takes a superuser too: the logins of backups and of a standby, the extensions, the right to statistics, and that
-- nobody makes large objects. The migrations use these, and do without what is missing. It can be run again.

DO $$
DECLARE
    name TEXT;
    wanted_name TEXT;
    function_name REGPROCEDURE;
BEGIN
    IF to_regrole('kms_migrator') IS NULL THEN
        CREATE ROLE kms_migrator LOGIN CREATEROLE NOSUPERUSER NOCREATEDB NOREPLICATION NOBYPASSRLS;
    END IF;

    -- Roles that a migration of another database of this cluster has made are another's: give it the use of them.
    FOREACH name IN ARRAY ARRAY[
        'authenticated_users', 'admin_users', 'auditor_users', 'job_runner', 'kms_login', 'kms_lifecycle', 'kms_ledger',
        'kms_service'
    ] LOOP
        IF to_regrole(name) IS NOT NULL THEN
            EXECUTE format('GRANT %I TO kms_migrator WITH ADMIN TRUE, INHERIT FALSE, SET TRUE', name);
        END IF;
    END LOOP;
    IF to_regrole('kms_partitions') IS NOT NULL THEN
        GRANT kms_partitions TO kms_migrator WITH ADMIN TRUE, INHERIT TRUE, SET TRUE;
    END IF;

    IF to_regrole('backup_user') IS NULL THEN
        CREATE ROLE backup_user LOGIN BYPASSRLS NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION;
    END IF;
    IF to_regrole('replication_user') IS NULL THEN
        CREATE ROLE replication_user LOGIN REPLICATION NOSUPERUSER NOCREATEDB NOCREATEROLE NOBYPASSRLS;
    END IF;
    GRANT pg_read_all_stats TO kms_migrator WITH ADMIN TRUE, INHERIT FALSE, SET FALSE; -- for migration 012 to pass on
    FOREACH wanted_name IN ARRAY ARRAY['pgcrypto', 'uuid-ossp', 'pg_stat_statements'] LOOP
        IF EXISTS (SELECT FROM pg_available_extensions AS e WHERE e.name = wanted_name) THEN
            EXECUTE format('CREATE EXTENSION IF NOT EXISTS %I WITH SCHEMA public', wanted_name);
        END IF;
    END LOOP;

    -- As migration 062 does where a superuser runs it.
    FOR function_name IN
        SELECT oid FROM pg_catalog.pg_proc
        WHERE pronamespace = 'pg_catalog'::REGNAMESPACE AND proname ~ '^(lo_.*|loread|lowrite)$'
    LOOP
        EXECUTE format('REVOKE ALL ON FUNCTION %s FROM PUBLIC', function_name);
    END LOOP;

    -- The owner may make schemas, trusted extensions, and say who connects.
    EXECUTE format('ALTER DATABASE %I OWNER TO kms_migrator', current_database());
END $$;
