"""What is published, and who provides it. Pure values and one port."""

import re
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Protocol

from kms.domain.errors import malformed

NAME: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
GENERATION: Final = re.compile(r"[1-9][0-9]{0,5}")


@dataclass(frozen=True, slots=True)
class IssuerPath:
    """The generation of an authority that a path names."""

    name: str
    generation: int

    def __str__(self) -> str:
        return f"{self.name}/{self.generation}"


@dataclass(frozen=True, slots=True)
class Document:
    """A document as it is sent: DER, when it was made, and until when it may be kept. `next_update` None: it is not kept."""

    content: bytes
    this_update: datetime
    next_update: datetime | None


class Publications(Protocol):
    """Provides what is published. Each method raises AUTHORITY_NOT_FOUND for a path that names no authority.

    Each raises STORE_UNAVAILABLE or HSM_UNAVAILABLE only where nothing that is still good is remembered.
    """

    async def certificate(self, issuer: IssuerPath) -> Document:
        """Return the authority's certificate."""
        ...

    async def crl(self, issuer: IssuerPath, shard: int) -> Document:
        """Return the last CRL of a shard; 0 is that of certificates without one. Raises AUTHORITY_NOT_FOUND for no CRL."""
        ...

    async def ocsp(self, issuer: IssuerPath, request: bytes) -> Document:
        """Return the answer to an OCSP request in DER. An answer that is an error is a document that is not kept."""
        ...


def parse_issuer(name: str, generation: str) -> IssuerPath:
    """Return the authority that two parts of a path name, or raise MALFORMED."""
    if not NAME.fullmatch(name) or not GENERATION.fullmatch(generation):
        raise malformed("path", "expected the name of an authority and its generation")
    return IssuerPath(name, int(generation))
