-- A CreateKey that is repeated answers with the key that was made: its id is kept in the transaction that stores it.

-- Keep the answer of a request of the user for whom the transaction acts. False, and nothing is kept, where an answer of less
-- than 24 hours ago is there. No use is charged with it, so event_id names no row of the trail.
CREATE FUNCTION cryptography.keep_answer(answered_rpc TEXT, answered_request_id TEXT, answered_body_mac BYTEA, answer BYTEA)
RETURNS BOOLEAN
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    INSERT INTO cryptography.request_records AS known (user_id, rpc, request_id, body_mac, result, event_id, created_at)
    VALUES (
        authentication.current_user_id(), answered_rpc, answered_request_id, answered_body_mac, answer, gen_random_uuid(),
        clock_timestamp()
    )
    ON CONFLICT (user_id, rpc, request_id) DO UPDATE
    SET body_mac = excluded.body_mac, result = excluded.result, event_id = excluded.event_id, created_at = excluded.created_at
    WHERE known.created_at <= clock_timestamp() - INTERVAL '24 hours';
    RETURN FOUND;
END;
$$;
REVOKE ALL ON FUNCTION cryptography.keep_answer(TEXT, TEXT, BYTEA, BYTEA) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION cryptography.keep_answer(TEXT, TEXT, BYTEA, BYTEA) TO authenticated_users;

GRANT CREATE ON SCHEMA cryptography TO kms_ledger;
ALTER FUNCTION cryptography.keep_answer(TEXT, TEXT, BYTEA, BYTEA) OWNER TO kms_ledger;
REVOKE CREATE ON SCHEMA cryptography FROM kms_ledger;
