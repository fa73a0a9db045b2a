"""What uses keys: the parts that every service of the server shares, and the service's own work too."""

from dataclasses import dataclass

from kms.app.access import Access
from kms.app.keyring import Keyring
from kms.app.ports import Keys, Ledger, Users
from kms.hsm.token_hsm import TokenHsm
from kms.hsm.uninterrupted import uninterrupted
from kms.keys.crypto.charged import ChargedUses
from kms.keys.crypto.encryption import Encryption
from kms.keys.crypto.signing import Signing
from kms.keys.ledger.counts import Counts
from kms.keys.ledger.repeats import Repeats
from kms.keys.ledger.settling import Settling
from kms.pki.public_keys import PublicKeyOperations
from kms.rpc.batches import run_batch


@dataclass(frozen=True, slots=True)
class KeyUses:
    """Keys, who may use them, and the one way to use them. `hsm` is the token as it is observed."""

    keys: Keys
    hsm: TokenHsm
    access: Access
    keyring: Keyring
    repeats: Repeats
    charged: ChargedUses


def key_uses(keys: Keys, users: Users, hsm: TokenHsm, ledger: Ledger, counts: Counts) -> KeyUses:
    """Return the parts, as `kms serve` has them."""
    access, public_keys = Access(users), PublicKeyOperations()
    settling = Settling(ledger, access)
    repeats = Repeats(keys, hsm, settling, counts)
    charged = ChargedUses(Signing(keys, hsm, public_keys), Encryption(keys, hsm, public_keys), settling, repeats, run_batch)
    return KeyUses(keys, hsm, access, Keyring(keys, hsm, uninterrupted), repeats, charged)
