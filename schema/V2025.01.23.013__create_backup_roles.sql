-- The logins of pg_dump and of a standby. Both take a superuser to make; without one they are left out with a notice, and
-- schema/bootstrap.sql makes them beforehand. They have no password until one is set.
--
-- backup_user bypasses row security: without that pg_dump fails, or dumps empty tables. It reads everything and writes nothing.

DO $$
DECLARE
    wanted RECORD;
BEGIN
    FOR wanted IN
        SELECT *
        FROM (VALUES ('backup_user', 'BYPASSRLS NOREPLICATION'), ('replication_user', 'REPLICATION NOBYPASSRLS')) AS role (name, power)
    LOOP
        BEGIN
            IF to_regrole(wanted.name) IS NULL THEN
                EXECUTE format('CREATE ROLE %I LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE %s', wanted.name, wanted.power);
            END IF;
        EXCEPTION
            WHEN duplicate_object OR unique_violation THEN
                NULL; -- another migration made it first
            WHEN insufficient_privilege THEN
                RAISE NOTICE 'role % takes a superuser to make: run schema/bootstrap.sql', wanted.name;
        END;
    END LOOP;
    IF EXISTS (
        SELECT FROM pg_catalog.pg_roles
        WHERE rolname IN ('backup_user', 'replication_user') AND (
            rolsuper OR rolcreatedb OR rolcreaterole OR NOT rolcanlogin
            OR rolbypassrls <> (rolname = 'backup_user') OR rolreplication <> (rolname = 'replication_user')
        )
    ) THEN
        RAISE EXCEPTION 'backup_user or replication_user exists with other attributes than it should have'
            USING HINT = 'schema/V2025.01.23.013__create_backup_roles.sql says which.';
    END IF;
END $$;

-- Partitions too: pg_dump reads each by itself. What will be made later is granted as it is made.
DO $$
DECLARE
    schema_name TEXT;
BEGIN
    IF to_regrole('backup_user') IS NULL THEN
        RETURN;
    END IF;
    EXECUTE format('GRANT CONNECT ON DATABASE %I TO backup_user', current_database());
    FOREACH schema_name IN ARRAY ARRAY[
        'public', 'authentication', 'cryptography', 'blockchain', 'configuration', 'audit', 'monitoring'
    ] LOOP
        EXECUTE format('GRANT USAGE ON SCHEMA %I TO backup_user', schema_name);
        EXECUTE format('GRANT SELECT ON ALL TABLES IN SCHEMA %I TO backup_user', schema_name);
        EXECUTE format('GRANT SELECT ON ALL SEQUENCES IN SCHEMA %I TO backup_user', schema_name);
        EXECUTE format('ALTER DEFAULT PRIVILEGES IN SCHEMA %I GRANT SELECT ON TABLES TO backup_user', schema_name);
        EXECUTE format('ALTER DEFAULT PRIVILEGES IN SCHEMA %I GRANT SELECT ON SEQUENCES TO backup_user', schema_name);
    END LOOP;
    ALTER DEFAULT PRIVILEGES FOR ROLE kms_partitions IN SCHEMA audit GRANT SELECT ON TABLES TO backup_user;
END $$;
