"""Atomic file writing: a file is complete or absent, even after a crash."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def replacing(file: str | os.PathLike) -> Iterator[IO[bytes]]:
    """A writable binary file that replaces ``file`` once complete and synced to disk.

    Until then it is ``{name}.partial`` beside it. Creates the folder. A symlink is kept: its target
    is replaced. Non-regular files, such as pipes, are written directly.
    """
    path = Path(os.path.realpath(file))
    if path.exists() and not path.is_file():
        with path.open("wb") as stream:  # a folder: IsADirectoryError
            yield stream
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name as well
    finally:
        os.close(folder)
