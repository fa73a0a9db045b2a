"""Does a client that sends only bad ciphertexts slow the others?

Signing at full speed by some clients, beside others that decrypt: in turn ciphertexts that are good and ones that are not.
What counts is the ratio of the two signing rates, medians of interleaved rounds; good ciphertexts are the fair neighbour.

    .venv/bin/python benchmarks/bad_ciphertexts.py
"""

import platform
import statistics
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import grpc

from kms.cli.client import Client, connect
from kms.config import ClientConfig, load
from kms.dev.embedded_stack import dev_stack
from kms.v1 import crypto_pb2, keys_pb2

SIGNERS: Final = 4
NEIGHBOURS: Final = 4
ROUNDS: Final = 7
ROUND_SECONDS: Final = 3.0


def prepared(client: Client) -> tuple[crypto_pb2.DecryptRequest, crypto_pb2.DecryptRequest]:
    """Make the keys, and return a good and a bad request to decrypt."""
    for name, key_type, purpose in (
        ("sign", keys_pb2.KEY_TYPE_SECP256R1, keys_pb2.KEY_PURPOSE_SIGNING),
        ("seal", keys_pb2.KEY_TYPE_AES, keys_pb2.KEY_PURPOSE_ENCRYPTION),
    ):
        client.keys.CreateKey(keys_pb2.CreateKeyRequest(name=name, type=key_type, purpose=purpose))
    good = client.crypto.Encrypt(crypto_pb2.EncryptRequest(key="seal", plaintext=bytes(100))).ciphertext
    return crypto_pb2.DecryptRequest(ciphertext=good), crypto_pb2.DecryptRequest(ciphertext=good[:-1] + bytes((good[-1] ^ 1,)))


def rates(clients: list[Client], neighbour: crypto_pb2.DecryptRequest) -> tuple[float, float]:
    """Return signatures and decryptions a second, with *neighbour* sent over and over beside the signing."""
    until = time.monotonic() + ROUND_SECONDS
    counts = [0] * len(clients)

    def repeat(number: int, client: Client) -> None:
        sign = crypto_pb2.SignRequest(key="sign", message=b"m")
        while time.monotonic() < until:
            if number < SIGNERS:
                client.crypto.Sign(sign, timeout=10)
            else:
                _decrypt(client, neighbour)
            counts[number] += 1

    threads = [threading.Thread(target=repeat, args=pair) for pair in enumerate(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts[:SIGNERS]) / ROUND_SECONDS, sum(counts[SIGNERS:]) / ROUND_SECONDS


def _decrypt(client: Client, request: crypto_pb2.DecryptRequest) -> None:
    try:
        client.crypto.Decrypt(request, timeout=10)
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.INVALID_ARGUMENT:
            raise


def main() -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory(prefix="kms-bench-", dir="/tmp") as name, ExitStack() as stack:
        Path(name).chmod(0o711)
        embedded = stack.enter_context(dev_stack(Path(name) / "stack", port=0))
        stack.enter_context(embedded.serving())
        config: ClientConfig | None = load(embedded.files.client_configuration, needs=("client",)).client
        assert config is not None
        clients = [stack.enter_context(connect(config)) for _ in range(SIGNERS + NEIGHBOURS)]
        good, bad = prepared(clients[0])
        measured = [(rates(clients, good), rates(clients, bad)) for _ in range(ROUNDS)]
    ratios = [with_bad[0] / with_good[0] for with_good, with_bad in measured]
    print(
        f"{platform.platform()}, Python {platform.python_version()}, {SIGNERS} signing, {NEIGHBOURS} decrypting, {ROUNDS} rounds"
    )
    for label, index in (("good ciphertexts beside", 0), ("bad ciphertexts beside", 1)):
        signing, decrypting = zip(*(each[index] for each in measured), strict=True)
        print(f"{label}: {statistics.median(signing):.0f} signatures/s, {statistics.median(decrypting):.0f} decryptions/s")
    print(f"signing rate, bad : good = {statistics.median(ratios):.2f} (from {min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
