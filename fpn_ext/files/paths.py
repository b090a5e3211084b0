"""One spelling for each path, so that paths can be compared."""

import os
from pathlib import Path


def without_dots(path: str | os.PathLike[str]) -> Path:
    """A path as it is written, but absolute and without ``.`` and ``..``.

    ``link/..`` is the parent of what the link leads to, as for the operating system; other links
    keep their names.

    >>> without_dots("/data/./photos/../photos").as_posix()
    '/data/photos'
    """
    absolute = Path(path).absolute()
    if ".." not in absolute.parts:
        return absolute
    plain = Path(absolute.anchor)
    for part in absolute.parts[1:]:
        plain = Path(os.path.realpath(plain)).parent if part == ".." else plain / part
    return plain
