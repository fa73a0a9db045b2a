-- Settings of services, their history, environments. Administrators change them; the history writes itself.

CREATE SCHEMA configuration;
GRANT USAGE ON SCHEMA configuration TO admin_users, auditor_users, job_runner, kms_ledger;

CREATE TABLE configuration.service_configs (
    id UUID PRIMARY KEY DEFAULT gen_random_uuid(),
    service_name VARCHAR(100) NOT NULL,
    config_key VARCHAR(200) NOT NULL,
    config_value JSONB NOT NULL,
    value_type VARCHAR(50) DEFAULT 'json',
    is_encrypted BOOLEAN DEFAULT FALSE,
    is_sensitive BOOLEAN DEFAULT FALSE,
    environment VARCHAR(20) DEFAULT 'development',
    version INTEGER DEFAULT 1, -- advances with every change
    is_active BOOLEAN DEFAULT TRUE,
    schema_validation JSONB,
    description TEXT,
    created_by UUID DEFAULT authentication.current_user_id() REFERENCES authentication.users (id),
    created_at TIMESTAMPTZ DEFAULT NOW(),
    updated_at TIMESTAMPTZ DEFAULT NOW(),
    UNIQUE (service_name, config_key, environment),
    CONSTRAINT config_version_positive CHECK (version > 0),
    CONSTRAINT valid_environment CHECK (environment IN ('development', 'testing', 'staging', 'production'))
);

CREATE TABLE configuration.config_history (
    id UUID PRIMARY KEY DEFAULT gen_random_uuid(),
    config_id UUID NOT NULL REFERENCES configuration.service_configs (id),
    change_type VARCHAR(20) NOT NULL
        CHECK (change_type IN ('created', 'updated', 'deleted', 'activated', 'deactivated')),
    old_value JSONB, -- neither value of a sensitive setting is kept
    new_value JSONB,
    changed_by UUID REFERENCES authentication.users (id),
    change_reason TEXT,
    created_at TIMESTAMPTZ DEFAULT NOW()
);

CREATE TABLE configuration.environments (
    id UUID PRIMARY KEY DEFAULT gen_random_uuid(),
    name VARCHAR(50) UNIQUE NOT NULL,
    display_name VARCHAR(100),
    description TEXT,
    is_production BOOLEAN DEFAULT FALSE,
    deployment_config JSONB DEFAULT '{}',
    health_check_urls JSONB DEFAULT '[]',
    monitoring_config JSONB DEFAULT '{}',
    created_at TIMESTAMPTZ DEFAULT NOW(),
    updated_at TIMESTAMPTZ DEFAULT NOW()
);

CREATE INDEX idx_service_configs_name_env ON configuration.service_configs (service_name, environment);
CREATE INDEX idx_service_configs_active ON configuration.service_configs (is_active, service_name);

CREATE TRIGGER tr_service_configs_updated_at
    BEFORE UPDATE ON configuration.service_configs
    FOR EACH ROW EXECUTE FUNCTION public.update_updated_at();
CREATE TRIGGER tr_environments_updated_at
    BEFORE UPDATE ON configuration.environments
    FOR EACH ROW EXECUTE FUNCTION public.update_updated_at();

CREATE FUNCTION configuration.advance_config_version() RETURNS TRIGGER
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    NEW.version = OLD.version + 1;
    RETURN NEW;
END;
$$;
REVOKE ALL ON FUNCTION configuration.advance_config_version() FROM PUBLIC;
CREATE TRIGGER tr_service_configs_advance_version
    BEFORE UPDATE ON configuration.service_configs
    FOR EACH ROW EXECUTE FUNCTION configuration.advance_config_version();

-- The reason of a change is what the transaction says in app.change_reason.
CREATE FUNCTION configuration.record_config_change() RETURNS TRIGGER
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    before_change JSONB;
    change TEXT := 'created';
BEGIN
    IF TG_OP = 'UPDATE' THEN
        before_change := OLD.config_value;
        change := CASE
            WHEN NEW.is_active IS NOT DISTINCT FROM OLD.is_active THEN 'updated'
            WHEN NEW.is_active THEN 'activated'
            ELSE 'deactivated'
        END;
    END IF;
    INSERT INTO configuration.config_history (config_id, change_type, old_value, new_value, changed_by, change_reason)
    VALUES (
        NEW.id, change,
        CASE WHEN TG_OP = 'UPDATE' AND NOT (NEW.is_sensitive OR OLD.is_sensitive) THEN before_change END,
        CASE WHEN NOT NEW.is_sensitive THEN NEW.config_value END,
        authentication.current_user_id(),
        nullif(current_setting('app.change_reason', TRUE), '')
    );
    RETURN NULL;
END;
$$;
REVOKE ALL ON FUNCTION configuration.record_config_change() FROM PUBLIC;
CREATE TRIGGER tr_service_configs_history
    AFTER INSERT OR UPDATE ON configuration.service_configs
    FOR EACH ROW EXECUTE FUNCTION configuration.record_config_change();

ALTER TABLE configuration.service_configs ENABLE ROW LEVEL SECURITY;
ALTER TABLE configuration.service_configs FORCE ROW LEVEL SECURITY;
ALTER TABLE configuration.config_history ENABLE ROW LEVEL SECURITY;
ALTER TABLE configuration.config_history FORCE ROW LEVEL SECURITY;
ALTER TABLE configuration.environments ENABLE ROW LEVEL SECURITY;
ALTER TABLE configuration.environments FORCE ROW LEVEL SECURITY;

CREATE POLICY service_configs_admin ON configuration.service_configs
    FOR ALL TO admin_users
    USING (TRUE)
    WITH CHECK (TRUE);
CREATE POLICY service_configs_job ON configuration.service_configs
    FOR SELECT TO job_runner
    USING (TRUE);
CREATE POLICY config_history_read ON configuration.config_history
    FOR SELECT TO admin_users, auditor_users
    USING (TRUE);
CREATE POLICY config_history_ledger ON configuration.config_history
    FOR INSERT TO kms_ledger
    WITH CHECK (TRUE);
CREATE POLICY environments_admin ON configuration.environments
    FOR ALL TO admin_users
    USING (TRUE)
    WITH CHECK (TRUE);
CREATE POLICY environments_read ON configuration.environments
    FOR SELECT TO job_runner, auditor_users
    USING (TRUE);

GRANT SELECT ON configuration.service_configs TO admin_users, job_runner;
GRANT INSERT (
    id, service_name, config_key, config_value, value_type, is_encrypted, is_sensitive, environment, is_active,
    schema_validation, description
) ON configuration.service_configs TO admin_users;
GRANT UPDATE (config_value, value_type, is_encrypted, is_sensitive, is_active, schema_validation, description)
    ON configuration.service_configs TO admin_users;

GRANT SELECT ON configuration.config_history TO admin_users, auditor_users;
GRANT INSERT (config_id, change_type, old_value, new_value, changed_by, change_reason)
    ON configuration.config_history TO kms_ledger;

GRANT SELECT ON configuration.environments TO admin_users, job_runner, auditor_users;
GRANT INSERT (
    id, name, display_name, description, is_production, deployment_config, health_check_urls, monitoring_config
) ON configuration.environments TO admin_users;
GRANT UPDATE (display_name, description, is_production, deployment_config, health_check_urls, monitoring_config)
    ON configuration.environments TO admin_users;

GRANT CREATE ON SCHEMA configuration TO kms_ledger;
ALTER FUNCTION configuration.record_config_change() OWNER TO kms_ledger;
REVOKE CREATE ON SCHEMA configuration FROM kms_ledger;
