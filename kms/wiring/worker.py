"""A worker, one of the processes of `kms serve --workers N`: `python -m kms.wiring.worker FD`, started by the supervisor."""

import signal
import sys
from multiprocessing.connection import Connection
from typing import Final

from kms.config import ConfigError
from kms.domain.errors import KmsError, Reason
from kms.wiring import collection
from kms.wiring.control import Refusal, Task
from kms.wiring.supervised import Supervised

_MAY_PASS: Final = (Reason.HSM_UNAVAILABLE, Reason.STORE_UNAVAILABLE)


def main(descriptor: int) -> int:
    """Do the task that comes through *descriptor* and return the exit code."""
    # Ctrl-C reaches every process of the terminal; the supervisor says what follows from it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    collection.begin()
    connection = Connection(descriptor)
    try:
        task: Task = connection.recv()
    except EOFError:
        return 1
    # Only now: it loads grpc and the token's driver.
    from kms.wiring import serving

    supervised = Supervised(connection, task.number, task.metrics)
    try:
        serving.serve(task.config, supervised)
    except (KmsError, ConfigError, OSError) as error:
        if supervised.has_served:
            raise
        supervised.say(Refusal(error, may_pass=_may_pass(error)))
        return 1
    finally:
        collection.end()
    return 0


def _may_pass(error: Exception) -> bool:
    """Whether another try may succeed. One with a PIN that was refused would bring the token nearer to locking."""
    from kms.hsm.errors import PinRefusedError

    return isinstance(error, KmsError) and error.reason in _MAY_PASS and not isinstance(error, PinRefusedError)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
