"""Loading a PKCS#11 module and initialising it with locking.

python-pkcs11 calls `C_Initialize(NULL)` and then releases the GIL around every call: SoftHSM then runs without mutexes and
crashes within seconds. So the module is loaded through the binding, finalised at once, and initialised again through ctypes
with `CKF_OS_LOCKING_OK` (PKCS #11 v2.40 section 5.4). The binding initialises only in `pkcs11.lib()`, which is therefore
called once per path and process.
"""

import ctypes
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pkcs11

from kms.hsm.errors import unavailable

if TYPE_CHECKING:
    from pkcs11._pkcs11 import lib

_CKF_OS_LOCKING_OK: Final = 2
_CKR_OK: Final = 0
_CKR_CRYPTOKI_NOT_INITIALIZED: Final = 0x190


class _InitializeArgs(ctypes.Structure):
    """CK_C_INITIALIZE_ARGS."""

    _fields_ = (
        ("create_mutex", ctypes.c_void_p),
        ("destroy_mutex", ctypes.c_void_p),
        ("lock_mutex", ctypes.c_void_p),
        ("unlock_mutex", ctypes.c_void_p),
        ("flags", ctypes.c_ulong),
        ("reserved", ctypes.c_void_p),
    )


class _FunctionList(ctypes.Structure):
    """The head of CK_FUNCTION_LIST: modules need not export the functions by name."""

    _fields_ = (
        ("version", ctypes.c_ubyte * 2),
        ("initialize", ctypes.CFUNCTYPE(ctypes.c_ulong, ctypes.c_void_p)),
        ("finalize", ctypes.CFUNCTYPE(ctypes.c_ulong, ctypes.c_void_p)),
    )


class Module:
    """A loaded module. One connection uses it at a time, because finalising it ends every session of the process."""

    def __init__(self, library: "lib", functions: _FunctionList) -> None:
        self.library = library
        self._functions = functions
        self._in_use = threading.Lock()

    def claim(self) -> None:
        """Take the module for one connection. Raises HSM_UNAVAILABLE if this process already uses it."""
        if not self._in_use.acquire(blocking=False):
            raise unavailable("this process already has a connection through this HSM module")

    def release(self) -> None:
        """Give the module back."""
        self._in_use.release()

    def initialise(self) -> None:
        """Begin anew: every session and object of the process is gone, and the token is read again.

        No thread may be inside a call. Raises HSM_UNAVAILABLE if the module does not start.
        """
        self.finalise()
        code = self._functions.initialize(ctypes.byref(_InitializeArgs(flags=_CKF_OS_LOCKING_OK)))
        if code != _CKR_OK:
            raise unavailable(f"the HSM module does not start (C_Initialize: {code:#x})")

    def finalise(self) -> None:
        """End all use of the module. No thread may be inside a call."""
        code = self._functions.finalize(None)
        if code not in (_CKR_OK, _CKR_CRYPTOKI_NOT_INITIALIZED):
            raise unavailable(f"the HSM module does not stop (C_Finalize: {code:#x})")


# A module is state of the process, whatever we do: this dictionary only mirrors what the loader knows.
_loaded: Final[dict[str, Module]] = {}
_loading: Final = threading.Lock()


def load_module(path: Path) -> Module:
    """Return the module at *path*, loaded on the first call. Raises HSM_UNAVAILABLE where it cannot be loaded."""
    name = str(path.resolve())
    with _loading:
        if name not in _loaded:
            _loaded[name] = _load(name)
        return _loaded[name]


def _load(name: str) -> Module:
    try:
        library = pkcs11.lib(name)
        library.finalize()
        entry = ctypes.CDLL(name).C_GetFunctionList
    except (pkcs11.PKCS11Error, OSError, AttributeError) as error:
        # The binding's own class stands for the loader's errors, its subclasses for what the module answered.
        if isinstance(error, pkcs11.PKCS11Error) and type(error) is not pkcs11.PKCS11Error:
            raise unavailable(f"the HSM module does not start without arguments ({type(error).__name__})") from None
        raise unavailable("the HSM module cannot be loaded; is the path that of a PKCS#11 module?") from None
    functions = ctypes.POINTER(_FunctionList)()
    entry.restype = ctypes.c_ulong
    if entry(ctypes.byref(functions)) != _CKR_OK:
        raise unavailable("the HSM module gives no function list")
    return Module(library, functions.contents)
