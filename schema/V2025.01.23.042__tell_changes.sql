-- Whoever remembers a key or a user is told when it changes, on the channel kms_changed: which it is, and its id. Told when the
-- change commits. Not of a charge: telling takes a lock of the whole server for the time of the commit.

CREATE FUNCTION public.tell_change() RETURNS TRIGGER
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM pg_notify('kms_changed', TG_ARGV[0] || ' ' || OLD.id);
    RETURN NULL;
END;
$$;
REVOKE ALL ON FUNCTION public.tell_change() FROM PUBLIC;

CREATE TRIGGER tr_keys_tell_change
    AFTER UPDATE ON cryptography.keys
    FOR EACH ROW WHEN (OLD.version <> NEW.version)
    EXECUTE FUNCTION public.tell_change('key');
-- Roles and grants are told by the version, which advances with them.
CREATE TRIGGER tr_users_tell_change
    AFTER UPDATE ON authentication.users
    FOR EACH ROW WHEN (
        (OLD.version, OLD.username, OLD.locked_until, OLD.deleted_at)
        IS DISTINCT FROM (NEW.version, NEW.username, NEW.locked_until, NEW.deleted_at)
    )
    EXECUTE FUNCTION public.tell_change('user');
