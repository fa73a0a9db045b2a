"""What the `kms records` commands do."""

from kms.config import Config
from kms.domain.errors import KmsError, Reason
from kms.hsm import provision
from kms.store.adopting import Checked
from kms.store.adopting import adopt_records as adopt
from kms.store.adopting import check_records as check
from kms.wiring.parts import hsm_settings, migration_dsn


def adopt_records(config: Config, *, again: bool) -> int:
    """Give the records without a MAC theirs, and have the token say so; return how many keys.

    Raises NAME_TAKEN where the token says already that all have theirs, unless it is to be done *again*.
    """
    settings = hsm_settings(config)
    if provision.records_have_macs(settings) and not again:
        raise KmsError(
            Reason.NAME_TAKEN,
            "the token says that every record has its MAC: one without it was written past the service. Only after restoring a "
            "backup from before `kms records adopt`, which you trust, use --again",
        )
    with provision.token_mac(settings) as mac:
        adopted = adopt(migration_dsn(config), mac)
    provision.record_that_records_have_macs(settings)
    return adopted


def check_records(config: Config) -> Checked:
    """Return which records of keys are as the service left them."""
    with provision.token_mac(hsm_settings(config)) as mac:
        return check(migration_dsn(config), mac)
