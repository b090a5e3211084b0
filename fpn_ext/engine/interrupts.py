"""Signals that stop a training without loss: SIGTERM, SIGINT, SIGHUP, and one that the user names.

The first is noted: the iteration is finished, a checkpoint written (:mod:`fpn_ext.engine.loop`),
and the process exits with 128 + the signal's number, as shells count. A second one ends at once.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, NoReturn

from detectron2.utils import comm

# SIGHUP is of a terminal that was closed, or a connection that was lost.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# What batch schedulers send to all processes of a job at once.
_OF_SCHEDULERS = (*SIGNALS, signal.SIGUSR1, signal.SIGUSR2)
# Seconds within which several count as one: a terminal and a launcher may both send it.
SAME = 1.0


class Interrupted(BaseException):
    """Ends a training at a point where nothing is lost. Not an Exception: it is no error.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number

    @property
    def name(self) -> str:
        return signal.Signals(self.number).name

    @property
    def status(self) -> int:
        """The exit status, as shells count: 128 + the signal's number."""
        return 128 + self.number


class Interrupts:
    """The signal that asked this process to stop, if any; of :func:`interruptible`.

    Args:
        active: signals are noted, so that processes have to ask one another.

    Attributes:
        raised (bool): :class:`Interrupted` was raised here.
    """

    def __init__(self, active: bool = False) -> None:
        self.active = active
        self.raised = False
        self._number = 0
        self._noted_at = 0.0
        self._at_once = False

    def note(self, number: int, frame: FrameType | None = None) -> None:
        """A signal handler: remember the first signal; end the process at a second one."""
        now = time.monotonic()
        if not self._number:
            self._number, self._noted_at = number, now
            _say(
                f"{signal.Signals(number).name}: finishing the iteration and writing a checkpoint; "
                "a second signal ends at once"
            )
            if self._at_once:
                self._raise(number)
        elif now - self._noted_at > SAME:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def check(self) -> None:
        """Raise :class:`Interrupted` in all processes if one of them was asked to stop.

        Called by all processes, at the same point.
        """
        if self.active and (number := max(comm.all_gather(self._number))):
            self._raise(number)

    def _raise(self, number: int) -> NoReturn:
        self.raised = True
        raise Interrupted(number)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """A block that a signal interrupts where it is, unless other processes would then wait."""
        if comm.get_world_size() > 1:
            yield
            return
        self._at_once = True
        try:
            self.check()
            yield
        finally:
            self._at_once = False


@contextlib.contextmanager
def handled_by(handler: Callable[[int, FrameType | None], Any], signals: Sequence[int]) -> Iterator:
    """A block in which a function handles signals; those that are ignored stay ignored.

    So do those with a handler that is not Python's, which could not be put back.

    Commands in the background of a script, for instance, ignore SIGINT. Outside a process's main
    thread, where Python handles no signals, nothing changes.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in signals:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


@contextlib.contextmanager
def ended_in_order() -> Iterator[None]:
    """A block that SIGTERM and SIGHUP end as Ctrl-C does: through every ``finally``.

    Raises:
        SystemExit: such a signal came, with its exit status.
    """

    def end(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    with handled_by(end, (signal.SIGTERM, signal.SIGHUP)):
        yield


@contextlib.contextmanager
def interruptible(also: Sequence[int] = ()) -> Iterator[Interrupts]:
    """A block in which signals are noted.

    Args:
        also: numbers of further signals than :data:`SIGNALS`.
    """
    interrupts = Interrupts(active=True)
    with handled_by(interrupts.note, [*SIGNALS, *also]):
        yield interrupts


def leave_signals_to_the_trainer(worker: int) -> None:
    """In a process that loads data: ignore what the trainer's process reacts to.

    A terminal and batch schedulers send a signal to all processes at once; without its loaders a
    training could not finish an iteration. SIGTERM from the trainer's process itself, which ends
    its loaders so, still ends this one.

    Args:
        worker: its number, as PyTorch calls a ``worker_init_fn``.
    """
    for number in range(1, signal.NSIG):
        if number in _OF_SCHEDULERS or callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_IGN if number != signal.SIGTERM else signal.SIG_DFL)
    # Blocked, it waits for the thread, which asks for the sender; a handler is not told.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_if_told_by, args=(os.getppid(),), daemon=True).start()


def _end_if_told_by(process: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != process:
        pass
    os._exit(128 + signal.SIGTERM)


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # the terminal is gone
        os.write(sys.stderr.fileno(), f"{text}\n".encode())  # print is not for signal handlers
