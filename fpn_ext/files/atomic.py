"""Files that are whole or not there, whatever happens while they are written."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def replacing(file: str | os.PathLike) -> Iterator[IO[bytes]]:
    """A binary file to write, in place of ``file`` once it is whole and on the disk.

    Until then it is ``{name}.partial`` beside it. The folder is made. A link stays one: the file
    that it points to is replaced. What is no regular file, such as a pipe, is written to as it is.
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
