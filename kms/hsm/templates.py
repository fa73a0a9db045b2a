"""Attribute templates, as constants: an attribute that the binding cannot encode crashes the interpreter.

Names follow the life of a key: `WRAPPING`, `SEALING` and `MAC` are the token's own keys, `CREATION` is a key on its way into its
envelope, `USE` is one taken out of it, `REWRAP` is one that another KEK wraps again, `RESIDENT` is a key that stays.
"""

from collections.abc import Mapping
from typing import Any, Final

from pkcs11 import Attribute, MechanismFlag, ObjectClass
from pkcs11 import KeyType as P11KeyType
from pkcs11.constants import DEFAULT

from kms.domain.algorithms import KeyType, Purpose

Template = Mapping[Attribute, Any]

WRAPPING_CAPABILITIES: Final = MechanismFlag.WRAP | MechanismFlag.UNWRAP
SEALING_CAPABILITIES: Final = MechanismFlag.ENCRYPT | MechanismFlag.DECRYPT
MAC_CAPABILITIES: Final = MechanismFlag.SIGN | MechanismFlag.VERIFY
REWRAP_CAPABILITIES: Final = MechanismFlag(0)
RESIDENT_LABEL: Final = "neo-kms resident"

# Of a key of the token's own when it is made. Without MODIFIABLE and COPYABLE false, C_SetAttributeValue or a copy would
# give it the operation that its purpose excludes.
TOKEN_KEY: Final[Template] = {
    Attribute.PRIVATE: True,
    Attribute.SENSITIVE: True,
    Attribute.EXTRACTABLE: False,
    Attribute.MODIFIABLE: False,
    Attribute.COPYABLE: False,
}
_OPERATIONS: Final = (
    Attribute.WRAP,
    Attribute.UNWRAP,
    Attribute.ENCRYPT,
    Attribute.DECRYPT,
    Attribute.SIGN,
    Attribute.VERIFY,
    Attribute.DERIVE,
)
_COMMON_DEMANDS: Final[Template] = {
    **TOKEN_KEY,
    Attribute.CLASS: ObjectClass.SECRET_KEY,
    Attribute.VALUE_LEN: 32,
    Attribute.TOKEN: True,
}
# What every start demands of the token's own keys, operation by operation.
WRAPPING_DEMANDS: Final[Template] = {
    **_COMMON_DEMANDS,
    Attribute.KEY_TYPE: P11KeyType.AES,
    **{name: name in (Attribute.WRAP, Attribute.UNWRAP) for name in _OPERATIONS},
}
SEALING_DEMANDS: Final[Template] = {
    **_COMMON_DEMANDS,
    Attribute.KEY_TYPE: P11KeyType.AES,
    **{name: name in (Attribute.ENCRYPT, Attribute.DECRYPT) for name in _OPERATIONS},
}
MAC_DEMANDS: Final[Template] = {
    **_COMMON_DEMANDS,
    Attribute.KEY_TYPE: P11KeyType.GENERIC_SECRET,
    **{name: name in (Attribute.SIGN, Attribute.VERIFY) for name in _OPERATIONS},
}

# A key on its way into a WRAPPED envelope: the KEK can wrap it, nobody can read it.
CREATION: Final[Template] = {Attribute.PRIVATE: True, Attribute.SENSITIVE: True, Attribute.EXTRACTABLE: True}
# A key on its way into a SEALED envelope: its value is read once.
CREATION_SEALED: Final[Template] = {Attribute.PRIVATE: True, Attribute.SENSITIVE: False, Attribute.EXTRACTABLE: True}
# SoftHSM 2.6.1 refuses MODIFIABLE false when it unwraps, so the handle only refuses to be copied.
USE: Final[Template] = {
    Attribute.PRIVATE: True,
    Attribute.SENSITIVE: True,
    Attribute.EXTRACTABLE: False,
    Attribute.COPYABLE: False,
}
# The binding sends these three for every class of key; tokens refuse them for a private key.
_NOT_OF_A_PRIVATE_KEY: Final[Template] = {
    Attribute.ENCRYPT: DEFAULT,
    Attribute.VERIFY: DEFAULT,
    Attribute.WRAP: DEFAULT,
}
USE_PRIVATE: Final[Template] = {**USE, **_NOT_OF_A_PRIVATE_KEY}
# A key on its way from one KEK to the next: it can be wrapped, and does nothing else. It is destroyed at once.
REWRAP: Final[Template] = CREATION
REWRAP_PRIVATE: Final[Template] = {**REWRAP, **_NOT_OF_A_PRIVATE_KEY}
RESIDENT: Final[Template] = {**TOKEN_KEY, Attribute.TOKEN: True}
SESSION_PUBLIC: Final[Template] = {Attribute.TOKEN: False}


def use_capabilities(key_type: KeyType, purpose: Purpose) -> MechanismFlag:
    """Return the only operations of a key of this type and purpose. An AES key signs its check value too."""
    if key_type is KeyType.AES:
        return MechanismFlag.ENCRYPT | MechanismFlag.DECRYPT | MechanismFlag.SIGN
    return MechanismFlag.SIGN if purpose is Purpose.SIGNING else MechanismFlag.DECRYPT


def pair_capabilities(purpose: Purpose) -> MechanismFlag:
    """Return the operations of a new pair: those of its private half and their counterparts in the public one."""
    if purpose is Purpose.SIGNING:
        return MechanismFlag.SIGN | MechanismFlag.VERIFY
    return MechanismFlag.DECRYPT | MechanismFlag.ENCRYPT


def operation_attributes(purpose: Purpose) -> Template:
    """Return the attributes of a private key that is imported for *purpose*."""
    signs = purpose is Purpose.SIGNING
    return {Attribute.SIGN: signs, Attribute.DECRYPT: not signs, Attribute.UNWRAP: False, Attribute.DERIVE: False}
