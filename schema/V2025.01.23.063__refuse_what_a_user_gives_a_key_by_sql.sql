-- What a user could give a key of his by SQL: the token object of another, and the name of a predecessor.

-- Two rows with one object of the token: when one falls due, the other loses it. Locks the table for as long as its RESIDENT keys
-- take to sort; a table with two such rows is refused, and somebody must look at them.
-- squawk-ignore require-concurrent-index-creation
CREATE UNIQUE INDEX keys_of_one_token_object ON cryptography.keys (hsm_key_id)
    WHERE hsm_key_id IS NOT NULL AND destroyed_at IS NULL;

-- name@n is what a predecessor is called when its successor takes the name. A function of a definer role will do that.
CREATE FUNCTION cryptography.refuse_name_of_a_predecessor() RETURNS TRIGGER
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RAISE EXCEPTION 'a name with @ is that of a key that was superseded, and is not given'
        USING ERRCODE = 'check_violation', CONSTRAINT = 'name_of_a_predecessor';
END;
$$;
REVOKE ALL ON FUNCTION cryptography.refuse_name_of_a_predecessor() FROM PUBLIC;
CREATE TRIGGER tr_keys_refuse_new_name
    BEFORE INSERT ON cryptography.keys
    FOR EACH ROW WHEN (current_user = 'authenticated_users' AND NEW.key_name LIKE '%@%')
    EXECUTE FUNCTION cryptography.refuse_name_of_a_predecessor();
CREATE TRIGGER tr_keys_refuse_other_name
    BEFORE UPDATE OF key_name ON cryptography.keys
    FOR EACH ROW WHEN (
        current_user = 'authenticated_users' AND NEW.key_name <> OLD.key_name AND NEW.key_name LIKE '%@%'
    )
    EXECUTE FUNCTION cryptography.refuse_name_of_a_predecessor();
