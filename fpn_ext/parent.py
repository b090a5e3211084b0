"""A command that another command started, and that is not to outlive it."""

import os
import signal
from collections.abc import MutableMapping

# The environment variable with the process id of the command that started this one.
STARTED_BY = "FPN_EXT_STARTED_BY"

_PR_SET_PDEATHSIG = 1  # prctl(2)


def end_with_the_parent(environment: MutableMapping[str, str]) -> None:
    """Have the system send SIGTERM when the process that started this one ends, even if killed.

    Nothing, unless that process has asked for it with :data:`STARTED_BY`, which is removed: it
    is not for this one's processes. Linux only; elsewhere nothing.

    Raises:
        SystemExit: it has ended already.
    """
    parent = environment.pop(STARTED_BY, "")
    if not parent:
        return
    import ctypes  # here, since every command would wait for it

    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if str(os.getppid()) != parent:  # it ended before the system was asked
            raise SystemExit(128 + signal.SIGTERM)
