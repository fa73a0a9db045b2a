-- The extensions that the specification names. One that the server does not have, or that takes a superuser to make, is left
-- out with a notice: bootstrap.sql makes them beforehand, and nothing of the service needs one.

-- For the moment PUBLIC gets what is new, so that the functions of an extension have the rights that its authors gave them.
ALTER DEFAULT PRIVILEGES GRANT EXECUTE ON FUNCTIONS TO PUBLIC;
DO $$
DECLARE
    wanted TEXT;
BEGIN
    FOREACH wanted IN ARRAY ARRAY['pgcrypto', 'uuid-ossp', 'pg_stat_statements'] LOOP
        IF NOT EXISTS (SELECT FROM pg_catalog.pg_available_extensions WHERE name = wanted) THEN
            RAISE NOTICE 'extension % is not in this server', wanted;
            CONTINUE;
        END IF;
        BEGIN
            EXECUTE format('CREATE EXTENSION IF NOT EXISTS %I WITH SCHEMA public', wanted);
        EXCEPTION WHEN insufficient_privilege THEN
            RAISE NOTICE 'extension % takes a superuser to make: run schema/bootstrap.sql', wanted;
        END;
    END LOOP;
END $$;
ALTER DEFAULT PRIVILEGES REVOKE EXECUTE ON FUNCTIONS FROM PUBLIC;

-- Nobody is granted either: a passphrase that is an argument of a statement can be seen in the activity of the server. They
-- are the specification's, for an operator. Raise undefined_function where pgcrypto is missing.
CREATE FUNCTION public.encrypt_sensitive_data(data TEXT, key TEXT) RETURNS TEXT
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN encode(public.pgp_sym_encrypt(data, key), 'base64');
END;
$$;

CREATE FUNCTION public.decrypt_sensitive_data(encrypted_data TEXT, key TEXT) RETURNS TEXT
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN public.pgp_sym_decrypt(decode(encrypted_data, 'base64'), key);
END;
$$;

REVOKE ALL ON FUNCTION public.encrypt_sensitive_data(TEXT, TEXT), public.decrypt_sensitive_data(TEXT, TEXT) FROM PUBLIC;
GRANT CREATE ON SCHEMA public TO kms_lifecycle;
ALTER FUNCTION public.encrypt_sensitive_data(TEXT, TEXT) OWNER TO kms_lifecycle;
ALTER FUNCTION public.decrypt_sensitive_data(TEXT, TEXT) OWNER TO kms_lifecycle;
REVOKE CREATE ON SCHEMA public FROM kms_lifecycle;
