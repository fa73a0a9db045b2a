"""The demonstration: everything once on real parts, in a temporary directory, checked by other people's code.

A PostgreSQL, a SoftHSM token, a server process, and a client that talks to it over gRPC with mutual TLS. Stops clean on
success, on failure and on Ctrl-C.
"""

import hashlib
import json
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Final, LiteralString, NoReturn

import psycopg
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from google.protobuf.duration_pb2 import Duration

from kms.cli.client import Client, connect
from kms.cli.failures import CallError
from kms.cli.words import key_fields, number, word
from kms.dev import second_opinion
from kms.dev.demo_certificates import certify
from kms.dev.demo_report import Report
from kms.dev.embedded_stack import dev_stack
from kms.dev.stack import Stack
from kms.domain.algorithms import Hash, KeyType, Purpose, Scheme, SignatureForm
from kms.domain.errors import KmsError
from kms.rpc import enums
from kms.v1 import crypto_pb2, keys_pb2, rotation_pb2

MESSAGE: Final = b"pay 5 to Bob"
SECRET: Final = b"the combination of the safe is 12-34-56"
AAD: Final = b"safe 7"
_NONCE: Final = bytes(12)  # the data key of this demonstration encrypts once
_ENVELOPE_CHARACTERS: Final = 24  # of each end
_KEYS: Final = (
    ("ethereum", KeyType.SECP256K1, Purpose.SIGNING, 256),
    ("web", KeyType.SECP256R1, Purpose.SIGNING, 256),
    ("releases", KeyType.ED25519, Purpose.SIGNING, 256),
    ("invoices", KeyType.RSA, Purpose.SIGNING, 2048),
    ("archive", KeyType.RSA, Purpose.SIGNING, 4096),
    ("inbox", KeyType.RSA, Purpose.ENCRYPTION, 2048),
    ("backups", KeyType.AES, Purpose.ENCRYPTION, 256),
)
_SIGNATURES: Final = (
    ("ethereum", Scheme.ECDSA),
    ("web", Scheme.ECDSA),
    ("releases", Scheme.ED25519),
    ("invoices", Scheme.RSA_PKCS1),
    ("invoices", Scheme.RSA_PSS),
    ("archive", Scheme.RSA_PSS),
)
_STORED: Final = """
    SELECT key_name, custody, version::text, encrypted_private_key
    FROM cryptography.keys
    WHERE bound_to = '' -- the service has one of its own, which signs the checkpoints of the trail
    ORDER BY created_at, key_name
"""
_NO_TRIGGERS: Final = "SET session_replication_role = replica"
_SWAP_KEYS: Final = """
    UPDATE cryptography.keys AS one
    SET encrypted_private_key = other.encrypted_private_key, public_key = other.public_key
    FROM cryptography.keys AS other
    WHERE (one.key_name, other.key_name) IN (('web', 'ethereum'), ('ethereum', 'web'))
"""
_LIFT_LIMIT: Final = "UPDATE cryptography.keys SET max_usage_count = 1000000 WHERE key_name = 'web'"
_PUT_BACK: Final = "UPDATE cryptography.keys SET max_usage_count = NULL WHERE key_name = 'web'"
_PERIOD_DAYS: Final = 90
_REMEMBERED_SECONDS: Final = 1.1  # a worker trusts what it read for a second
_NEXT: Final = """

How to go on:
  ./run dev           the same, staying up: it prints commands to paste
  ./run kms --help    all commands, each with examples
  README.md           what is there, and how to run it for real"""


def run(*, as_json: bool = False) -> int:
    """Run the demonstration and return the exit code: 0 only if every check held."""
    report = Report(quiet=as_json)
    with _termination_unwinds(), tempfile.TemporaryDirectory(prefix="kms-demo-") as name:
        directory = Path(name)
        directory.chmod(0o711)  # PostgreSQL's user passes through it to its data
        report.line("Neo KMS: a demonstration on real parts. It takes some tens of seconds and leaves nothing behind.")
        report.heading("PostgreSQL, a SoftHSM token with its wrapping keys, certificates: made and started")
        with dev_stack(directory, port=0) as stack:
            report.heading(f"The server: kms serve, in a process of its own, on {stack.address}")
            with stack.serving(), connect(stack.client) as client:
                report.line("  healthy; the client is known by its certificate")
                demonstrate(client, report)
                certify(stack, report)
                rotate_master_keys(stack, client, report)
                look_inside(stack.superuser_dsn, client, report)
        report.heading("Stopped; nothing is left running.")
    return conclude(report, as_json=as_json)


def demonstrate(client: Client, report: Report) -> None:
    """Do the main job over gRPC: make keys, sign, encrypt, make a data key, rotate. What must hold is checked into *report*."""
    _make_keys(client, report)
    _sign(client, report)
    _sign_recoverable(client, report)
    _encrypt(client, report)
    _encrypt_elsewhere(client, report)
    _use_data_key(client, report)
    _rotate(client, report)
    _rotate_by_policy(client, report)


def rotate_master_keys(stack: Stack, client: Client, report: Report) -> None:
    """Rotate the token's own keys with `kms kek`, while the service runs."""
    report.heading(
        "Master keys (kms kek rotate): every envelope moves to a new generation, inside the token, while the service runs"
    )
    sealed = client.call(client.crypto.Encrypt, crypto_pb2.EncryptRequest(key="backups", plaintext=SECRET)).ciphertext
    stack.kms("kek", "rotate")
    stack.kms("kek", "watch", "--seconds", "0.5")
    stack.kms("kek", "retire", "1")
    old, new = json.loads(stack.kms("kek", "list", "--json"))["generations"]
    states = (old["state"], old["envelopes"], new["state"])
    report.check(
        states == ("retired", 0, "in_use"), f"generation 1 keeps nothing, generation 2 keeps {new['envelopes']} envelopes"
    )
    opened = client.call(client.crypto.Decrypt, crypto_pb2.DecryptRequest(ciphertext=sealed)).plaintext
    report.check(opened == SECRET, "backups   what was sealed before still opens")


def look_inside(superuser_dsn: str, client: Client, report: Report) -> None:
    """Show what the database has of the keys that `demonstrate` made, and what becomes of an edit."""
    _show_stored(superuser_dsn, report)
    _edit_rows(superuser_dsn, client, report)


def _make_keys(client: Client, report: Report) -> None:
    report.heading("One key of each type, made in the token (CreateKey)")
    for name, key_type, purpose, size_bits in _KEYS:
        request = keys_pb2.CreateKeyRequest(
            name=name,
            type=number(enums.KEY_TYPES, key_type),
            purpose=number(enums.PURPOSES, purpose),
            size_bits=size_bits,
        )
        made = key_fields(client.call(client.keys.CreateKey, request).key)
        fits = (made["type"], made["size_bits"], made["state"]) == (key_type, size_bits, "active")
        report.check(fits, f"{name:<9} {key_type:<10} {size_bits:>4} bits  {purpose:<10}  custody {made['custody']}")


def _sign(client: Client, report: Report) -> None:
    report.heading(f"Signatures, made in the token (Sign), checked by the service (Verify) and by {second_opinion.checker()}")
    for name, scheme in _SIGNATURES:
        wanted = number(enums.SCHEMES, scheme)
        signed = client.call(client.crypto.Sign, crypto_pb2.SignRequest(key=name, message=MESSAGE, scheme=wanted))
        verifying = crypto_pb2.VerifyRequest(key=name, message=MESSAGE, signature=signed.signature, scheme=wanted)
        by_service = client.call(client.crypto.Verify, verifying).valid
        verifying.message = MESSAGE + b"0"
        forged = client.call(client.crypto.Verify, verifying).valid
        pem = _public_key(client, name)
        by_other = second_opinion.accepts(pem, scheme, MESSAGE, signed.signature)
        other_forged = second_opinion.accepts(pem, scheme, MESSAGE + b"0", signed.signature)
        what = f"{name:<9} {scheme:<10} {word(enums.HASHES, signed.hash):<8} {len(signed.signature):>3} bytes"
        report.check(by_service and by_other, f"{what}  both say valid")
        report.check(not forged and not other_forged, f"{what}  both refuse it for another message")


def _sign_recoverable(client: Client, report: Report) -> None:
    digest = hashlib.sha256(MESSAGE).digest()
    form = number(enums.FORMS, SignatureForm.RECOVERABLE)
    hash_ = number(enums.HASHES, Hash.KECCAK_256)
    request = crypto_pb2.SignRequest(key="ethereum", digest=digest, hash=hash_, format=form)
    signature = client.call(client.crypto.Sign, request).signature
    recovered = second_opinion.recovers(_public_key(client, "ethereum"), digest, signature)
    report.check(recovered, f"ethereum  r‖s‖v for a digest, v = {signature[-1]}: libsecp256k1 recovers this very key from it")


def _encrypt(client: Client, report: Report) -> None:
    report.heading("Encryption (Encrypt, Decrypt): the ciphertext names its key")
    for name, aad in (("backups", AAD), ("inbox", b"")):
        sealed = client.call(client.crypto.Encrypt, crypto_pb2.EncryptRequest(key=name, plaintext=SECRET, aad=aad)).ciphertext
        opened = client.call(client.crypto.Decrypt, crypto_pb2.DecryptRequest(ciphertext=sealed, aad=aad)).plaintext
        how = "AES-GCM with associated data" if aad else "RSA-OAEP"
        report.check(
            opened == SECRET and SECRET not in sealed,
            f"{name:<9} {how}: {len(SECRET)} bytes sealed into {len(sealed)}, opened again",
        )
        damaged = sealed[:-1] + bytes((sealed[-1] ^ 1,))
        report.check(_refused(client, damaged, aad), f"{name:<9} one flipped bit: CIPHERTEXT_INVALID")
        if aad:
            report.check(_refused(client, sealed, b"safe 8"), f"{name:<9} other associated data: CIPHERTEXT_INVALID")


def _encrypt_elsewhere(client: Client, report: Report) -> None:
    ciphertext = second_opinion.encrypt_oaep_sha1(_public_key(client, "inbox"), SECRET)
    request = crypto_pb2.DecryptRequest(
        ciphertext=ciphertext,
        key="inbox",
        format=crypto_pb2.CIPHERTEXT_FORMAT_RAW_RSA_OAEP,
        oaep_hash=number(enums.HASHES, Hash.SHA_1),
    )
    opened = client.call(client.crypto.Decrypt, request).plaintext
    report.check(opened == SECRET, f"inbox     RSA-OAEP made by {second_opinion.checker()} with the public key: opened")


def _use_data_key(client: Client, report: Report) -> None:
    report.heading("A data key (GenerateDataKey): encrypt as much as you like yourself, keep only the wrapped key")
    made = client.call(client.crypto.GenerateDataKey, crypto_pb2.GenerateDataKeyRequest(key="backups", aad=AAD))
    document = SECRET * 10_000
    sealed = AESGCM(made.plaintext).encrypt(_NONCE, document, None)
    unwrapped = client.call(client.crypto.Decrypt, crypto_pb2.DecryptRequest(ciphertext=made.ciphertext, aad=AAD)).plaintext
    opened = AESGCM(unwrapped).decrypt(_NONCE, sealed, None)
    report.check(opened == document, f"{len(document):,} bytes sealed here by AES-256-GCM, opened with the unwrapped key")
    drawn = client.call(client.crypto.GenerateRandom, crypto_pb2.GenerateRandomRequest(size_bytes=32)).random
    report.check(len(set(drawn)) > 1, "32 random bytes from the token (GenerateRandom)")


def _rotate(client: Client, report: Report) -> None:
    report.heading("Rotation (RotateKey): a successor takes the name, and what the key sealed still opens")
    for name in ("backups", "releases"):
        sealed = b""
        if name == "backups":
            sealed = client.call(client.crypto.Encrypt, crypto_pb2.EncryptRequest(key=name, plaintext=SECRET)).ciphertext
        request = rotation_pb2.RotateKeyRequest(key=name, reason="shown in the demonstration")
        rotation = client.call(client.rotation.RotateKey, request).rotation
        status = rotation_pb2.RotationStatus.Name(rotation.status).removeprefix("ROTATION_STATUS_").lower()
        key = client.call(client.keys.GetKey, keys_pb2.GetKeyRequest(key=name)).key
        is_linked = (key.id, key.predecessor_id) == (rotation.new_key_id, rotation.old_key_id)
        report.check(status == "completed" and is_linked, f"{name:<9} {status}: it is another key now, with {name}@1 before it")
        report.line(f"          log: {rotation.old_key_id} -> {rotation.new_key_id}, {rotation.reason}")
        if sealed:
            opened = client.call(client.crypto.Decrypt, crypto_pb2.DecryptRequest(ciphertext=sealed)).plaintext
            report.check(opened == SECRET, f"{name:<9} what {name}@1 sealed opens")
            moved = client.call(client.crypto.ReEncrypt, crypto_pb2.ReEncryptRequest(ciphertext=sealed))
            found = client.call(client.crypto.Decrypt, crypto_pb2.DecryptRequest(ciphertext=moved.ciphertext))
            is_moved = (found.plaintext, found.key_id) == (SECRET, key.id)
            report.check(is_moved, f"{name:<9} moved to the successor (ReEncrypt): the new ciphertext opens, too")
        else:
            signed = client.call(client.crypto.Sign, crypto_pb2.SignRequest(key=name, message=MESSAGE))
            report.check(signed.key_id == key.id, f"{name:<9} the name signs with the successor")
            old = crypto_pb2.SignRequest(key=f"{name}@1", message=MESSAGE)
            report.check(_reason(client, old) == "KEY_INACTIVE", f"{name:<9} {name}@1 signs no more: KEY_INACTIVE")


def _rotate_by_policy(client: Client, report: Report) -> None:
    report.heading("A policy (SetRotationPolicy): the key is rotated without anybody asking")
    policy = keys_pb2.RotationPolicy(every=Duration(seconds=_PERIOD_DAYS * 86_400), on_compromise=True)
    client.call(client.rotation.SetRotationPolicy, rotation_pb2.SetRotationPolicyRequest(key="releases", policy=policy))
    key = client.call(client.keys.GetKey, keys_pb2.GetKeyRequest(key="releases")).key
    ahead = key.next_rotation_at.ToDatetime() - key.created_at.ToDatetime()
    due = key.next_rotation_at.ToJsonString()
    report.check(ahead.days == _PERIOD_DAYS, f"releases  next rotation {due}, or at once if it is compromised")


def _show_stored(superuser_dsn: str, report: Report) -> None:
    report.heading("What PostgreSQL has of it: an envelope a row, which only this token opens")
    with psycopg.connect(superuser_dsn) as connection:
        rows = connection.execute(_STORED).fetchall()
    for name, custody, version, envelope in rows:
        shown = f"{envelope[:_ENVELOPE_CHARACTERS]}…{envelope[-_ENVELOPE_CHARACTERS:]}"
        report.line(f"  {name:<9} {custody:<8} version {version}  {shown}  ({len(envelope)} characters)")
    names = {name for name, *_ in _KEYS} | {"backups@1", "releases@1"}
    report.check({row[0] for row in rows} == names, f"{len(rows)} rows, one for each key")
    report.check(all(row[3] for row in rows), "every private key is in an envelope")


def _edit_rows(superuser_dsn: str, client: Client, report: Report) -> None:
    report.heading("What if somebody edits the database, as its owner and past every trigger?")
    request = crypto_pb2.SignRequest(key="web", message=MESSAGE)
    with psycopg.connect(superuser_dsn, autocommit=True) as connection:
        connection.execute(_NO_TRIGGERS)

        def reason_after(edit: LiteralString) -> str:
            connection.execute(edit)
            time.sleep(_REMEMBERED_SECONDS)
            return _reason(client, request)

        swapped = reason_after(_SWAP_KEYS)
        report.check(
            swapped == "RECORD_INVALID", "web and ethereum exchange their keys: RECORD_INVALID, no signature by another key"
        )
        report.check(reason_after(_SWAP_KEYS) == "", "back again: signs")
        lifted = reason_after(_LIFT_LIMIT)
        report.check(lifted == "RECORD_INVALID", "the limit of web is another: RECORD_INVALID, its MAC is the token's to make")
        report.check(reason_after(_PUT_BACK) == "", "back again: signs")


def _reason(client: Client, request: crypto_pb2.SignRequest) -> str:
    """Return why *request* is refused; empty if it is not."""
    try:
        client.call(client.crypto.Sign, request)
    except CallError as error:
        return error.reason
    return ""


def _public_key(client: Client, name: str) -> str:
    return client.call(client.keys.GetPublicKey, keys_pb2.GetPublicKeyRequest(key=name)).public_key_pem


def _refused(client: Client, ciphertext: bytes, aad: bytes) -> bool:
    try:
        client.call(client.crypto.Decrypt, crypto_pb2.DecryptRequest(ciphertext=ciphertext, aad=aad))
    except CallError as error:
        return error.reason == "CIPHERTEXT_INVALID"
    return False


def conclude(report: Report, *, as_json: bool) -> int:
    """Say how it ended, and return the exit code: 0 only if every check held."""
    seconds = time.monotonic() - report.began
    if as_json:
        checks = [{"check": " ".join(text.split()), "passed": passed} for text, passed in report.checks]
        print(
            json.dumps(
                {"passed": not report.failed, "seconds": round(seconds, 1), "checks": checks}, indent=2, ensure_ascii=False
            )
        )
    elif report.failed:
        report.line(f"\n{len(report.failed)} of {len(report.checks)} checks FAILED:")
        for text in report.failed:
            report.line(f"  {text}")
    else:
        report.line(f"\nAll {len(report.checks)} checks hold, in {seconds:.0f} seconds.{_NEXT}")
    return 1 if report.failed or not report.checks else 0


@contextmanager
def _termination_unwinds() -> Iterator[None]:
    """Make SIGTERM end the block as Ctrl-C does: through every `finally`."""

    def stop(_number: int, _frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run as a program: `python -m kms.dev.demo [--json]`."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        sys.exit(run(as_json="--json" in given))
    except KeyboardInterrupt:
        print("\nstopped; nothing is left running", file=sys.stderr)
        sys.exit(130)
    except (KmsError, CallError) as error:
        print(f"kms: {error.reason}: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
