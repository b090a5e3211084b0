"""Results as JSON files: whole or not there, with a newline at the end."""

import json
import math
import numbers
import os
from collections.abc import Mapping
from typing import Any

from ..files.atomic import replacing


def write_json(file: str | os.PathLike, value: Any, indent: int | None = 2) -> None:
    """Write a value as JSON, in ASCII, in place of ``file`` once it is whole. The folder is made.

    Args:
        value: of what :func:`plain` takes; numbers that JSON has no word for become null.
        indent: spaces per level; None for one line without spaces.

    Raises:
        TypeError: something in ``value`` is no mapping, sequence, text or number. The file is as
            it was, as it is after an OSError.
    """
    separators = (",", ":") if indent is None else None
    text = json.dumps(plain(value), indent=indent, separators=separators, allow_nan=False)
    with replacing(file) as stream:
        stream.write(f"{text}\n".encode("ascii"))


def plain(value: Any) -> Any:
    """As JSON holds it: mappings, sequences, text, finite numbers; None for all other numbers.

    >>> plain({"AP": float("nan"), "images": (1, "a.jpg")})
    {'AP': None, 'images': [1, 'a.jpg']}
    """
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, numbers.Integral):  # NumPy's
        return int(value)
    number = float(value)
    return number if math.isfinite(number) else None
