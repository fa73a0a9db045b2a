"""`kms hsm probe`: what the configured token can do, shown by doing it, and what to know before relying on it."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Final
from uuid import UUID

import pkcs11

from kms.domain.algorithms import Hash, KeySpec, KeyType, Purpose
from kms.domain.errors import KmsError
from kms.domain.ids import KeyId, UserId
from kms.domain.keys import Custody, HeldKey, KeyIdentity
from kms.hsm.capabilities import PROBED, RSA_ENCRYPTION, RSA_SIGNING, find_capabilities
from kms.hsm.connection import Connection, connect
from kms.hsm.envelopes import make_key, open_key
from kms.hsm.errors import MisfitError, translate
from kms.hsm.hardening import protect_memory
from kms.hsm.module import load_module
from kms.hsm.residents import abandon, write_mark
from kms.hsm.session import TokenSession
from kms.hsm.settings import HsmSettings
from kms.hsm.wrapping_keys import WrappingKey

_ALL: Final = (*PROBED, RSA_SIGNING, RSA_ENCRYPTION)


@dataclass(frozen=True, slots=True)
class KeyReport:
    """What was tried with one key type and purpose: each custody with the milliseconds it took, or None where refused."""

    key_type: KeyType
    purpose: Purpose
    milliseconds: dict[Custody, float | None]


@dataclass(frozen=True, slots=True)
class Report:
    """What `examine` found. `str` of it is the text for a terminal."""

    token_label: str
    serial: str
    model: str
    module: str
    wrapping_keys: tuple[WrappingKey, ...]
    keys: tuple[KeyReport, ...]
    oaep_hashes: tuple[Hash, ...]
    short_p99_microseconds: float
    mechanisms: tuple[str, ...] = field(repr=False)
    warnings: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Return everything as values that JSON has."""
        return {
            **asdict(self),
            "wrapping_keys": [
                {"kind": key.kind, "id": str(key.key_id), "generation": key.generation} for key in self.wrapping_keys
            ],
        }

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> list[str]:
        width = max(len(f"{key.key_type} {key.purpose}") for key in self.keys)
        lines = [f"token     {self.token_label} ({self.model}, serial {self.serial})", f"module    {self.module}", ""]
        lines += [f"{key.kind:9} generation {key.generation}, {key.key_id}" for key in self.wrapping_keys]
        lines += ["", *(f"{f'{key.key_type} {key.purpose}':{width}}  {_tried(key)}" for key in self.keys), ""]
        lines += [f"RSA-OAEP with {', '.join(self.oaep_hashes) or 'no hash'}"]
        lines += [f"short operations: {self.short_p99_microseconds:.0f} µs at the 99th percentile"]
        lines += [f"{len(self.mechanisms)} mechanisms (--json lists them)"]
        return lines + [f"warning: {warning}" for warning in self.warnings]


def examine(settings: HsmSettings) -> Report:
    """Try what the token can do; nothing stays in it. Has the module to itself while it runs.

    Raises what `open_hsm` raises.
    """
    settings.check()
    module = load_module(settings.module)
    module.claim()
    try:
        connection = connect(module, settings)
        try:
            return _examine(connection, settings)
        except pkcs11.PKCS11Error as error:
            raise translate(error) from None
    finally:
        module.finalise()
        module.release()


def _examine(connection: Connection, settings: HsmSettings) -> Report:
    is_locked = protect_memory()
    capabilities = find_capabilities(connection)
    keys = tuple(_try_all(connection, spec) for spec in _ALL)
    token = connection.token
    return Report(
        token_label=token.label,
        serial=connection.serial,
        model=token.model,
        module=connection.module.library.library_description,
        wrapping_keys=tuple(sorted(connection.names.wrapping_keys, key=lambda key: (key.kind, key.generation))),
        keys=keys,
        oaep_hashes=tuple(sorted(capabilities.oaep_hashes)),
        short_p99_microseconds=capabilities.short_p99_seconds * 1e6,
        mechanisms=tuple(sorted(getattr(mechanism, "name", hex(mechanism)) for mechanism in token.slot.get_mechanisms())),
        warnings=tuple(_warnings(keys, capabilities.oaep_hashes, settings, is_locked=is_locked, token=token)),
    )


def _try_all(connection: Connection, spec: KeySpec) -> KeyReport:
    # RSA is made to wrap or to stay; no token that has it needs to give its value away.
    custodies = [custody for custody in Custody if not (spec.key_type is KeyType.RSA and custody is Custody.SEALED)]
    return KeyReport(spec.key_type, spec.purpose, {custody: _try(connection, spec, custody) for custody in custodies})


def _try(connection: Connection, spec: KeySpec, custody: Custody) -> float | None:
    session = connection.open_session()
    before = time.perf_counter()
    try:
        _make_and_use(session, spec, custody)
    except (pkcs11.PKCS11Error, MisfitError, KmsError):
        return None
    finally:
        connection.close_session(session)
    return (time.perf_counter() - before) * 1e3


def _make_and_use(session: TokenSession, spec: KeySpec, custody: Custody) -> None:
    identity = KeyIdentity(KeyId(UUID(bytes=session.raw.generate_random(128), version=4)), UserId(UUID(int=0)), spec)
    if custody is Custody.RESIDENT:
        write_mark(session.raw, identity.key_id)  # if the command is killed, the service removes the key later
    try:
        open_key(session, HeldKey(identity, make_key(session, identity, custody), version=1)).drop()
    finally:
        abandon(session.raw, identity.key_id)


def _warnings(
    keys: tuple[KeyReport, ...], oaep: frozenset[Hash], settings: HsmSettings, *, is_locked: bool, token: pkcs11.Token
) -> list[str]:
    unwrapped = [key.key_type for key in keys if key.milliseconds.get(Custody.WRAPPED) is None]
    checks: list[tuple[Callable[[], bool], str]] = [
        (lambda: token.model.startswith("SoftHSM"), "SoftHSM protects nothing from this host: it is for development and tests"),
        (lambda: bool(unwrapped), f"cannot be wrapped here: {', '.join(unwrapped)}; kept SEALED, the host sees them when loaded"),
        (lambda: bool(unwrapped) and not settings.allow_sealed, "SEALED is not allowed: those types can only be RESIDENT"),
        (lambda: oaep <= {Hash.SHA_1}, "RSA-OAEP with SHA-256 is not offered: the token does at most SHA-1"),
        (lambda: not is_locked, "memory cannot be locked: SEALED keys and plaintexts may reach the swap space"),
    ]
    return [text for applies, text in checks if applies()]


def _tried(key: KeyReport) -> str:
    return "  ".join(
        f"{custody} {'–' if taken is None else f'{taken:.1f} ms'}" for custody, taken in reversed(key.milliseconds.items())
    )
