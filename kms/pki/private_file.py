"""Files that hold a secret: never readable by another user, not even for a moment, and never half written."""

import os
import tempfile
from pathlib import Path


def write_private(path: Path, content: bytes) -> None:
    """Write *content* to *path* with mode 0400, replacing what is there. Raises OSError.

    The file appears whole under its name or not at all, also if the machine stops in between.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mkstemp: mode 0600 from the start
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(handle)
        os.chmod(temporary, 0o400)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
