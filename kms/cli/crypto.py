"""`kms sign`, `verify`, `encrypt`, `decrypt`, `datakey`, `random`: using keys."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kms.cli import options
from kms.cli.failures import ExitCode
from kms.cli.inputs import STDIN, Input, from_base64, from_hex, read_aad, read_encoded, read_file, read_input
from kms.cli.invocation import Invocation, command
from kms.cli.output import (
    STDOUT,
    Encoding,
    json_bytes,
    print_json,
    text_of,
    write_bytes,
    write_plaintext,
)
from kms.domain.algorithms import Hash, Scheme, SignatureForm

if TYPE_CHECKING:
    from kms.v1 import crypto_pb2

_SIGNATURE_BYTES_MAX = 4096


def sign(
    invocation: Invocation,
    key: options.KeyArgument,
    file: options.InOption = None,
    message: options.MessageOption = None,
    digest: options.DigestOption = None,
    scheme: options.SchemeOption = None,
    hash_: options.HashOption = None,
    form: options.FormOption = None,
    out: options.OutOption = None,
    encoding: options.EncodingOption = None,
) -> None:
    """Sign a message of at most 64 KiB, or a digest of any."""
    with invocation.client() as client:
        from kms.cli.words import word
        from kms.rpc import enums
        from kms.v1 import crypto_pb2

        given = read_input(file, message, digest)
        request = crypto_pb2.SignRequest(key=key, **_input_field(given))
        _set_algorithm(request, scheme, hash_, form)
        signed = client.call(client.crypto.Sign, request)
    if not invocation.as_json:
        write_bytes(signed.signature, out, encoding)
        return
    made_by = {"scheme": word(enums.SCHEMES, signed.scheme), "hash": word(enums.HASHES, signed.hash)}
    print_json({"key_id": signed.key_id, **made_by, **json_bytes("signature", signed.signature, encoding, out)})


def verify(
    invocation: Invocation,
    key: options.KeyArgument,
    signature_file: Annotated[Path | None, typer.Option("--signature", metavar="FILE", help="The signature's bytes.")] = None,
    signature_hex: Annotated[str | None, typer.Option(metavar="HEX", help="The signature.")] = None,
    signature_base64: Annotated[str | None, typer.Option(metavar="TEXT", help="The signature.")] = None,
    file: options.InOption = None,
    message: options.MessageOption = None,
    digest: options.DigestOption = None,
    scheme: options.SchemeOption = None,
    hash_: options.HashOption = None,
    form: options.FormOption = None,
    require_low_s: Annotated[bool, typer.Option("--require-low-s", help="ECDSA: a high-S signature is not valid.")] = False,
) -> None:
    """Verify a signature, whatever state the key is in.

    Ends with 0 if the signature is valid, and with 6 if it is well-formed but not valid.
    """
    from_stdin = file == STDIN or (file is None and message is None and digest is None)
    if signature_file == STDIN and from_stdin:
        raise typer.BadParameter("the message and the signature cannot both come from standard input")
    with invocation.client() as client:
        from kms.v1 import crypto_pb2

        signature = _read_signature(signature_file, signature_hex, signature_base64)
        given = read_input(file, message, digest)
        request = crypto_pb2.VerifyRequest(key=key, signature=signature, require_low_s=require_low_s, **_input_field(given))
        _set_algorithm(request, scheme, hash_, form)
        found = client.call(client.crypto.Verify, request)
    if invocation.as_json:
        print_json({"key_id": found.key_id, "valid": found.valid})
    else:
        print("valid" if found.valid else "not valid")
    if not found.valid:
        raise typer.Exit(ExitCode.NOT_VALID)


def encrypt(
    invocation: Invocation,
    key: options.KeyArgument,
    file: options.InOption = None,
    message: options.MessageOption = None,
    aad: options.AadOption = None,
    aad_hex: options.AadHexOption = None,
    oaep_hash: options.OaepHashOption = None,
    out: options.OutOption = None,
    encoding: options.EncodingOption = None,
) -> None:
    """Encrypt at most 64 KiB with an AES key, or a little with an RSA key. The ciphertext names its key."""
    with invocation.client() as client:
        from kms.cli.words import number
        from kms.rpc import enums
        from kms.v1 import crypto_pb2

        associated = read_aad(aad, aad_hex)
        plaintext = read_input(file, message).data
        request = crypto_pb2.EncryptRequest(
            key=key, plaintext=plaintext, aad=associated, oaep_hash=number(enums.HASHES, oaep_hash)
        )
        found = client.call(client.crypto.Encrypt, request)
    if invocation.as_json:
        print_json({"key_id": found.key_id, **json_bytes("ciphertext", found.ciphertext, encoding, out)})
    else:
        write_bytes(found.ciphertext, out, encoding)


def decrypt(
    invocation: Invocation,
    file: options.InOption = None,
    in_encoding: Annotated[Encoding, typer.Option(help="How the input is written.")] = Encoding.RAW,
    key: Annotated[str | None, typer.Option(metavar="KEY", help="Refuse a ciphertext of another key than this.")] = None,
    aad: options.AadOption = None,
    aad_hex: options.AadHexOption = None,
    raw_oaep: Annotated[
        bool, typer.Option("--raw-oaep", help="The input is bare RSA-OAEP made elsewhere; needs --key and --oaep-hash.")
    ] = False,
    oaep_hash: options.OaepHashOption = None,
    allow_compromised: options.AllowCompromisedOption = False,
    allow_revoked: options.AllowRevokedOption = False,
    out: options.OutOption = None,
    encoding: options.EncodingOption = None,
) -> None:
    """Decrypt a ciphertext. It finds its key by itself.

    The plaintext is written alone; a file gets mode 0600. What a compromised or revoked key opens is told to auditors.
    """
    with invocation.client() as client:
        from kms.cli.words import number
        from kms.rpc import enums
        from kms.v1 import crypto_pb2

        associated = read_aad(aad, aad_hex)
        form = crypto_pb2.CIPHERTEXT_FORMAT_RAW_RSA_OAEP if raw_oaep else crypto_pb2.CIPHERTEXT_FORMAT_UNSPECIFIED
        request = crypto_pb2.DecryptRequest(
            ciphertext=read_encoded(file or STDIN, in_encoding),
            aad=associated,
            key=key or "",
            format=form,
            oaep_hash=number(enums.HASHES, oaep_hash),
            allow_compromised=allow_compromised,
            allow_revoked=allow_revoked,
        )
        found = client.call(client.crypto.Decrypt, request)
    if invocation.as_json and (out is None or out == STDOUT):
        print_json({"key_id": found.key_id, **json_bytes("plaintext", found.plaintext, encoding, out)})
        return
    write_plaintext(found.plaintext, out, encoding)
    if invocation.as_json:
        print_json({"key_id": found.key_id, "plaintext_file": str(out)})


def datakey(
    invocation: Invocation,
    key: options.KeyArgument,
    size_bytes: Annotated[int, typer.Option("--size", metavar="BYTES", min=16, max=64, help="How long a key.")] = 32,
    aad: options.AadOption = None,
    aad_hex: options.AadHexOption = None,
    plaintext_out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the key itself here, mode 0600; -: standard output.")
    ] = None,
    out: options.OutOption = None,
    encoding: options.EncodingOption = None,
) -> None:
    """Make a data key, encrypted under an AES key; in the clear only where --plaintext-out says.

    The encrypted data key goes to --out or standard output: `kms decrypt` opens it again.
    """
    if plaintext_out == STDOUT and not invocation.as_json and (out is None or out == STDOUT):
        raise typer.BadParameter("--plaintext-out - needs --out FILE: the two keys do not mix on standard output")
    with invocation.client() as client:
        from kms.v1 import crypto_pb2

        request = crypto_pb2.GenerateDataKeyRequest(
            key=key, size_bytes=size_bytes, aad=read_aad(aad, aad_hex), without_plaintext=plaintext_out is None
        )
        made = client.call(client.crypto.GenerateDataKey, request)
    if invocation.as_json:
        print_json(_data_key_fields(made, plaintext_out, out, encoding))
        return
    # The ciphertext first: failing in between must not leave a key in the clear behind.
    write_bytes(made.ciphertext, out, encoding)
    if plaintext_out is not None:
        write_bytes(made.plaintext, plaintext_out, encoding, private=True)


def random(
    invocation: Invocation,
    size_bytes: Annotated[int, typer.Argument(metavar="BYTES", min=1, max=65536, help="How many.", show_default=False)],
    out: options.OutOption = None,
    encoding: options.EncodingOption = None,
) -> None:
    """Draw random bytes from the HSM."""
    with invocation.client() as client:
        from kms.v1 import crypto_pb2

        drawn = client.call(client.crypto.GenerateRandom, crypto_pb2.GenerateRandomRequest(size_bytes=size_bytes)).random
    if invocation.as_json and (out is None or out == STDOUT):
        print_json(json_bytes("random", drawn, encoding, out))
        return
    write_bytes(drawn, out, encoding, private=True)
    if invocation.as_json:
        print_json({"random_file": str(out)})


def register(app: typer.Typer) -> None:
    """Add these commands to *app*."""
    command(
        app,
        "sign",
        "kms sign payments --message 'pay 5 to Bob' --encoding hex",
        "kms sign invoices --in invoice.pdf.txt --scheme rsa-pkcs1 --out invoice.sig",
        "kms sign payments --digest $(sha256sum big.iso | cut -c 1-64) --json",
    )(sign)
    command(
        app,
        "verify",
        "kms verify invoices --in invoice.pdf.txt --scheme rsa-pkcs1 --signature invoice.sig",
        "kms verify payments --message 'pay 5 to Bob' --signature-hex 3045… || echo forged",
    )(verify)
    command(
        app,
        "encrypt",
        "kms encrypt backups --in secret.txt --out secret.kms",
        "printf secret | kms encrypt backups --aad row-17 --encoding base64",
    )(encrypt)
    command(
        app,
        "decrypt",
        "kms decrypt --in secret.kms --out secret.txt",
        "printf secret | kms encrypt backups | kms decrypt",
        "kms decrypt --in mail.oaep --raw-oaep --key inbox --oaep-hash sha-1",
    )(decrypt)
    command(
        app,
        "datakey",
        "kms datakey backups --out data.key.kms",
        "kms datakey backups --plaintext-out data.key --out data.key.kms",
        "kms decrypt --in data.key.kms --out data.key",
    )(datakey)
    command(app, "random", "kms random 32 --encoding hex", "kms random 1024 --out seed.bin")(random)


def _input_field(given: Input) -> dict[str, Any]:
    return {"digest" if given.is_digest else "message": given.data}


def _set_algorithm(
    request: "crypto_pb2.SignRequest | crypto_pb2.VerifyRequest",
    scheme: Scheme | None,
    hash_: Hash | None,
    form: SignatureForm | None,
) -> None:
    from kms.cli.words import number
    from kms.rpc import enums

    request.scheme = number(enums.SCHEMES, scheme)
    request.hash = number(enums.HASHES, hash_)
    request.format = number(enums.FORMS, form)


def _read_signature(file: Path | None, hexadecimal: str | None, base64: str | None) -> bytes:
    if sum(given is not None for given in (file, hexadecimal, base64)) != 1:
        raise typer.BadParameter("give exactly one of --signature, --signature-hex and --signature-base64")
    if hexadecimal is not None:
        return from_hex(hexadecimal, "--signature-hex")
    if base64 is not None:
        return from_base64(base64, "--signature-base64")
    return read_file(file or STDIN, bytes_max=_SIGNATURE_BYTES_MAX)


def _data_key_fields(
    made: "crypto_pb2.GenerateDataKeyResponse", plaintext_out: Path | None, out: Path | None, encoding: Encoding | None
) -> dict[str, str]:
    fields = {"key_id": made.key_id, **json_bytes("ciphertext", made.ciphertext, encoding, out)}
    if plaintext_out == STDOUT:
        fields["plaintext"] = text_of(made.plaintext, encoding)
        fields["encoding"] = Encoding.HEX if encoding is Encoding.HEX else Encoding.BASE64
    elif plaintext_out is not None:
        write_bytes(made.plaintext, plaintext_out, encoding, private=True)
        fields["plaintext_file"] = str(plaintext_out)
    return fields
