-- squawk-ignore-file adding-foreign-key-constraint
-- ACME (RFC 8555): accounts of clients that get server certificates by themselves, and their orders.
--
--   create_acme_account ──► pending ──► valid ──► deactivated      (change_acme_account)
--   add_acme_order ──► an order with its authorizations            (change_acme_order; forget_acme where it ended)
--
-- The service makes record_mac of each row before SQL changes it, and believes no row without it. So a function changes nothing but
-- what the service has read: it compares the version, and answers STALE otherwise.

CREATE TABLE cryptography.acme_accounts (
    id UUID PRIMARY KEY, -- also the key id of the external account binding
    authority TEXT COLLATE "C" NOT NULL, -- the name, whatever its generation
    user_id UUID NOT NULL REFERENCES authentication.users (id) ON DELETE RESTRICT, -- for whom certificates are issued
    status TEXT NOT NULL CONSTRAINT acme_account_status CHECK (status IN ('pending', 'valid', 'deactivated')),
    jwk TEXT NOT NULL DEFAULT '', -- the public key of the client, as RFC 7638 spells it
    thumbprint TEXT COLLATE "C", -- of jwk; NULL while pending
    contacts TEXT [] NOT NULL DEFAULT '{}',
    created_at TIMESTAMPTZ NOT NULL,
    bind_before TIMESTAMPTZ NOT NULL, -- until when a client may take a pending account
    version BIGINT NOT NULL CONSTRAINT acme_account_version_positive CHECK (version > 0),
    record_mac BYTEA NOT NULL CONSTRAINT acme_account_mac_size CHECK (octet_length(record_mac) = 32),
    CONSTRAINT acme_account_of_a_key UNIQUE (authority, thumbprint),
    CONSTRAINT acme_account_has_a_key CHECK ((jwk = '') = (thumbprint IS NULL) AND (status <> 'valid' OR jwk <> ''))
);
CREATE INDEX idx_acme_accounts_user ON cryptography.acme_accounts (user_id, created_at DESC, id DESC);

CREATE TABLE cryptography.acme_orders (
    id UUID PRIMARY KEY,
    account_id UUID NOT NULL REFERENCES cryptography.acme_accounts (id) ON DELETE RESTRICT,
    content TEXT NOT NULL, -- authorizations, request and errors in JSON
    certificate_id UUID REFERENCES cryptography.certificates (id) ON DELETE RESTRICT, -- NULL until it is issued
    created_at TIMESTAMPTZ NOT NULL,
    expires_at TIMESTAMPTZ NOT NULL, -- with a certificate, its end
    version BIGINT NOT NULL CONSTRAINT acme_order_version_positive CHECK (version > 0),
    record_mac BYTEA NOT NULL CONSTRAINT acme_order_mac_size CHECK (octet_length(record_mac) = 32)
);
CREATE INDEX idx_acme_orders_account ON cryptography.acme_orders (account_id, created_at DESC, id DESC);
CREATE INDEX idx_acme_orders_certificate ON cryptography.acme_orders (certificate_id) WHERE certificate_id IS NOT NULL;
CREATE INDEX idx_acme_orders_expires_at ON cryptography.acme_orders (expires_at);

-- Nonces of requests that were accepted. A nonce itself proves when it was made, so a row is kept no longer than the nonce is good.
CREATE TABLE cryptography.acme_nonces (
    nonce BYTEA PRIMARY KEY CONSTRAINT acme_nonce_size CHECK (octet_length(nonce) BETWEEN 16 AND 64),
    expires_at TIMESTAMPTZ NOT NULL
);
CREATE INDEX idx_acme_nonces_expires_at ON cryptography.acme_nonces (expires_at);

ALTER TABLE cryptography.acme_accounts ENABLE ROW LEVEL SECURITY;
ALTER TABLE cryptography.acme_accounts FORCE ROW LEVEL SECURITY;
ALTER TABLE cryptography.acme_orders ENABLE ROW LEVEL SECURITY;
ALTER TABLE cryptography.acme_orders FORCE ROW LEVEL SECURITY;
ALTER TABLE cryptography.acme_nonces ENABLE ROW LEVEL SECURITY;
ALTER TABLE cryptography.acme_nonces FORCE ROW LEVEL SECURITY;

CREATE POLICY acme_accounts_owner_read ON cryptography.acme_accounts
    FOR SELECT TO authenticated_users
    USING (user_id = (SELECT authentication.current_user_id()));
CREATE POLICY acme_accounts_service_read ON cryptography.acme_accounts
    FOR SELECT TO job_runner
    USING (TRUE);
CREATE POLICY acme_accounts_lifecycle ON cryptography.acme_accounts
    FOR ALL TO kms_lifecycle
    USING (TRUE)
    WITH CHECK (TRUE);
CREATE POLICY acme_orders_service_read ON cryptography.acme_orders
    FOR SELECT TO job_runner
    USING (TRUE);
CREATE POLICY acme_orders_lifecycle ON cryptography.acme_orders
    FOR ALL TO kms_lifecycle
    USING (TRUE)
    WITH CHECK (TRUE);
CREATE POLICY acme_nonces_lifecycle ON cryptography.acme_nonces
    FOR ALL TO kms_lifecycle
    USING (TRUE)
    WITH CHECK (TRUE);
GRANT SELECT ON cryptography.acme_accounts TO authenticated_users, job_runner;
GRANT SELECT ON cryptography.acme_orders TO job_runner;
GRANT SELECT, INSERT ON cryptography.acme_accounts TO kms_lifecycle;
GRANT UPDATE (status, jwk, thumbprint, contacts, version, record_mac) ON cryptography.acme_accounts TO kms_lifecycle;
GRANT SELECT, INSERT, DELETE ON cryptography.acme_orders, cryptography.acme_nonces TO kms_lifecycle;
GRANT UPDATE (content, certificate_id, expires_at, version, record_mac) ON cryptography.acme_orders TO kms_lifecycle;

GRANT CREATE ON SCHEMA cryptography TO kms_lifecycle;
SET LOCAL ROLE kms_lifecycle;

-- Store a new account for the user for whom the transaction acts, who is at user_version. Raises
-- invalid_authorization_specification for a user who is not in good standing.
CREATE FUNCTION cryptography.create_acme_account(account JSONB, user_version INTEGER, request_id TEXT, peer TEXT) RETURNS VOID
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    made CONSTANT cryptography.acme_accounts := jsonb_populate_record(NULL::cryptography.acme_accounts, account);
BEGIN
    PERFORM cryptography.check_standing(user_version);
    IF made.user_id <> authentication.current_user_id() OR made.version <> 1 OR made.status <> 'pending' THEN
        RAISE EXCEPTION 'not a new account of this user' USING ERRCODE = 'check_violation';
    END IF;
    INSERT INTO cryptography.acme_accounts SELECT made.*;
    PERFORM cryptography.record_certificate_event(
        'acme.account_created', 'high', 'acme_account', made.id, request_id, peer, jsonb_build_object('authority', made.authority)
    );
END;
$$;

-- Change an account that is at expected_version: account holds the columns that may change, and its MAC. For the user for whom the
-- transaction acts, who owns it and is at user_version; where it acts for nobody, for the client that has the account's key. Returns
-- 'OK', or 'STALE' also for an account that the user does not own, or 'TAKEN' where another account of the authority has the key.
CREATE FUNCTION cryptography.change_acme_account(
    changed UUID, expected_version BIGINT, account JSONB, event TEXT, user_version INTEGER, request_id TEXT, peer TEXT
) RETURNS TEXT
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    made CONSTANT cryptography.acme_accounts := jsonb_populate_record(NULL::cryptography.acme_accounts, account);
    acting_user CONSTANT UUID := authentication.current_user_id();
BEGIN
    IF acting_user IS NOT NULL THEN
        PERFORM cryptography.check_standing(user_version);
    END IF;
    BEGIN
        UPDATE cryptography.acme_accounts AS a
        SET status = made.status, jwk = made.jwk, thumbprint = made.thumbprint, contacts = made.contacts,
            version = expected_version + 1, record_mac = made.record_mac
        WHERE a.id = changed AND a.version = expected_version AND (acting_user IS NULL OR a.user_id = acting_user);
    EXCEPTION WHEN unique_violation THEN
        RETURN 'TAKEN';
    END;
    IF NOT FOUND THEN
        RETURN 'STALE';
    END IF;
    PERFORM cryptography.record_certificate_event(
        event, 'medium', 'acme_account', changed, request_id, peer, jsonb_build_object('thumbprint', made.thumbprint)
    );
    RETURN 'OK';
END;
$$;

-- Store a new order of an account. Returns 'OK', or 'CROWDED' where the account made orders_max orders within so many seconds.
CREATE FUNCTION cryptography.add_acme_order(
    new_order JSONB, orders_max INTEGER, seconds DOUBLE PRECISION, peer TEXT, details JSONB
) RETURNS TEXT
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    made CONSTANT cryptography.acme_orders := jsonb_populate_record(NULL::cryptography.acme_orders, new_order);
BEGIN
    -- Orders of one account come one after another, so that the count holds.
    PERFORM FROM cryptography.acme_accounts AS a WHERE a.id = made.account_id FOR NO KEY UPDATE;
    IF orders_max <= (
        SELECT count(*) FROM cryptography.acme_orders AS o
        WHERE o.account_id = made.account_id AND o.created_at > clock_timestamp() - make_interval(secs => seconds)
    ) THEN
        RETURN 'CROWDED';
    END IF;
    INSERT INTO cryptography.acme_orders SELECT made.*;
    PERFORM cryptography.record_certificate_event('acme.ordered', 'low', 'acme_order', made.id, '', peer, details);
    RETURN 'OK';
END;
$$;

-- Change an order that is at expected_version. event says what happened, NULL: nothing that the trail has. Returns 'OK' or 'STALE'.
CREATE FUNCTION cryptography.change_acme_order(
    changed UUID, expected_version BIGINT, new_order JSONB, event TEXT, details JSONB, peer TEXT
) RETURNS TEXT
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    made CONSTANT cryptography.acme_orders := jsonb_populate_record(NULL::cryptography.acme_orders, new_order);
BEGIN
    UPDATE cryptography.acme_orders AS o
    SET content = made.content, certificate_id = made.certificate_id, expires_at = made.expires_at,
        version = expected_version + 1, record_mac = made.record_mac
    WHERE o.id = changed AND o.version = expected_version;
    IF NOT FOUND THEN
        RETURN 'STALE';
    END IF;
    IF event IS NOT NULL THEN
        PERFORM cryptography.record_certificate_event(event, 'low', 'acme_order', changed, '', peer, details);
    END IF;
    RETURN 'OK';
END;
$$;

-- Use a nonce up. Returns FALSE for one that was used before.
CREATE FUNCTION cryptography.spend_acme_nonce(spent BYTEA, good_until TIMESTAMPTZ) RETURNS BOOLEAN
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    INSERT INTO cryptography.acme_nonces (nonce, expires_at) VALUES (spent, good_until) ON CONFLICT DO NOTHING;
    RETURN FOUND;
END;
$$;

-- Remove nonces that are good no longer, and orders that ended so many seconds ago; at most rows_max of each. Returns how many.
CREATE FUNCTION cryptography.forget_acme(seconds DOUBLE PRECISION, rows_max INTEGER) RETURNS INTEGER
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    nonces INTEGER;
    orders INTEGER;
BEGIN
    DELETE FROM cryptography.acme_nonces AS n
    WHERE n.nonce IN (SELECT e.nonce FROM cryptography.acme_nonces AS e WHERE e.expires_at < clock_timestamp() LIMIT rows_max);
    GET DIAGNOSTICS nonces = ROW_COUNT;
    DELETE FROM cryptography.acme_orders AS o
    WHERE o.id IN (
        SELECT e.id FROM cryptography.acme_orders AS e
        WHERE e.expires_at < clock_timestamp() - make_interval(secs => seconds)
        LIMIT rows_max
    );
    GET DIAGNOSTICS orders = ROW_COUNT;
    RETURN nonces + orders;
END;
$$;

RESET ROLE;
REVOKE ALL ON FUNCTION
    cryptography.create_acme_account(JSONB, INTEGER, TEXT, TEXT),
    cryptography.change_acme_account(UUID, BIGINT, JSONB, TEXT, INTEGER, TEXT, TEXT),
    cryptography.add_acme_order(JSONB, INTEGER, DOUBLE PRECISION, TEXT, JSONB),
    cryptography.change_acme_order(UUID, BIGINT, JSONB, TEXT, JSONB, TEXT),
    cryptography.spend_acme_nonce(BYTEA, TIMESTAMPTZ),
    cryptography.forget_acme(DOUBLE PRECISION, INTEGER)
    FROM PUBLIC;
GRANT EXECUTE ON FUNCTION cryptography.create_acme_account(JSONB, INTEGER, TEXT, TEXT) TO authenticated_users;
GRANT EXECUTE ON FUNCTION cryptography.change_acme_account(UUID, BIGINT, JSONB, TEXT, INTEGER, TEXT, TEXT)
    TO authenticated_users, job_runner;
GRANT EXECUTE ON FUNCTION
    cryptography.add_acme_order(JSONB, INTEGER, DOUBLE PRECISION, TEXT, JSONB),
    cryptography.change_acme_order(UUID, BIGINT, JSONB, TEXT, JSONB, TEXT),
    cryptography.spend_acme_nonce(BYTEA, TIMESTAMPTZ),
    cryptography.forget_acme(DOUBLE PRECISION, INTEGER)
    TO job_runner;
REVOKE CREATE ON SCHEMA cryptography FROM kms_lifecycle;
