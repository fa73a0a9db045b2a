"""The port `Hsm` over a PKCS#11 token."""

import asyncio
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, TypeVar

import pkcs11
import structlog

from kms.app.ports import Sealed
from kms.domain.algorithms import Hash, KeySpec, KeyType, Purpose, SignatureAlgorithm
from kms.domain.ciphertext import ciphertext_invalid
from kms.domain.errors import KmsError, Reason
from kms.domain.ids import KeyId
from kms.domain.keys import Custody, HeldKey, KeyIdentity, KeyMaterial, check_custody
from kms.domain.residents import Holdings
from kms.hsm import operations, residents
from kms.hsm.bench import Bench
from kms.hsm.capabilities import Capabilities, find_capabilities
from kms.hsm.connection import Connection, connect
from kms.hsm.drill import Outcome, outcome_of
from kms.hsm.envelopes import Handle, make_key
from kms.hsm.errors import PinRefusedError, translate, unavailable, unsupported
from kms.hsm.hardening import protect_memory
from kms.hsm.lanes import LaneSet
from kms.hsm.link import Link
from kms.hsm.module import Module, load_module
from kms.hsm.places import Places
from kms.hsm.public_keys import decrypt_oaep
from kms.hsm.session import TokenSession, decrypt_gcm, encrypt_gcm
from kms.hsm.settings import HsmSettings
from kms.hsm.uninterrupted import uninterrupted
from kms.hsm.watch import Watch
from kms.hsm.wrapping_keys import WrappingKey

T = TypeVar("T")

_log = structlog.get_logger(__name__)

_INLINE_BYTES_MAX: Final = 16 * 1024
_RETRY_PAUSE_SECONDS: Final = 0.1
_CLOSE_SECONDS: Final = 5.0
_COUNT_SECONDS: Final = 1.0
_UNDO_PAUSES_SECONDS: Final = (0.05, 0.2, 0.5, 1.0, 2.0)


@dataclass(frozen=True, slots=True)
class HsmStatus:
    """What an operator sees of the HSM. `sessions` are ours, open now; `waiting` counts work in a lane or before it;
    `custodies` is what each key type can have.
    """

    is_available: bool
    token_label: str
    serial: str
    model: str
    module: str
    sessions: int
    lanes: int
    lanes_abandoned: int
    waiting: int
    handles: int
    handle_hits: int
    handle_misses: int
    custodies: Mapping[tuple[KeyType, Purpose], frozenset[Custody]]
    oaep_hashes: frozenset[Hash]
    short_p99_seconds: float
    runs_short_operations_inline: bool
    is_memory_locked: bool
    resident_keys: int
    wrapping_keys: tuple[WrappingKey, ...]


@dataclass(frozen=True, slots=True)
class WrappingKeys:
    """The token's own keys, for registration. The serial is recorded and warned about when it changes, never required.

    `makers` are the generations that may make new envelopes, `current` is the one that does.
    """

    token_serial: str
    keys: tuple[WrappingKey, ...]
    makers: tuple[int, ...]
    retired: frozenset[int]
    current: int


class TokenHsm:
    """The `Hsm` port, made by `open_hsm`. Its coroutines run on the event loop it was opened in."""

    def __init__(self, settings: HsmSettings, link: Link, capabilities: Capabilities, *, is_memory_locked: bool) -> None:
        self._settings = settings
        self._link = link
        self.capabilities = capabilities
        self._is_memory_locked = is_memory_locked
        self._lanes = LaneSet(link, settings)
        self._lanes.inline_wanted = capabilities.short_p99_seconds < settings.inline_p99_seconds
        self._watch = Watch(link, self._lanes, settings, asyncio.get_running_loop())
        self._places = Places(settings.resident_keys_max)
        self._is_closed = False

    async def start(self) -> None:
        """Count the resident keys and begin to watch. `open_hsm` has called it."""
        await self.residents()
        await asyncio.to_thread(self._lanes.after_return)
        self._watch.start()

    async def close(self) -> None:
        """Log out and give the module back. What waits fails with HSM_UNAVAILABLE; a second call does nothing."""
        if not self._is_closed:
            self._is_closed = True
            await asyncio.to_thread(self._close)

    def is_available(self) -> bool:
        """Whether the token answered when it was last looked at."""
        return self._link.is_up

    def status(self) -> HsmStatus:
        """Return the state of things."""
        connection = self._link.last
        return HsmStatus(
            is_available=self._link.is_up,
            token_label=connection.token.label,
            serial=connection.serial,
            model=connection.token.model,
            module=connection.module.library.library_description,
            sessions=connection.sessions if self._link.is_up else 0,
            lanes=self._settings.lanes,
            lanes_abandoned=self._lanes.abandoned(),
            waiting=self._lanes.waiting,
            handles=self._lanes.handles,
            handle_hits=self._lanes.handle_hits,
            handle_misses=self._lanes.handle_misses,
            custodies=self.capabilities.custodies,
            oaep_hashes=self.capabilities.oaep_hashes,
            short_p99_seconds=self.capabilities.short_p99_seconds,
            runs_short_operations_inline=self._lanes.inline_wanted,
            is_memory_locked=self._is_memory_locked,
            resident_keys=self._places.count,
            wrapping_keys=tuple(connection.names.wrapping_keys),
        )

    def wrapping_keys(self) -> WrappingKeys:
        """Return the KEKs and sealing keys that the token holds, and its serial."""
        view = self._link.last.view
        keys = tuple(view.names.wrapping_keys)
        return WrappingKeys(self._link.last.serial, keys, view.names.makers, view.names.retired, view.generation)

    async def look_at_keys(self) -> WrappingKeys:
        """Look which keys of its own the token holds by now, and return them. Raises HSM_UNAVAILABLE."""
        self._refuse_if_away()
        await _result(self._lanes.submit(Bench.look_at_keys))
        return self.wrapping_keys()

    async def make_under(self, generation: int) -> None:
        """Make new envelopes under *generation* from now on, unless the token lacks it or says that it is retired."""
        await asyncio.to_thread(self._link.last.make_under, generation)

    async def rewrap(self, key: HeldKey) -> str:
        """Return the key's envelope under the generation that makes new ones. Raises as every method with a `HeldKey` does."""
        self._refuse_if_away()
        return await _result(self._lanes.submit(lambda bench: bench.rewrap(key)))

    @property
    def says_records_have_macs(self) -> bool:
        """Whether the token says that every record of the database has a MAC."""
        return self._link.last.names.says_records_have_macs

    @property
    def is_sealed_allowed(self) -> bool:
        """Whether keys whose best custody is SEALED are made."""
        return self._settings.allow_sealed

    def oaep_hashes(self) -> frozenset[Hash]:
        """Return the hashes with which the token does RSA-OAEP."""
        return self.capabilities.oaep_hashes

    def custody_for(self, spec: KeySpec, minimum: Custody | None) -> Custody:
        """Return the custody in which a key of *spec* would be made, or raise CUSTODY_UNAVAILABLE."""
        works = self.capabilities.of(spec)
        if not works:
            raise unsupported(f"{spec.key_type} keys for {spec.purpose}")
        if minimum is Custody.RESIDENT:
            return Custody.RESIDENT  # whether there is a place for it is seen when it is made
        best = max(works - {Custody.RESIDENT}, key=tuple(Custody).index)
        check_custody(best, minimum)
        if best is Custody.SEALED and not self._settings.allow_sealed:
            raise KmsError(
                Reason.CUSTODY_UNAVAILABLE,
                f"this HSM can keep a {spec.key_type} key only SEALED, which is not allowed here; RESIDENT may be asked for",
                custody=Custody.SEALED,
            )
        return best

    async def generate(self, identity: KeyIdentity, custody: Custody) -> KeyMaterial:
        """Make a key in the token and return its envelope. Raises CUSTODY_UNAVAILABLE where there are too many RESIDENT keys."""
        if custody is Custody.RESIDENT:
            return await self._generate_resident(identity)
        return await _result(self._submit_generation(identity, custody))

    async def confirm(self, key_id: KeyId) -> None:
        """See `Hsm.confirm`."""
        await self._on_objects(lambda session: residents.confirm(session.raw, key_id))

    async def abandon(self, key_id: KeyId) -> None:
        """See `Hsm.abandon`."""
        if await self._on_objects(lambda session: residents.abandon(session.raw, key_id)):
            self._places.free(key_id)

    async def discard(self, key_id: KeyId, bound_to: str) -> None:
        """See `Hsm.discard`."""
        await self._on_objects(lambda session: residents.discard(session.raw, key_id, bound_to))
        self._places.free(key_id)

    async def residents(self) -> Collection[str]:
        """Return the CKA_ID, in hex, of every RESIDENT key whose object the token holds."""
        return {key_id.hex for key_id in (await self.holdings()).objects}

    async def holdings(self) -> Holdings:
        """See `Hsm.holdings`."""
        begun = self._places.begin_count()
        found = await self._on_objects(lambda session: residents.take_holdings(session.raw))
        self._places.counted(found.objects, begun)
        return found

    async def opens(self, key: HeldKey) -> bool:
        """See `Hsm.opens`."""
        return await self._on_objects(lambda session: outcome_of(session, key)) is Outcome.OPENED

    async def sign(self, key: HeldKey, algorithm: SignatureAlgorithm, data: bytes) -> bytes:
        """Sign a digest, for Ed25519 a message."""
        operations.check_signing(key.identity.spec, algorithm, data)
        if key.identity.spec.key_type is KeyType.RSA and algorithm not in self.capabilities.rsa_signatures:
            raise unsupported(_named(algorithm))

        def work(bench: Bench) -> bytes:
            return bench.use(key, lambda _, handle: operations.sign(handle, algorithm, data), _named(algorithm))

        return await self._run(key, work)

    async def encrypt(self, key: HeldKey, plaintext: bytes, aad: bytes) -> Sealed:
        """Encrypt by AES-GCM under a fresh nonce from the token."""
        operations.check_encryption(key.identity.spec, aad)

        def work(session: TokenSession, handle: Handle) -> Sealed:
            return Sealed(*encrypt_gcm(session.raw, handle.key, plaintext, aad))

        if self._is_inline(plaintext) and (done := self._lanes.inline.use_if_well(key, work)) is not None:
            return done
        return await self._run(key, lambda bench: bench.use(key, work, "AES-GCM"))

    async def decrypt(self, key: HeldKey, sealed: Sealed, aad: bytes) -> bytes:
        """Open what `encrypt` made, or raise CIPHERTEXT_INVALID."""
        operations.check_encryption(key.identity.spec, aad)
        if not operations.check_sealed(sealed.nonce, sealed.body):
            raise ciphertext_invalid()

        def work(handle: Handle) -> bytes:
            return decrypt_gcm(handle.key, sealed.nonce, sealed.body, aad)

        if self._is_inline(sealed.body):
            done = self._lanes.inline.use_if_well(key, lambda _, handle: work(handle))
            if done is not None:
                return done
        return await self._run(key, lambda bench: bench.use_on_input(key, work, ciphertext_invalid, "AES-GCM"))

    async def decrypt_rsa(self, key: HeldKey, hash_: Hash, body: bytes) -> bytes:
        """Open RSA-OAEP, or raise CIPHERTEXT_INVALID."""
        fits = operations.check_rsa_decryption(key.identity.spec, body)
        mechanism = f"RSA-OAEP with {hash_}"
        if hash_ not in self.capabilities.oaep_hashes:
            raise unsupported(mechanism)
        if not fits:
            raise ciphertext_invalid()

        def work(handle: Handle) -> bytes:
            return decrypt_oaep(handle.key, hash_, body)

        return await self._run(key, lambda bench: bench.use_on_input(key, work, ciphertext_invalid, mechanism))

    async def random(self, size_bytes: int) -> bytes:
        """Return random bytes from the token."""
        operations.check_random(size_bytes)

        def work(session: TokenSession) -> bytes:
            return session.raw.generate_random(size_bytes * 8)

        if self._lanes.inline_wanted and (done := self._lanes.inline.run_if_well(work)) is not None:
            return done
        return await _result(self._lanes.submit(lambda bench: bench.run(work, "random numbers")))

    async def mac(self, data: bytes) -> bytes:
        """Return HMAC-SHA-256 of *data* under the token's own MAC key."""
        operations.check_mac(data)
        if self._is_inline(data) and (done := self._lanes.inline.run_if_well(lambda session: session.mac(data))) is not None:
            return done
        self._refuse_if_away()
        return await _result(self._lanes.submit(lambda bench: bench.run(lambda session: session.mac(data), "HMAC-SHA-256")))

    async def _run(self, key: HeldKey, work: Callable[[Bench], T]) -> T:
        self._refuse_if_away()
        return await _result(self._lanes.submit(work, key))

    def _refuse_if_away(self) -> None:
        if not self._link.is_up:
            raise unavailable()

    def _is_inline(self, data: bytes) -> bool:
        return self._lanes.inline_wanted and len(data) <= _INLINE_BYTES_MAX

    def _submit_generation(self, identity: KeyIdentity, custody: Custody) -> "Future[KeyMaterial]":
        def work(bench: Bench) -> KeyMaterial:
            return bench.run(lambda session: make_key(session, identity, custody), _generation(identity))

        return self._submit_making(identity, work)

    def _submit_making(self, identity: KeyIdentity, work: Callable[[Bench], T]) -> "Future[T]":
        self._refuse_if_away()
        # RSA generation takes seconds: in a lane of its own it delays no signature.
        return self._lanes.generate(work) if identity.spec.key_type is KeyType.RSA else self._lanes.submit(work)

    async def _generate_resident(self, identity: KeyIdentity) -> KeyMaterial:
        await self._take_place(identity.key_id)
        making = _ResidentMaking(identity, self._places)
        try:
            future = self._submit_making(identity, making.make)
        except KmsError:
            self._places.free(identity.key_id)
            raise
        try:
            material = await _result(future)
        except BaseException:
            await uninterrupted(self._undo(making, future))
            raise
        self._places.made(identity.key_id)
        return material

    async def _take_place(self, key_id: KeyId) -> None:
        try:
            self._places.take(key_id)
        except KmsError:
            if not self._places.is_older(_COUNT_SECONDS):
                raise
            await self.residents()
            self._places.take(key_id)

    async def _undo(self, making: "_ResidentMaking", future: "Future[KeyMaterial]") -> None:
        """Remove what *making* left in the token, as soon as it has ended."""
        key_id = making.identity.key_id
        await asyncio.wait((asyncio.ensure_future(_ended(future)),))
        if not making.has_begun:
            self._places.free(key_id)
            return
        # The lane was given up, and its call may still make the key: the mark must stay.
        if making.has_ended:
            for pause in _UNDO_PAUSES_SECONDS:
                try:
                    await self.abandon(key_id)
                except KmsError:
                    await asyncio.sleep(pause)
                else:
                    return
        self._places.made(key_id)
        _log.warning("hsm_key_left", key=str(key_id), what="its mark stays: reconciliation removes both")

    async def _on_objects(self, work: Callable[[TokenSession], T]) -> T:
        self._refuse_if_away()
        return await _result(self._lanes.submit(lambda bench: bench.run_alone(work, "token objects")))

    def _close(self) -> None:
        self._watch.stop()
        self._lanes.close(_CLOSE_SECONDS)
        if not self._link.close(_CLOSE_SECONDS):
            _log.error("hsm_not_closed", why="a call into the module does not return")


async def open_hsm(settings: HsmSettings, *, known: Capabilities | None = None) -> TokenHsm:
    """Connect to the token, find out what it can do, and return the port.

    *known* is what an earlier opening of such a token found out (`TokenHsm.capabilities`); it spares the trials.
    Raises MALFORMED for settings that do not fit each other, HSM_UNAVAILABLE if the token does not answer (after some
    attempts) or must not be used, HSM_KEK_MISSING where `kms hsm init` has not been run. Forbids core dumps of the process.
    """
    settings.check()
    is_memory_locked = protect_memory()
    module = load_module(settings.module)
    module.claim()
    try:
        connection = await _connect_patiently(module, settings)
        capabilities = await asyncio.to_thread(_find_capabilities, connection) if known is None else known
        connection.oaep_hashes = capabilities.oaep_hashes
    except BaseException:
        module.finalise()
        module.release()
        raise
    hsm = TokenHsm(settings, Link(module, settings, connection), capabilities, is_memory_locked=is_memory_locked)
    try:
        await hsm.start()
    except BaseException:
        await hsm.close()
        raise
    return hsm


async def _connect_patiently(module: Module, settings: HsmSettings) -> Connection:
    pause = _RETRY_PAUSE_SECONDS
    for _ in range(settings.start_attempts - 1):
        try:
            return await asyncio.to_thread(connect, module, settings)
        except PinRefusedError:
            raise
        except KmsError as error:
            if error.reason is not Reason.HSM_UNAVAILABLE:
                raise
        await asyncio.sleep(pause)
        pause *= 2
    return await asyncio.to_thread(connect, module, settings)


def _find_capabilities(connection: Connection) -> Capabilities:
    try:
        return find_capabilities(connection)
    except pkcs11.PKCS11Error as error:
        raise translate(error) from None


class _ResidentMaking:
    """The making of one RESIDENT key: counts, marks and makes it in a lane, and says how far that came."""

    def __init__(self, identity: KeyIdentity, places: Places) -> None:
        self.identity = identity
        self.has_begun = False
        self.has_ended = False
        self._places = places

    def make(self, bench: Bench) -> KeyMaterial:
        """Make the key. Raises CUSTODY_UNAVAILABLE where another process has taken the last place."""
        self.has_begun = True
        try:
            bench.run_alone(self._mark, "data objects")
            # RSA generation takes seconds, during which nobody could open a session.
            run = bench.run if self.identity.spec.key_type is KeyType.RSA else bench.run_alone
            return run(self._make, _generation(self.identity))
        finally:
            self.has_ended = True

    def _mark(self, session: TokenSession) -> None:
        self._places.check((*residents.resident_keys(session.raw), self.identity.key_id))
        residents.write_mark(session.raw, self.identity.key_id)

    def _make(self, session: TokenSession) -> KeyMaterial:
        # A first attempt may have failed after it had made the key, and two keys of one id would be none.
        for left in residents.find_resident(session.raw, self.identity.key_id.bytes):
            left.destroy()
        return make_key(session, self.identity, Custody.RESIDENT)


def _generation(identity: KeyIdentity) -> str:
    return f"{identity.spec.key_type} generation"


async def _ended(future: "Future[KeyMaterial]") -> None:
    with suppress(Exception, asyncio.CancelledError):
        await asyncio.wrap_future(future)


async def _result(future: "Future[T]") -> T:
    # Cancelling the waiting cancels work that was not begun; work in progress ends unheard.
    return await asyncio.wrap_future(future)


def _named(algorithm: SignatureAlgorithm) -> str:
    return f"{algorithm.scheme} with {algorithm.hash}" if algorithm.hash else str(algorithm.scheme)
