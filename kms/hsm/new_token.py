"""Initialising a token through PKCS#11 itself, in a process of its own.

The vendors' tools take PINs as arguments, where every user of the machine can read them; here they travel by a pipe. The
process of its own keeps this one from loading the module: a module is initialised once in a process, by whoever serves it.
"""

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NoReturn

from kms.domain.errors import KmsError, Reason
from kms.domain.secret import Secret

_LABEL_BYTES: Final = 32
_OS_LOCKING: Final = 0x2
_TOKEN_INITIALIZED: Final = 0x400
_SERIAL_RW_SESSION: Final = 0x6
_SECURITY_OFFICER: Final = 0
_CHILD_SECONDS: Final = 60


class _InitializeArguments(ctypes.Structure):
    """CK_C_INITIALIZE_ARGS of PKCS#11 v2.40."""

    _fields_ = (
        ("callbacks", ctypes.c_void_p * 4),
        ("flags", ctypes.c_ulong),
        ("reserved", ctypes.c_void_p),
    )


class _TokenInfo(ctypes.Structure):
    """CK_TOKEN_INFO of PKCS#11 v2.40; only the label and the flags are read."""

    _fields_ = (
        ("label", ctypes.c_char * _LABEL_BYTES),
        ("names", ctypes.c_char * 64),
        ("flags", ctypes.c_ulong),
        ("counts", ctypes.c_ulong * 10),
        ("versions", ctypes.c_char * 20),
    )


class _RefusedError(Exception):
    """A PKCS#11 function returned something else than CKR_OK."""


def new_token(module: Path, label: str, *, so_pin: Secret, pin: Secret, environment: Mapping[str, str]) -> None:
    """Initialise a free slot of *module* as the token *label* with both PINs.

    *environment* is set for the module on top of ours (SoftHSM reads SOFTHSM2_CONF). Raises HSM_UNAVAILABLE if there is no free
    slot, a token of that name exists, or the module refuses.
    """
    order = {"module": str(module), "label": label, "so_pin": so_pin.reveal().decode(), "pin": pin.reveal().decode()}
    result = subprocess.run(  # noqa: S603  # our own interpreter and module
        [sys.executable, "-m", __name__],
        input=json.dumps(order),
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=_CHILD_SECONDS,
        check=False,
    )
    if result.returncode != 0:
        detail = result.stdout.strip() or "the module failed"
        raise KmsError(Reason.HSM_UNAVAILABLE, f"the token was not initialised: {detail}")


def _initialise(module: str, label: str, so_pin: str, pin: str) -> None:
    library = ctypes.CDLL(module)
    _call(library, "C_Initialize", ctypes.byref(_InitializeArguments(flags=_OS_LOCKING)))
    padded = label.encode().ljust(_LABEL_BYTES)
    if len(padded) != _LABEL_BYTES:
        raise _RefusedError("a token's label has at most 32 bytes")
    slot = ctypes.c_ulong(_free_slot(library, padded))
    _call(library, "C_InitToken", slot, *_text(so_pin), padded)
    session = ctypes.c_ulong()
    _call(library, "C_OpenSession", slot, ctypes.c_ulong(_SERIAL_RW_SESSION), None, None, ctypes.byref(session))
    _call(library, "C_Login", session, ctypes.c_ulong(_SECURITY_OFFICER), *_text(so_pin))
    _call(library, "C_InitPIN", session, *_text(pin))
    _call(library, "C_Finalize", None)


def _free_slot(library: ctypes.CDLL, label: bytes) -> int:
    count = ctypes.c_ulong()
    _call(library, "C_GetSlotList", ctypes.c_ubyte(1), None, ctypes.byref(count))
    slots = (ctypes.c_ulong * count.value)()
    _call(library, "C_GetSlotList", ctypes.c_ubyte(1), slots, ctypes.byref(count))
    free = None
    for slot in slots:
        info = _TokenInfo()
        _call(library, "C_GetTokenInfo", ctypes.c_ulong(slot), ctypes.byref(info))
        if not info.flags & _TOKEN_INITIALIZED:
            free = slot
        elif info.label == label:
            raise _RefusedError("a token of that label exists")
    if free is None:
        raise _RefusedError("no slot is free")
    return int(free)


def _text(value: str) -> tuple[bytes, ctypes.c_ulong]:
    data = value.encode()
    return data, ctypes.c_ulong(len(data))


def _call(library: ctypes.CDLL, name: str, *arguments: Any) -> None:  # noqa: ANN401  # whatever ctypes passes on
    function = getattr(library, name)
    function.restype = ctypes.c_ulong
    if code := function(*arguments):
        raise _RefusedError(f"{name} returned 0x{code:x}")


def _main() -> NoReturn:
    try:
        _initialise(**json.load(sys.stdin))
    except (_RefusedError, OSError) as error:
        print(error)  # the parent's pipe: the sentence becomes part of its error
        sys.exit(1)
    sys.exit(0)


if __name__ == "__main__":
    _main()
