"""A backup: one file, which is a custom-format archive of pg_dump with a manifest behind it.

pg_restore reads it as it is and does not look behind its own end. The file ends `manifest (JSON) ‖ its length, eight bytes,
big-endian ‖ KMSBKUP1`; so a file that was cut off has no manifest, and is none.
"""

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

from kms.store.backup_catalog import Catalog, DatabaseProperties, Membership, Role
from kms.store.errors import unavailable
from kms.store.journal import Head, sync_directory

_MAGIC: Final = b"KMSBKUP1"
_LENGTH_BYTES: Final = 8
_MANIFEST_BYTES_MAX: Final = 64 * 1024 * 1024
_CHUNK_BYTES: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a backup says of itself.

    `created_at` is the database's clock in ISO 8601; `server_version` and `client_version` are PostgreSQL's major ones; `rows`
    are counted in the very snapshot that was dumped; `dump_sha256` is in hex. `journals` are their heads before the dump.
    """

    created_at: str
    server_version: int
    client_version: int
    properties: DatabaseProperties
    roles: tuple[Role, ...]
    memberships: tuple[Membership, ...]
    catalog: Mapping[str, str]
    rows: Mapping[str, int]
    journals: tuple[Head, ...]
    dump_bytes: int = 0
    dump_sha256: str = ""

    @property
    def contents(self) -> Catalog:
        """What a database made from this backup must show."""
        return Catalog(self.catalog, self.rows)


@contextmanager
def new_private_file(path: Path) -> Iterator[Path]:
    """Yield the name of a file of mode 0600 that becomes *path* when the block ends, and is removed when it raises.

    Raises OSError; FileExistsError where *path* is there by then, since a backup is never written over.
    """
    _refuse_overwriting(path)
    handle, name = tempfile.mkstemp(dir=path.absolute().parent, prefix=f".{path.name}.")  # mode 0600 from the start
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        _refuse_overwriting(path)
        temporary.rename(path)
        sync_directory(path.absolute().parent)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def seal(path: Path, manifest: Manifest) -> Manifest:
    """Append *manifest* to the archive in *path*, with the archive's size and SHA-256 filled in."""
    size = path.stat().st_size
    values = {field.name: getattr(manifest, field.name) for field in fields(manifest)}
    complete = Manifest(**{**values, "dump_bytes": size, "dump_sha256": _digest(path, size)})
    content = json.dumps(asdict(complete), sort_keys=True).encode()
    with path.open("ab") as file:
        file.write(content + len(content).to_bytes(_LENGTH_BYTES, "big") + _MAGIC)
    return complete


def read_manifest(path: Path) -> Manifest:
    """Return the manifest of the backup in *path*, whose bytes are all as they were written.

    Raises OSError, and STORE_UNAVAILABLE for what is no backup, is cut off or was damaged.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - _LENGTH_BYTES - len(_MAGIC)))
        end = file.read()
        length = int.from_bytes(end[:_LENGTH_BYTES], "big")
        start = size - len(end) - length
        if not end.endswith(_MAGIC) or length > _MANIFEST_BYTES_MAX or start < 0:
            raise unavailable(f"{path} is no backup made by `kms backup`, or its end is missing")
        file.seek(start)
        manifest = _parsed(file.read(length), path)
    if manifest.dump_bytes != start or manifest.dump_sha256 != _digest(path, start):
        raise unavailable(f"{path} was damaged: its SHA-256 is not that of the backup which was made")
    return manifest


def _refuse_overwriting(path: Path) -> None:
    if path.exists():
        raise FileExistsError(errno.EEXIST, "a backup is never written over a file that is there", str(path))


def _parsed(content: bytes, path: Path) -> Manifest:
    try:
        found: dict[str, Any] = json.loads(content)
        acl = tuple((str(grantee), str(privilege)) for grantee, privilege in found["properties"]["acl"])
        found["properties"] = DatabaseProperties(**{**found["properties"], "acl": acl})
        found["roles"] = tuple(Role(**role) for role in found["roles"])
        found["memberships"] = tuple(Membership(**each) for each in found["memberships"])
        found["journals"] = tuple(Head(**head) for head in found["journals"])
        return Manifest(**found)
    except (ValueError, TypeError, KeyError):
        raise unavailable(f"{path} has a manifest that this program cannot read") from None


def _digest(path: Path, size: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while size > 0 and (chunk := file.read(min(_CHUNK_BYTES, size))):
            digest.update(chunk)
            size -= len(chunk)
    return digest.hexdigest()
