"""Atomic writing: a file, or a folder of files, is complete or absent, even after a crash."""

import contextlib
import errno
import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

STAGED = "staged"  # what becomes the target of staged_folder

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def replacing(file: str | os.PathLike) -> Iterator[IO[bytes]]:
    """A writable binary file that replaces ``file`` once complete and synced to disk.

    Until then it is ``{name}.partial`` beside it. Creates the folder. A symlink is kept: its target
    is replaced. Non-regular files, such as pipes, are written directly. Where two write the same
    file at once, the second waits for the first.

    Raises:
        OSError: it cannot be written; names the file. What was there before is unchanged.
    """
    path = Path(os.path.realpath(file))
    if path.exists() and not path.is_file():
        with path.open("wb") as stream:  # a folder: IsADirectoryError
            yield stream
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    try:
        with _alone(partial) as stream:
            try:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
                partial.replace(path)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
    except BaseException as error:
        # Where a write fails, torch.save may raise its own RuntimeError ("unexpected pos").
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if not isinstance(cause, OSError):
            raise
        if cause.errno and cause.filename is None:
            cause.filename = os.fspath(file)  # a full disk does not say whose write it was
        raise cause from None
    _sync_folder(path.parent)


@contextlib.contextmanager
def _alone(partial: Path) -> Iterator[IO[bytes]]:
    """A file, empty, that no other process and no other thread writes to in the meantime.

    Without a lock, where the file system has none.
    """
    while True:
        stream = os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT, 0o666), "wb")
        try:
            with contextlib.suppress(OSError):
                fcntl.flock(stream, fcntl.LOCK_EX)
            if _is_still(stream.fileno(), partial):
                if os.fstat(stream.fileno()).st_size:  # left by a kill
                    stream.truncate(0)
                yield stream
                return
        finally:
            with contextlib.suppress(OSError):
                fcntl.flock(stream, fcntl.LOCK_UN)  # whoever has inherited the descriptor
            stream.close()


def _is_still(descriptor: int, path: Path) -> bool:
    """Whether a path is of this file: the one before may have moved its own, or removed it."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def write_text(file: str | os.PathLike, text: str) -> None:
    """Write text in UTF-8 by :func:`replacing`.

    Raises:
        OSError: as :func:`replacing`.
    """
    with replacing(file) as stream:
        stream.write(text.encode())


def move_into_place(complete: Path, file: Path) -> None:
    """Replace ``file`` by one that is complete, in the same file system, synced to disk first.

    For libraries that write to a name of their own choice, not to a stream.
    """
    with complete.open("rb") as stream:
        os.fsync(stream.fileno())
    complete.replace(file)
    _sync_folder(file.parent)


@contextlib.contextmanager
def staged_folder(target: str | os.PathLike) -> Iterator[Path]:
    """An empty folder that becomes ``target`` once the block is done; if it fails, it is removed.

    Until then it is in ``.{name}.partial`` beside it, which a kill may leave: the next to make the
    same target removes it, and says so. Where two make it at once, the second waits for the first.
    Nothing is replaced, but for an empty folder.

    Raises:
        OSError: ``target`` is there, and not an empty folder; or cannot be made.
    """
    path = Path(os.path.realpath(target))
    path.parent.mkdir(parents=True, exist_ok=True)
    with _folder_alone(path.with_name(f".{path.name}.partial")) as temporary:
        if path.is_dir() and any(path.iterdir()):
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), os.fspath(target))
        staged = temporary / STAGED
        staged.mkdir()
        yield staged
        staged.replace(path)


@contextlib.contextmanager
def _folder_alone(folder: Path) -> Iterator[Path]:
    """A folder for :data:`STAGED` that no other process writes to, and is removed then.

    One of another name, where the file system has no locks. Nothing else in it is touched.
    """
    while True:
        folder.mkdir(exist_ok=True)
        try:
            descriptor = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # whoever made it is done
            continue
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            except OSError:
                with tempfile.TemporaryDirectory(
                    prefix=f"{folder.name}-", dir=folder.parent
                ) as own:
                    yield Path(own)
                return
            if not _is_still(descriptor, folder):
                continue
            left = folder / STAGED
            if left.is_dir():
                logger.warning("%s, left by a command that was killed, is removed", left)
                shutil.rmtree(left)
            try:
                yield folder
            finally:
                shutil.rmtree(left, ignore_errors=True)
                with contextlib.suppress(OSError):  # there is something of somebody else's
                    folder.rmdir()
            return
        finally:
            os.close(descriptor)


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name as well
    finally:
        os.close(folder)
