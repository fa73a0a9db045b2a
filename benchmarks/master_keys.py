"""How fast envelopes move to another generation of master keys, beside clients and over two crashes.

A stack of its own gets many keys, half of them secp256k1 and half AES, made in its token. The service moves their envelopes while
a client signs. It is killed at a third and at two thirds. At the end every envelope is opened, and none names the old generation.
What counts is the ratio of the rate to that of the token alone, which moves envelopes without a database in the same run, and
the memory of the service in its last round.

    .venv/bin/python -m benchmarks.master_keys                # 100,000 envelopes
    .venv/bin/python -m benchmarks.master_keys --envelopes 2000
"""

import argparse
import asyncio
import json
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final
from uuid import UUID, uuid4

import grpc
import psycopg

from kms.cli.client import connect
from kms.config import load
from kms.dev.embedded_stack import dev_stack
from kms.dev.stack import Stack
from kms.domain.algorithms import KeySpec, KeyType, Purpose
from kms.domain.ids import KeyId, UserId
from kms.domain.keys import Custody, HeldKey, KeyIdentity, KeyMaterial
from kms.hsm.drill import open_envelopes
from kms.hsm.settings import HsmSettings
from kms.hsm.token_hsm import TokenHsm, open_hsm
from kms.v1 import crypto_pb2, keys_pb2
from kms.wiring.parts import hsm_settings

SPECS: Final = (KeySpec(KeyType.SECP256K1, Purpose.SIGNING, 256), KeySpec(KeyType.AES, Purpose.ENCRYPTION, 256))
IN_FLIGHT: Final = 4
RAW_COUNT: Final = 2000
CLIENT_PAUSE_SECONDS: Final = 0.05
LOOK_SECONDS: Final = 0.5
COPY: Final = """
    COPY cryptography.keys (
        id, user_id, key_name, key_type, key_curve, key_purpose, public_key, encrypted_private_key, key_strength, custody, origin
    ) FROM STDIN
"""
OLD: Final = """
    SELECT count(*) FROM cryptography.keys AS k JOIN cryptography.wrapping_keys AS w
        ON w.id = cryptography.envelope_key(k.encrypted_private_key, 18)
    WHERE k.encrypted_private_key <> '' AND w.generation = 1
"""
ALL: Final = """
    SELECT id, user_id, key_type, key_purpose, key_strength, public_key, encrypted_private_key, custody FROM cryptography.keys
    WHERE bound_to = '' AND key_name ~ '^bench'
"""


@dataclass(frozen=True)
class Sample:
    """How many envelopes were left at a moment, and the memory of the service, in MiB."""

    at: float
    left: int
    mebibytes: float


async def fill(settings: HsmSettings, admin: psycopg.Connection[Any], owner: UserId, count: int) -> list[HeldKey]:
    """Make keys in the token and store them; return some of them."""
    hsm = await open_hsm(settings)
    sample: list[HeldKey] = []
    try:
        for begin in range(0, count, 200):
            keys = await asyncio.gather(*(_new(hsm, owner, begin + number) for number in range(min(200, count - begin))))
            # The end of a COPY holds the event loop up while its rows are stored, and the watchdog ends a loop that stands.
            with admin.cursor() as cursor, cursor.copy(COPY.encode()) as rows:
                for number, key in enumerate(keys):
                    spec, material = key.identity.spec, key.material
                    name, curve = f"bench{begin + number}", spec.curve
                    head = (key.identity.key_id, owner, name, str(spec.key_type), curve, str(spec.purpose))
                    rows.write_row((*head, material.public_key, material.envelope, spec.strength_bits, "WRAPPED", "GENERATED"))
            sample += keys[: max(0, RAW_COUNT - len(sample))]
    finally:
        await hsm.close()
    return sample


async def _new(hsm: TokenHsm, owner: UserId, number: int) -> HeldKey:
    identity = KeyIdentity(KeyId(uuid4()), owner, SPECS[number % len(SPECS)])
    return HeldKey(identity, await hsm.generate(identity, Custody.WRAPPED), version=1)


async def raw_rate(settings: HsmSettings, keys: list[HeldKey]) -> float:
    """Return how many envelopes the token moves a second, through the same lanes and with nothing else to do."""
    hsm = await open_hsm(settings)
    places = asyncio.Semaphore(IN_FLIGHT)

    async def move(key: HeldKey) -> None:
        async with places:
            await hsm.rewrap(key)

    try:
        await hsm.make_under(max(hsm.wrapping_keys().makers))
        begun = time.monotonic()
        await asyncio.gather(*(move(key) for key in keys))
        return len(keys) / (time.monotonic() - begun)
    finally:
        await hsm.close()


@contextmanager
def signing(stack: Stack) -> Iterator[list[int]]:
    """Sign now and then within the block; yields the counts of signatures and of calls that failed."""
    config = load(stack.files.client_configuration, needs=("client",)).client
    assert config is not None
    counts, stopped = [0, 0], threading.Event()

    def sign() -> None:
        with connect(config) as client:
            while not stopped.wait(CLIENT_PAUSE_SECONDS):
                try:
                    client.crypto.Sign(crypto_pb2.SignRequest(key="client", message=b"m"), timeout=10)
                    counts[0] += 1
                except grpc.RpcError:
                    counts[1] += 1

    thread = threading.Thread(target=sign)
    thread.start()
    try:
        yield counts
    finally:
        stopped.set()
        thread.join()


def watched(stack: Stack, admin: psycopg.Connection[Any], until: int) -> list[Sample]:
    """Serve until at most *until* envelopes are left under the old generation, then kill the service; return what was seen."""
    samples: list[Sample] = []
    with suppress(Exception), stack.serving() as service:
        while not samples or samples[-1].left > until:
            row = admin.execute(OLD.encode()).fetchone()
            assert row is not None
            samples.append(Sample(time.monotonic(), row[0], _mebibytes(service.process.pid)))
            time.sleep(LOOK_SECONDS)
        os.kill(service.process.pid, signal.SIGKILL)
        service.process.wait()
    return samples


def _mebibytes(pid: int) -> float:
    """Return the resident memory of a process and all below it."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    own = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    return own + sum(_mebibytes(int(child)) for child in children)


def rate(samples: list[Sample]) -> float:
    """Return envelopes a second between the first and the last sample in which some moved."""
    moving = [sample for before, sample in pairwise(samples) if sample.left < before.left]
    return (moving[0].left - moving[-1].left) / (moving[-1].at - moving[0].at) if len(moving) > 1 else 0.0


def _list(numbers: list[float], digits: int) -> str:
    return ", ".join(f"{number:.{digits}f}" for number in numbers)


def _held(row: tuple[Any, ...]) -> HeldKey:
    spec = KeySpec(KeyType(row[2]), Purpose(row[3]), row[4])
    identity = KeyIdentity(KeyId(row[0]), UserId(row[1]), spec)
    return HeldKey(identity, KeyMaterial(Custody(row[7]), row[5], row[6]), version=1)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--envelopes", type=int, default=100_000)
    count = parser.parse_args().envelopes
    with tempfile.TemporaryDirectory(prefix="kms-bench-", dir="/tmp") as name:
        Path(name).chmod(0o711)
        with dev_stack(Path(name) / "stack", port=0) as stack:
            os.environ.update(stack.environment)
            measure(stack, count)


def measure(stack: Stack, count: int) -> None:
    """Fill the stack, rotate, and print what was seen."""
    config = load(stack.files.configuration, needs=("hsm", "database"))
    settings = hsm_settings(config)
    with psycopg.connect(stack.superuser_dsn, autocommit=True) as admin:
        with stack.serving():
            client_config = load(stack.files.client_configuration, needs=("client",)).client
            assert client_config is not None
            with connect(client_config) as client:
                request = keys_pb2.CreateKeyRequest(
                    name="client", type=keys_pb2.KEY_TYPE_SECP256R1, purpose=keys_pb2.KEY_PURPOSE_SIGNING
                )
                client.keys.CreateKey(request)
        row = admin.execute("SELECT user_id FROM cryptography.keys WHERE key_name = 'client'").fetchone()
        assert row is not None
        owner = UserId(UUID(str(row[0])))
        sample = asyncio.run(fill(settings, admin, owner, count))
        admin.execute("ANALYZE cryptography.keys")
        print(json.loads(stack.kms("kek", "rotate", "--json")))
        # The token alone is measured before and after each round: the machine may be slower in one than in another.
        raw, rounds = [asyncio.run(raw_rate(settings, sample))], []
        with signing(stack) as counts:
            for left in (count * 2 // 3, count // 3, 0):
                rounds.append(watched(stack, admin, left))
                raw.append(asyncio.run(raw_rate(settings, sample)))
        held = [_held(row) for row in admin.execute(ALL.encode())]
        drill = open_envelopes(settings, held)
    rates, memory = [rate(samples) for samples in rounds], [sample.mebibytes for sample in rounds[-1]]
    ratios = [one / ((before + after) / 2) for one, (before, after) in zip(rates, pairwise(raw), strict=True)]
    print(f"{count} envelopes; opened {drill.opened}, missing {len(drill.kek_missing)}, invalid {len(drill.invalid)}")
    print(f"the token alone: {_list(raw, 0)} a second; the service: {_list(rates, 0)}")
    print(f"service : token = {sum(ratios) / len(ratios):.2f} ({_list(ratios, 2)})")
    print(f"memory of the service in its last round: {memory[0]:.0f} to {memory[-1]:.0f} MiB, at most {max(memory):.0f}")
    print(f"signatures of the client {counts[0]}, calls that failed while the service was down {counts[1]}")


if __name__ == "__main__":
    main()
