-- For later migrations: additions that may be there already. Types, defaults and columns are SQL, put into the statement as
-- they are: whoever may call these may run anything that he may anyway. So nobody is granted either.

-- Add a column unless the table has one of that name. Raises datatype_mismatch if that one has another type.
CREATE FUNCTION public.safe_add_column(
    schema_name TEXT, table_name TEXT, column_name TEXT, column_type TEXT, default_value TEXT DEFAULT NULL
) RETURNS VOID
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    relation CONSTANT REGCLASS := format('%I.%I', schema_name, table_name)::REGCLASS;
    found TEXT;
BEGIN
    SELECT format_type(a.atttypid, a.atttypmod) INTO found
    FROM pg_attribute AS a
    WHERE a.attrelid = relation AND a.attname = column_name AND a.attnum > 0 AND NOT a.attisdropped;
    IF found IS NULL THEN
        EXECUTE format(
            'ALTER TABLE %s ADD COLUMN %I %s%s', relation, column_name, column_type, coalesce(' DEFAULT ' || default_value, '')
        );
    ELSIF to_regtype(column_type) IS NOT NULL AND to_regtype(column_type) <> to_regtype(found) THEN
        RAISE EXCEPTION 'column % of % is there, but is %, not %', column_name, relation, found, column_type
            USING ERRCODE = 'datatype_mismatch';
    END IF;
END;
$$;

-- Create an index unless there is one of that name. Raises duplicate_object if that one belongs to another table, or is not
-- what would be created: both are compared as PostgreSQL writes them down.
CREATE FUNCTION public.safe_create_index(
    schema_name TEXT, index_name TEXT, table_name TEXT, columns TEXT, unique_index BOOLEAN DEFAULT FALSE
) RETURNS VOID
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    relation CONSTANT REGCLASS := format('%I.%I', schema_name, table_name)::REGCLASS;
    existing CONSTANT REGCLASS := to_regclass(format('%I.%I', schema_name, index_name));
    kind CONSTANT TEXT := CASE WHEN unique_index THEN 'UNIQUE INDEX' ELSE 'INDEX' END;
    there RECORD;
    wanted TEXT;
BEGIN
    IF existing IS NULL THEN
        EXECUTE format('CREATE %s %I ON %s (%s)', kind, index_name, relation, columns);
        RETURN;
    END IF;
    EXECUTE format('CREATE TEMP TABLE safe_create_index_probe (LIKE %s) ON COMMIT DROP', relation);
    EXECUTE format('CREATE %s safe_create_index_probe_index ON pg_temp.safe_create_index_probe (%s)', kind, columns);
    wanted := substring(pg_get_indexdef('pg_temp.safe_create_index_probe_index'::REGCLASS) FROM ' USING .*');
    DROP TABLE pg_temp.safe_create_index_probe;
    SELECT i.indrelid = relation AS on_it, i.indisunique, i.indisvalid, substring(pg_get_indexdef(existing) FROM ' USING .*') AS text
    INTO there
    FROM pg_index AS i
    WHERE i.indexrelid = existing;
    IF NOT FOUND OR NOT there.on_it OR NOT there.indisvalid OR there.indisunique <> unique_index OR there.text <> wanted THEN
        RAISE EXCEPTION '%.% is there, but is not on % as%', schema_name, index_name, relation, wanted
            USING ERRCODE = 'duplicate_object';
    END IF;
END;
$$;

REVOKE ALL ON FUNCTION
    public.safe_add_column(TEXT, TEXT, TEXT, TEXT, TEXT), public.safe_create_index(TEXT, TEXT, TEXT, TEXT, BOOLEAN)
    FROM PUBLIC;
