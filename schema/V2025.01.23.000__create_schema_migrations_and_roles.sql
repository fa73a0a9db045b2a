-- The record of migrations, and the roles of the service. README.md in this directory gives the matrix of their rights.

CREATE TABLE public.schema_migrations (
    version VARCHAR(20) PRIMARY KEY,
    applied_at TIMESTAMPTZ DEFAULT NOW(),
    description TEXT,
    script_name VARCHAR(255),
    checksum VARCHAR(64)
);

-- Roles belong to the cluster: they may exist already, made for another database, or be made for one at this very moment.
-- A role that exists with more power than it should have is refused, not changed: someone gave it that power.
DO $$
DECLARE
    wanted RECORD;
    found pg_catalog.pg_roles;
BEGIN
    FOR wanted IN
        SELECT *
        FROM (VALUES
            ('authenticated_users', FALSE), -- a user of the service, who is named in app.user_id
            ('admin_users', FALSE),         -- manages users, never uses their keys
            ('auditor_users', FALSE),       -- reads the trail and nothing else
            ('job_runner', FALSE),          -- the service itself, for nobody
            ('kms_login', FALSE),           -- owns the functions that run before the caller is known
            ('kms_lifecycle', FALSE),       -- owns the functions that change the standing of users and keys
            ('kms_ledger', FALSE),          -- owns the functions that append to the trail
            ('kms_partitions', FALSE),      -- owns the tables that get partitions with time, and the functions that make them
            ('kms_service', TRUE)           -- logs in; owns nothing
        ) AS role (name, may_log_in)
    LOOP
        BEGIN
            IF pg_catalog.to_regrole(wanted.name) IS NULL THEN
                EXECUTE format(
                    'CREATE ROLE %I %s NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION NOBYPASSRLS NOINHERIT',
                    wanted.name, CASE WHEN wanted.may_log_in THEN 'LOGIN' ELSE 'NOLOGIN' END
                );
            END IF;
        EXCEPTION WHEN duplicate_object OR unique_violation THEN
            NULL; -- another migration made it first
        END;
        SELECT * INTO STRICT found FROM pg_catalog.pg_roles WHERE rolname = wanted.name;
        IF found.rolsuper OR found.rolcreaterole OR found.rolcreatedb OR found.rolreplication OR found.rolbypassrls
            OR found.rolcanlogin <> wanted.may_log_in
        THEN
            RAISE EXCEPTION 'role % exists with other attributes than it should have', wanted.name
                USING HINT = 'It must be NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION NOBYPASSRLS; only kms_service logs in.';
        END IF;
    END LOOP;
END $$;

-- INHERIT FALSE: with the default the service would see every row without ever naming a user.
DO $$
DECLARE
    name TEXT;
BEGIN
    FOREACH name IN ARRAY ARRAY['authenticated_users', 'admin_users', 'auditor_users', 'job_runner'] LOOP
        IF NOT EXISTS (
            SELECT FROM pg_catalog.pg_auth_members
            WHERE roleid = to_regrole(name) AND member = to_regrole('kms_service') AND set_option AND NOT inherit_option
        ) THEN
            BEGIN
                EXECUTE format('GRANT %I TO kms_service WITH INHERIT FALSE, SET TRUE', name);
            EXCEPTION WHEN unique_violation THEN
                NULL; -- another migration granted it first
            END;
        END IF;
    END LOOP;
    IF EXISTS (
        SELECT FROM pg_catalog.pg_auth_members
        WHERE member = to_regrole('kms_service')
            AND (inherit_option OR admin_option OR roleid <> ALL (ARRAY[
                to_regrole('authenticated_users'), to_regrole('admin_users'), to_regrole('auditor_users'), to_regrole('job_runner')
            ]::OID[]))
    ) THEN
        RAISE EXCEPTION 'kms_service is a member of more roles than it should be, or inherits from one';
    END IF;
END $$;

-- To hand functions over to a definer role the migrating role must be able to become it. A superuser is already.
-- Of kms_partitions it inherits, to change in later migrations the tables that belong to that role.
DO $$
DECLARE
    name TEXT;
BEGIN
    FOREACH name IN ARRAY ARRAY['kms_login', 'kms_lifecycle', 'kms_ledger'] LOOP
        IF NOT pg_catalog.pg_has_role(current_user, name, 'SET') THEN
            EXECUTE format('GRANT %I TO CURRENT_USER WITH INHERIT FALSE, SET TRUE', name);
        END IF;
    END LOOP;
    IF NOT pg_catalog.pg_has_role(current_user, 'kms_partitions', 'USAGE')
        OR NOT pg_catalog.pg_has_role(current_user, 'kms_partitions', 'SET')
    THEN
        GRANT kms_partitions TO CURRENT_USER WITH INHERIT TRUE, SET TRUE;
    END IF;
END $$;

-- By default everyone may connect to every database and make temporary tables in it, and execute every new function.
DO $$
BEGIN
    EXECUTE format('REVOKE ALL ON DATABASE %I FROM PUBLIC', current_database());
    EXECUTE format('GRANT CONNECT ON DATABASE %I TO kms_service', current_database());
END $$;
REVOKE CREATE ON SCHEMA public FROM PUBLIC;
ALTER DEFAULT PRIVILEGES REVOKE EXECUTE ON FUNCTIONS FROM PUBLIC;

-- The service asks whether the schema is the one that it was written for.
GRANT SELECT ON public.schema_migrations TO job_runner;
