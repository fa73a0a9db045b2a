-- Networks, the users' addresses on them, transactions, contracts and their invocations; who sees and changes what.

CREATE SCHEMA blockchain;
GRANT USAGE ON SCHEMA blockchain TO authenticated_users, admin_users, auditor_users, job_runner;

CREATE TABLE blockchain.networks (
    id UUID PRIMARY KEY DEFAULT gen_random_uuid(),
    name VARCHAR(50) UNIQUE NOT NULL,
    network_type VARCHAR(20) NOT NULL CHECK (network_type IN ('mainnet', 'testnet', 'private')),
    chain_id BIGINT,
    network_magic INTEGER,
    rpc_endpoints JSONB NOT NULL DEFAULT '[]',
    websocket_endpoints JSONB DEFAULT '[]',
    explorer_urls JSONB DEFAULT '[]',
    native_currency JSONB NOT NULL, -- {symbol, name, decimals}
    block_time_seconds INTEGER,
    confirmation_blocks INTEGER DEFAULT 6,
    is_active BOOLEAN DEFAULT TRUE,
    configuration JSONB DEFAULT '{}',
    created_at TIMESTAMPTZ DEFAULT NOW(),
    updated_at TIMESTAMPTZ DEFAULT NOW()
);

-- Their ids are constants, for the bounds of partitions are. Both networks are final after one block (dBFT).
INSERT INTO blockchain.networks (id, name, network_type, chain_id, network_magic, native_currency, confirmation_blocks)
VALUES
    (
        '6e656f00-006e-4033-8000-000000000001', 'neo-n3', 'mainnet', NULL, 860833102,
        '{"symbol": "GAS", "name": "GAS", "decimals": 8}', 1
    ),
    (
        '6e656f00-0078-4000-8000-000000000002', 'neo-x', 'mainnet', 47763, NULL,
        '{"symbol": "GAS", "name": "GAS", "decimals": 18}', 1
    );

CREATE TABLE blockchain.addresses (
    id UUID PRIMARY KEY DEFAULT gen_random_uuid(),
    user_id UUID NOT NULL REFERENCES authentication.users (id) ON DELETE RESTRICT,
    network_id UUID NOT NULL REFERENCES blockchain.networks (id),
    address VARCHAR(42) NOT NULL,
    address_type VARCHAR(20) DEFAULT 'standard' CHECK (address_type IN ('standard', 'multisig', 'contract')),
    key_id UUID,
    derivation_path VARCHAR(100),
    label VARCHAR(100),
    is_primary BOOLEAN DEFAULT FALSE,
    is_watch_only BOOLEAN DEFAULT FALSE,
    balance_cache JSONB DEFAULT '{}',
    last_balance_update TIMESTAMPTZ,
    created_at TIMESTAMPTZ DEFAULT NOW(),
    UNIQUE (network_id, address),
    FOREIGN KEY (key_id, user_id) REFERENCES cryptography.keys (id, user_id)
);
CREATE UNIQUE INDEX idx_addresses_one_primary ON blockchain.addresses (user_id, network_id) WHERE is_primary;

CREATE TABLE blockchain.transactions (
    id UUID DEFAULT gen_random_uuid(),
    network_id UUID NOT NULL REFERENCES blockchain.networks (id),
    -- who had it signed; NULL: only observed, for administrators and auditors to see
    user_id UUID REFERENCES authentication.users (id) ON DELETE RESTRICT,
    tx_hash VARCHAR(66) NOT NULL,
    tx_index INTEGER,
    block_number BIGINT,
    block_hash VARCHAR(66),
    block_timestamp TIMESTAMPTZ,
    from_address VARCHAR(42),
    to_address VARCHAR(42),
    value DECIMAL(78, 0),
    gas_limit BIGINT,
    gas_used BIGINT,
    gas_price DECIMAL(78, 0),
    nonce BIGINT,
    transaction_type VARCHAR(20) DEFAULT 'transfer',
    status VARCHAR(20) DEFAULT 'pending' CHECK (status IN ('pending', 'confirmed', 'failed', 'dropped')),
    confirmation_count INTEGER DEFAULT 0,
    raw_transaction JSONB,
    receipt JSONB,
    logs JSONB DEFAULT '[]',
    error_message TEXT,
    created_at TIMESTAMPTZ DEFAULT NOW(),
    confirmed_at TIMESTAMPTZ,
    PRIMARY KEY (id, network_id),
    UNIQUE (network_id, tx_hash),
    CONSTRAINT transaction_value_positive CHECK (value IS NULL OR value >= 0)
) PARTITION BY LIST (network_id);

CREATE TABLE blockchain.transactions_neo_n3 PARTITION OF blockchain.transactions
    FOR VALUES IN ('6e656f00-006e-4033-8000-000000000001');
CREATE TABLE blockchain.transactions_neo_x PARTITION OF blockchain.transactions
    FOR VALUES IN ('6e656f00-0078-4000-8000-000000000002');
CREATE TABLE blockchain.transactions_default PARTITION OF blockchain.transactions DEFAULT;

CREATE TABLE blockchain.smart_contracts (
    id UUID PRIMARY KEY DEFAULT gen_random_uuid(),
    network_id UUID NOT NULL REFERENCES blockchain.networks (id),
    contract_address VARCHAR(42) NOT NULL,
    contract_name VARCHAR(100),
    contract_symbol VARCHAR(20),
    decimals INTEGER,
    total_supply DECIMAL(78, 0),
    contract_type VARCHAR(50),
    abi JSONB,
    bytecode TEXT,
    source_code TEXT,
    compiler_version VARCHAR(50),
    deployment_tx_hash VARCHAR(66),
    deployer_address VARCHAR(42),
    is_verified BOOLEAN DEFAULT FALSE,
    is_proxy BOOLEAN DEFAULT FALSE,
    implementation_address VARCHAR(42),
    created_at TIMESTAMPTZ DEFAULT NOW(),
    deployed_at TIMESTAMPTZ,
    UNIQUE (network_id, contract_address),
    UNIQUE (id, network_id)
);

-- Both references carry the network: a contract is invoked by a transaction of its own.
CREATE TABLE blockchain.contract_invocations (
    id UUID PRIMARY KEY DEFAULT gen_random_uuid(),
    network_id UUID NOT NULL,
    contract_id UUID NOT NULL,
    transaction_id UUID NOT NULL,
    method_name VARCHAR(100),
    parameters JSONB DEFAULT '[]',
    return_value JSONB,
    execution_status VARCHAR(20) DEFAULT 'success' CHECK (execution_status IN ('success', 'failed', 'reverted')),
    gas_consumed BIGINT,
    events_emitted JSONB DEFAULT '[]',
    error_details TEXT,
    created_at TIMESTAMPTZ DEFAULT NOW(),
    FOREIGN KEY (contract_id, network_id) REFERENCES blockchain.smart_contracts (id, network_id),
    FOREIGN KEY (transaction_id, network_id) REFERENCES blockchain.transactions (id, network_id)
);

CREATE INDEX idx_addresses_user_network ON blockchain.addresses (user_id, network_id);
CREATE INDEX idx_addresses_network_address ON blockchain.addresses (network_id, address);
CREATE INDEX idx_transactions_network_hash ON blockchain.transactions (network_id, tx_hash);
CREATE INDEX idx_transactions_block ON blockchain.transactions (block_number DESC, tx_index);
CREATE INDEX idx_transactions_address_time ON blockchain.transactions (from_address, created_at DESC);
CREATE INDEX idx_transactions_to_address_time ON blockchain.transactions (to_address, created_at DESC);
CREATE INDEX idx_transactions_status ON blockchain.transactions (status, created_at);
CREATE INDEX idx_transactions_user_network_status_time ON blockchain.transactions
    (user_id, network_id, status, created_at DESC) WHERE user_id IS NOT NULL;
CREATE INDEX idx_pending_transactions ON blockchain.transactions (network_id, created_at DESC) WHERE status = 'pending';
-- Not in the specification: without it the policy below reads every invocation.
CREATE INDEX idx_contract_invocations_transaction ON blockchain.contract_invocations (transaction_id, network_id);

CREATE TRIGGER tr_networks_updated_at
    BEFORE UPDATE ON blockchain.networks
    FOR EACH ROW EXECUTE FUNCTION public.update_updated_at();

DO $$
DECLARE
    relation REGCLASS;
BEGIN
    FOREACH relation IN ARRAY ARRAY[
        'blockchain.networks', 'blockchain.addresses', 'blockchain.smart_contracts', 'blockchain.contract_invocations',
        'blockchain.transactions', 'blockchain.transactions_neo_n3', 'blockchain.transactions_neo_x',
        'blockchain.transactions_default'
    ]::REGCLASS[] LOOP
        EXECUTE format('ALTER TABLE %s ENABLE ROW LEVEL SECURITY', relation);
        EXECUTE format('ALTER TABLE %s FORCE ROW LEVEL SECURITY', relation);
    END LOOP;

    FOREACH relation IN ARRAY ARRAY[
        'blockchain.transactions', 'blockchain.transactions_neo_n3', 'blockchain.transactions_neo_x',
        'blockchain.transactions_default'
    ]::REGCLASS[] LOOP
        EXECUTE format(
            'CREATE POLICY transactions_own_data ON %s FOR SELECT TO authenticated_users
                 USING (user_id = authentication.current_user_id())', relation
        );
        EXECUTE format(
            'CREATE POLICY transactions_read ON %s FOR SELECT TO admin_users, auditor_users USING (TRUE)', relation
        );
        EXECUTE format(
            'CREATE POLICY transactions_job ON %s FOR ALL TO job_runner USING (TRUE) WITH CHECK (TRUE)', relation
        );
    END LOOP;
END $$;

-- What stands on a chain is public; who of the users stands behind it is not.
CREATE POLICY networks_read ON blockchain.networks
    FOR SELECT TO authenticated_users, auditor_users, job_runner
    USING (TRUE);
CREATE POLICY networks_admin ON blockchain.networks
    FOR ALL TO admin_users
    USING (TRUE)
    WITH CHECK (TRUE);
CREATE POLICY addresses_own_data ON blockchain.addresses
    FOR ALL TO authenticated_users
    USING (user_id = authentication.current_user_id())
    WITH CHECK (user_id = authentication.current_user_id());
CREATE POLICY addresses_read ON blockchain.addresses
    FOR SELECT TO admin_users, auditor_users
    USING (TRUE);
CREATE POLICY addresses_job ON blockchain.addresses
    FOR ALL TO job_runner
    USING (TRUE)
    WITH CHECK (TRUE);
CREATE POLICY smart_contracts_read ON blockchain.smart_contracts
    FOR SELECT TO authenticated_users, admin_users, auditor_users
    USING (TRUE);
CREATE POLICY smart_contracts_job ON blockchain.smart_contracts
    FOR ALL TO job_runner
    USING (TRUE)
    WITH CHECK (TRUE);
-- An invocation is his who sees its transaction; the policy there decides.
CREATE POLICY contract_invocations_read ON blockchain.contract_invocations
    FOR SELECT TO authenticated_users, admin_users, auditor_users
    USING (EXISTS (
        SELECT FROM blockchain.transactions AS t
        WHERE t.id = contract_invocations.transaction_id AND t.network_id = contract_invocations.network_id
    ));
CREATE POLICY contract_invocations_job ON blockchain.contract_invocations
    FOR ALL TO job_runner
    USING (TRUE)
    WITH CHECK (TRUE);

GRANT SELECT ON blockchain.networks, blockchain.smart_contracts, blockchain.transactions, blockchain.contract_invocations
    TO authenticated_users, admin_users, auditor_users, job_runner;
GRANT SELECT ON blockchain.addresses TO authenticated_users, admin_users, auditor_users, job_runner;

GRANT INSERT (
    id, name, network_type, chain_id, network_magic, rpc_endpoints, websocket_endpoints, explorer_urls, native_currency,
    block_time_seconds, confirmation_blocks, is_active, configuration
) ON blockchain.networks TO admin_users;
GRANT UPDATE (
    chain_id, network_magic, rpc_endpoints, websocket_endpoints, explorer_urls, native_currency, block_time_seconds,
    confirmation_blocks, is_active, configuration
) ON blockchain.networks TO admin_users;

GRANT INSERT (id, user_id, network_id, address, address_type, key_id, derivation_path, label, is_primary, is_watch_only)
    ON blockchain.addresses TO authenticated_users;
GRANT UPDATE (label, is_primary) ON blockchain.addresses TO authenticated_users;
GRANT UPDATE (balance_cache, last_balance_update) ON blockchain.addresses TO job_runner;

GRANT INSERT ON blockchain.transactions, blockchain.smart_contracts, blockchain.contract_invocations TO job_runner;
GRANT UPDATE (
    tx_index, block_number, block_hash, block_timestamp, gas_used, status, confirmation_count, receipt, logs, error_message,
    confirmed_at
) ON blockchain.transactions TO job_runner;
GRANT UPDATE (
    contract_name, contract_symbol, decimals, total_supply, contract_type, abi, bytecode, source_code, compiler_version,
    is_verified, is_proxy, implementation_address
) ON blockchain.smart_contracts TO job_runner;
