"""Opens stored keys with the token's PIN alone, by what `docs/formats.md` says: what an owner of both could do.

Written without the service's code, so that it also proves the page right. Run as a process of its own (a PKCS#11 module is
state of the process): rows as JSON on standard input, private key bytes in hex as JSON on standard output.
"""

import base64
import hashlib
import json
import sys
from typing import Any

import pkcs11
from cryptography.hazmat.primitives.serialization import load_der_private_key
from pkcs11 import Attribute, GCMParams, Mechanism, ObjectClass
from pkcs11.constants import DEFAULT

_TYPES = {"secp256k1": pkcs11.KeyType.EC, "secp256r1": pkcs11.KeyType.EC, "rsa": pkcs11.KeyType.RSA, "aes": pkcs11.KeyType.AES}
_READABLE = {Attribute.SENSITIVE: False, Attribute.EXTRACTABLE: True}
_PRIVATE = {Attribute.ENCRYPT: DEFAULT, Attribute.VERIFY: DEFAULT, Attribute.WRAP: DEFAULT}


def secrets_of(session: Any, row: dict[str, Any]) -> list[bytes]:  # noqa: ANN401 - a class of the binding's own
    """Return the secret numbers of the key in *row*: what must be nowhere in the clear."""
    raw = base64.b64decode(row["encrypted_private_key"])
    kek_id, sealing_id, nonce, sealed = raw[2:18], raw[18:34], raw[34:46], raw[46:]
    parts = [
        b"key",
        raw[:1],
        bytes.fromhex(row["id"].replace("-", "")),
        bytes.fromhex(row["user_id"].replace("-", "")),
        *(str(row[name] or "").encode() for name in ("key_type", "key_curve", "key_strength", "key_purpose")),
        *(str(row[name]).encode() for name in ("bound_to", "custody", "origin")),
        kek_id,
        sealing_id,
        hashlib.sha256(row["public_key"].encode()).digest(),
    ]
    aad = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
    (sealing_key,) = session.get_objects({Attribute.ID: sealing_id, Attribute.CLASS: ObjectClass.SECRET_KEY})
    inner = bytes(sealing_key.decrypt(sealed, mechanism=Mechanism.AES_GCM, mechanism_param=GCMParams(nonce, aad, 128)))
    if row["custody"] == "SEALED":
        return [_without_header(inner)]
    (kek,) = session.get_objects({Attribute.ID: kek_id, Attribute.CLASS: ObjectClass.SECRET_KEY})
    is_secret = row["key_type"] == "aes"
    key = kek.unwrap_key(
        ObjectClass.SECRET_KEY if is_secret else ObjectClass.PRIVATE_KEY,
        _TYPES[row["key_type"]],
        inner,
        mechanism=Mechanism.AES_KEY_WRAP_PAD,
        template=_READABLE if is_secret else {**_READABLE, **_PRIVATE},
    )
    names = (Attribute.PRIVATE_EXPONENT, Attribute.PRIME_1, Attribute.PRIME_2) if row["key_type"] == "rsa" else (Attribute.VALUE,)
    return [bytes(key[name]) for name in names]


def _without_header(inner: bytes) -> bytes:
    try:
        return load_der_private_key(inner, None).private_bytes_raw()  # type: ignore[union-attr]
    except ValueError:
        return inner[-32:]


def main() -> None:
    """Read the order, print the secrets."""
    order = json.load(sys.stdin)
    token = pkcs11.lib(order["module"]).get_token(token_label=order["token_label"])
    with token.open(rw=True, user_pin=order["pin"]) as session:
        json.dump([[secret.hex() for secret in secrets_of(session, row)] for row in order["rows"]], sys.stdout)


if __name__ == "__main__":
    main()
