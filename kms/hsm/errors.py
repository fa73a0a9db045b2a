"""PKCS#11 errors as `KmsError`, and what each says about the session it came from.

The tables are the whole knowledge of this package about the token's error codes.
"""

from enum import Enum
from typing import Final

from pkcs11 import exceptions as p11

from kms.domain.errors import KmsError, Reason

# What a token answers to input that somebody altered: a wrong GCM tag, a broken wrap, bad RSA padding. SoftHSM says
# GeneralError to all of them. A final call ends its operation, so the session is sound.
ALTERED_INPUT: Final = (
    p11.GeneralError,
    p11.FunctionFailed,
    p11.DataInvalid,
    p11.DataLenRange,
    p11.EncryptedDataInvalid,
    p11.EncryptedDataLenRange,
    p11.WrappedKeyInvalid,
    p11.WrappedKeyLenRange,
)
# What a token answers when it has no such mechanism, curve, size or hash.
UNSUPPORTED: Final = (
    p11.MechanismInvalid,
    p11.MechanismParamInvalid,
    p11.FunctionNotSupported,
    p11.DomainParamsInvalid,
    p11.KeySizeRange,
    p11.ArgumentsBad,
)
PIN_FAULTS: Final = (
    p11.PinIncorrect,
    p11.PinInvalid,
    p11.PinLenRange,
    p11.PinLocked,
    p11.PinExpired,
    p11.UserPinNotInitialized,
)


class MisfitError(Exception):
    """An envelope did not open, or what it held does not fit its record. Never leaves this package."""


class PinRefusedError(KmsError):
    """HSM_UNAVAILABLE of the kind that trying again makes worse: tokens lock after a few wrong PINs."""

    def __init__(self) -> None:
        super().__init__(Reason.HSM_UNAVAILABLE, "the HSM refuses the login: the PIN is wrong, locked or expired")


class Fate(Enum):
    """What becomes of a session after an error."""

    KEEP = "keep"
    RECYCLE = "recycle"


def fate_of(error: p11.PKCS11Error) -> Fate:
    """Whether the session that raised *error* may be used again.

    Argument errors leave an operation active in SoftHSM 2.6.1, so they count with the session and device errors.
    """
    return Fate.KEEP if isinstance(error, ALTERED_INPUT) else Fate.RECYCLE


def translate(error: p11.PKCS11Error) -> KmsError:
    """Return the `KmsError` for an error that no operation expected: the token does not answer as it should."""
    if isinstance(error, PIN_FAULTS):
        return PinRefusedError()
    if isinstance(error, (p11.SessionCount, p11.DeviceMemory)):
        return unavailable("the HSM has no room for another session or key")
    return unavailable(f"the HSM does not answer as it should ({type(error).__name__})")


def unavailable(message: str = "the HSM does not answer") -> KmsError:
    """Return HSM_UNAVAILABLE with *message*."""
    return KmsError(Reason.HSM_UNAVAILABLE, message)


def kek_missing() -> KmsError:
    """Return HSM_KEK_MISSING: the envelope names a key that this token does not hold."""
    return KmsError(Reason.HSM_KEK_MISSING, "the token lacks the wrapping key under which this key is kept; nothing is lost yet")


def unsupported(mechanism: str) -> KmsError:
    """Return HSM_MECHANISM_UNSUPPORTED naming what the token does not do."""
    return KmsError(Reason.HSM_MECHANISM_UNSUPPORTED, f"this HSM does not do {mechanism}", mechanism=mechanism)
