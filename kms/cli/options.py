"""Options that several commands share, so that one thing has one spelling."""

from pathlib import Path
from typing import Annotated

import typer

from kms.cli.output import Encoding
from kms.domain.algorithms import Hash, Scheme, SignatureForm

KeyArgument = Annotated[str, typer.Argument(metavar="KEY", help="A key's name or id.", show_default=False)]
InOption = Annotated[Path | None, typer.Option("--in", metavar="FILE", help="Read this file; - or nothing: standard input.")]
MessageOption = Annotated[
    str | None,
    typer.Option(metavar="TEXT", help="Take this text. Others on this machine may see it: use --in for secrets."),
]
DigestOption = Annotated[str | None, typer.Option(metavar="HEX", help="Take this digest of a message.")]
OutOption = Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write here; - or nothing: standard output.")]
EncodingOption = Annotated[
    Encoding | None, typer.Option(help="How bytes are written. Default: raw, on a terminal base64.", show_default=False)
]
AadOption = Annotated[str | None, typer.Option("--aad", metavar="TEXT", help="Associated data; decrypting wants the same.")]
AadHexOption = Annotated[str | None, typer.Option("--aad-hex", metavar="HEX", help="Associated data in hexadecimal.")]
SchemeOption = Annotated[Scheme | None, typer.Option(help="Default: the key type's own; for rsa: rsa-pss.")]
HashOption = Annotated[Hash | None, typer.Option("--hash", help="Default: sha-256; none for ed25519.")]
OaepHashOption = Annotated[Hash | None, typer.Option("--oaep-hash", help="RSA: default the strongest that the HSM does.")]
AllowCompromisedOption = Annotated[
    bool, typer.Option("--allow-compromised", help="Also with a key that is compromised; needs the role recovery.")
]
AllowRevokedOption = Annotated[
    bool, typer.Option("--allow-revoked", help="Also with a key that is revoked; needs the role recovery.")
]
FormOption = Annotated[SignatureForm | None, typer.Option("--format", help="ECDSA only; default: der.")]
