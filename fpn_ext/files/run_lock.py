"""One training or evaluation at a time in a folder: locks that end with their process."""

import contextlib
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

LOCK = "run.lock"
TURN = ".turn.lock"

_ours: set[Path] = set()  # folders that this process is in

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def only_one_in(folder: Path) -> Iterator[None]:
    """A block that one process at a time is in, for a folder, which is made, and removed if empty.

    The system holds the lock for this process alone, not for those it starts: a worker that
    outlives a killed training does not keep others out. The file says who is in.

    Raises:
        ValueError: another process is in; names its number, machine and start.
    """
    is_new = not folder.is_dir()
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / LOCK
    descriptor = _locked(file)
    if descriptor is None:
        yield
        return
    _ours.add(folder.resolve())
    try:
        _say_who(descriptor)
        yield
    finally:
        _ours.discard(folder.resolve())
        file.unlink(missing_ok=True)  # before the lock is given back: nobody else is in
        os.close(descriptor)
        if is_new:
            with contextlib.suppress(OSError):  # something was written
                folder.rmdir()


@contextlib.contextmanager
def in_turn(folder: Path) -> Iterator[None]:
    """A block that one process at a time is in, for a folder, which is made; others wait.

    The lock is as that of :func:`only_one_in`, in another file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / TURN
    descriptor = _locked(file, wait=True)
    if descriptor is None:
        yield
        return
    try:
        _say_who(descriptor)
        yield
    finally:
        file.unlink(missing_ok=True)  # before the lock is given back
        os.close(descriptor)


def is_in_use(folder: Path) -> bool:
    """Whether a process is in a block of :func:`only_one_in`, another than this one."""
    if folder.resolve() in _ours:  # closing any descriptor of the file would give our lock back
        return False
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    except OSError:  # this file system has no locks
        return False
    finally:
        os.close(descriptor)
    return False


def _say_who(descriptor: int) -> None:
    about = {
        "pid": os.getpid(),
        "machine": socket.gethostname(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(about).encode(), 0)


def _locked(file: Path, wait: bool = False) -> int | None:
    """An open file with this process's lock on it; None where the file system has no locks."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                holder = _holder(os.pread(descriptor, 4096, 0))
                if not wait:
                    os.close(descriptor)
                    raise ValueError(
                        f"OUTPUT_DIR {file.parent} is in use: {holder} is training into it. Name "
                        "another OUTPUT_DIR, or wait until it ends"
                    ) from None
                logger.warning("%s: %s writes there, and is waited for", file.parent, holder)
                fcntl.lockf(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            logger.warning("%s: this file system has no locks (%s)", file, error.strerror)
            os.close(descriptor)
            return None
        # The one before may have removed the file between opening and locking it.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), file.stat()):
                return descriptor
        os.close(descriptor)


def _holder(content: bytes) -> str:
    try:
        about = json.loads(content)
        return f"process {about['pid']} on {about['machine']}, started {about['started']},"
    except (ValueError, KeyError, TypeError):  # it has not written it yet
        return "another process"
