"""Child processes that live no longer than their parent, however it dies.

A shell stands between the two and waits for the end of a pipe, which the kernel closes with the parent; then it sends the child
the signal to stop.
"""

import signal
from typing import Final

# $1 is the signal, $2… the child's command line; standard input is the pipe.
_WATCH: Final = 'how=$1; shift; exec 3<&0 </dev/null; "$@" 3<&- & child=$!; (read -r _ <&3; kill -"$how" $child) & watch=$!; \
exec 3<&-; wait $child; code=$?; kill $watch 2>/dev/null; exit $code'


def bound(command: list[str], stop: signal.Signals) -> list[str]:
    """Return the command line that runs *command* until its standard input ends, and then sends it *stop*.

    Start it with a pipe as standard input; closing the pipe stops the child. The exit code is the child's.
    """
    return ["/bin/sh", "-c", _WATCH, "kms-bound", str(int(stop)), *command]
