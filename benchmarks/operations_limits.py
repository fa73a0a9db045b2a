"""The limits that `operations.py` measures beside the service: an echo over mutual TLS, the token alone, durable commits."""

import asyncio
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Final
from uuid import uuid4

import grpc
import psycopg
import uvloop

from benchmarks.operations_calls import ECHO, MESSAGE, PLAINTEXT
from benchmarks.operations_load import Child
from kms.app.ports import Sealed
from kms.dev.softhsm import SoftToken, soft_token
from kms.domain.algorithms import DIGEST_BYTES, Hash, KeySpec, KeyType, Purpose, SignatureAlgorithm, signature_algorithm
from kms.domain.ids import KeyId, UserId
from kms.domain.keys import Custody, HeldKey, KeyIdentity
from kms.domain.secret import Secret
from kms.hsm.connection import connect
from kms.hsm.envelopes import Handle, make_key, open_key
from kms.hsm.module import load_module
from kms.hsm.operations import sign
from kms.hsm.session import TokenSession, decrypt_gcm, encrypt_gcm
from kms.hsm.settings import HsmSettings
from kms.pki.trust import TrustFiles

COMMITTERS: Final = 32
_AAD: Final = bytes(17)
_SPECS: Final = {
    "sign-secp256k1": KeySpec(KeyType.SECP256K1, Purpose.SIGNING, 256),
    "sign-secp256r1": KeySpec(KeyType.SECP256R1, Purpose.SIGNING, 256),
    "sign-ed25519": KeySpec(KeyType.ED25519, Purpose.SIGNING, 256),
    "sign-rsa-2048": KeySpec(KeyType.RSA, Purpose.SIGNING, 2048),
}
Work = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Driven:
    """How often the token did something, in how many seconds, with how much processor time of its process."""

    times: int
    seconds: float
    cpu_seconds: float


@contextmanager
def echo_server(processes: int, tls: TrustFiles, address: str) -> Iterator[list[int]]:
    """Serve the echo on *address* in *processes*, with the service's certificates; yield their process ids."""
    children = [Child(_echo, tls, address, processes > 1) for _ in range(processes)]
    try:
        for child in children:
            child.answer()
        yield [child.pid for child in children]
    finally:
        for child in children:
            child.stop()


def _echo(pipe: Pipe, tls: TrustFiles, address: str, is_shared: bool) -> None:  # a process takes positions only
    uvloop.run(_serve_echo(pipe, tls, address, is_shared=is_shared))


async def _serve_echo(pipe: Pipe, tls: TrustFiles, address: str, *, is_shared: bool) -> None:
    async def echo(body: bytes, _: object) -> bytes:
        return body

    server = grpc.aio.server(options=[("grpc.so_reuseport", int(is_shared))])
    service, _, method = ECHO.removeprefix("/").partition("/")
    handlers = {method: grpc.unary_unary_rpc_method_handler(echo)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    pair = (tls.key.read_bytes(), tls.certificate.read_bytes())
    server.add_secure_port(address, grpc.ssl_server_credentials([pair], tls.client_ca.read_bytes(), True))
    await server.start()
    pipe.send(None)
    await server.wait_for_termination()


class TokenProcesses:
    """Processes that drive copies of the service's token and nothing else."""

    def __init__(self, children: list[Child]) -> None:
        self._children = children
        self.version = str([child.answer() for child in children].pop())

    def drive(self, work: str, *, threads: int, seconds: float) -> Driven:
        """Let *threads* in each process do *work* over and over."""
        for child in self._children:
            child.send((work, threads, seconds))
        parts: list[Driven] = [child.answer() for child in self._children]
        return Driven(sum(part.times for part in parts), seconds, sum(part.cpu_seconds for part in parts))


@contextmanager
def token_processes(processes: int, threads_max: int, copy: SoftToken) -> Iterator[TokenProcesses]:
    """Log in to *copy*, a token that holds the wrapping keys of the service's, in *processes*."""
    children = [Child(_drive, threads_max, str(copy.directory), copy.label) for _ in range(processes)]
    try:
        yield TokenProcesses(children)
    finally:
        for child in children:
            child.stop()


def _drive(pipe: Pipe, threads_max: int, directory: str, label: str) -> None:
    token = soft_token(Path(directory), label)
    os.environ |= token.environment
    settings = HsmSettings(token.module, label, Secret(token.pin_file.read_bytes().strip()))
    connection = connect(load_module(token.module), settings)
    benches = [_works(connection.open_session()) for _ in range(threads_max)]
    library = connection.module.library
    pipe.send(f"{library.manufacturer_id} {'.'.join(map(str, library.library_version))}")
    while True:
        name, threads, seconds = pipe.recv()
        pipe.send(_together([bench[name] for bench in benches[:threads]], seconds))


def _works(session: TokenSession) -> dict[str, Work]:
    """Return the token's part of each operation, as the service has it done, with keys loaded in *session*."""
    aes = _loaded(session, KeySpec(KeyType.AES, Purpose.ENCRYPTION, 256), Custody.WRAPPED)
    sealed = Sealed(*encrypt_gcm(session.raw, aes.key, PLAINTEXT, _AAD))

    def data_key() -> object:
        return encrypt_gcm(session.raw, aes.key, session.raw.generate_random(256), _AAD)

    def create() -> object:
        return make_key(session, _identity(_SPECS["sign-secp256k1"]), Custody.WRAPPED)

    works: dict[str, Work] = {
        "encrypt": lambda: encrypt_gcm(session.raw, aes.key, PLAINTEXT, _AAD),
        "decrypt": lambda: decrypt_gcm(aes.key, sealed.nonce, sealed.body, _AAD),
        "generate-data-key": data_key,
        "create-key": create,
    }
    for name, spec in _SPECS.items():
        # SoftHSM 2.6.1 wraps no Ed25519 key.
        custody = Custody.SEALED if spec.key_type is KeyType.ED25519 else Custody.WRAPPED
        algorithm = signature_algorithm(spec.key_type, None, None)
        works[name] = _signing(_loaded(session, spec, custody), algorithm)
    return works


def _signing(handle: Handle, algorithm: SignatureAlgorithm) -> Work:
    data = MESSAGE if algorithm.hash is None else bytes(DIGEST_BYTES[Hash(algorithm.hash)])
    return lambda: sign(handle, algorithm, data)


def _loaded(session: TokenSession, spec: KeySpec, custody: Custody) -> Handle:
    identity = _identity(spec)
    return open_key(session, HeldKey(identity, make_key(session, identity, custody), version=1))


def _identity(spec: KeySpec) -> KeyIdentity:
    return KeyIdentity(KeyId(uuid4()), UserId(uuid4()), spec)


def _together(works: list[Work], seconds: float) -> Driven:
    times = [0] * len(works)
    until = time.monotonic() + seconds

    def repeat(number: int, work: Work) -> None:
        while time.monotonic() < until:
            work()
            times[number] += 1

    cpu_before = time.process_time()
    threads = [threading.Thread(target=repeat, args=pair) for pair in enumerate(works)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return Driven(sum(times), seconds, time.process_time() - cpu_before)


class Commits:
    """Durable commits of one row each, in a database of their own on the service's server."""

    def __init__(self, superuser_dsn: str) -> None:
        self._dsn = psycopg.conninfo.make_conninfo(superuser_dsn, dbname="limits")
        with psycopg.connect(superuser_dsn, autocommit=True) as connection:
            connection.execute("CREATE DATABASE limits")
            row = connection.execute("SHOW server_version").fetchone()
        assert row is not None
        self.server_version = str(row[0])
        with psycopg.connect(self._dsn) as connection:
            connection.execute("CREATE TABLE commits (n bigint)")

    def rate(self, clients: int, seconds: float) -> float:
        """Return how many rows a second *clients* commit, each by itself: the server lets them share a flush."""
        return asyncio.run(self._rate(clients, seconds))

    async def _rate(self, clients: int, seconds: float) -> float:
        connections = [await psycopg.AsyncConnection.connect(self._dsn, autocommit=True) for _ in range(clients)]
        until = time.monotonic() + seconds

        async def repeat(connection: psycopg.AsyncConnection) -> int:
            times = 0
            while time.monotonic() < until:
                await connection.execute("INSERT INTO commits VALUES (%s)", (times,), prepare=True)
                times += 1
            return times

        done = await asyncio.gather(*(repeat(connection) for connection in connections))
        for connection in connections:
            await connection.close()
        return sum(done) / seconds
