"""Results as JSON files, written atomically, with a trailing newline."""

import json
import math
import numbers
import os
from collections.abc import Mapping
from typing import Any

from ..files.atomic import replacing


def write_json(file: str | os.PathLike, value: Any, indent: int | None = 2) -> None:
    """Write a value as ASCII JSON, replacing ``file`` atomically. Creates the folder.

    Args:
        value: anything that :func:`plain` accepts; NaN and infinity become null.
        indent: spaces per level; None for one line without spaces.

    Raises:
        TypeError: something in ``value`` is not a mapping, sequence, text or number. The file is
            unchanged, as after an OSError.
    """
    separators = (",", ":") if indent is None else None
    text = json.dumps(plain(value), indent=indent, separators=separators, allow_nan=False)
    with replacing(file) as stream:
        stream.write(f"{text}\n".encode("ascii"))


def plain(value: Any) -> Any:
    """A value in JSON types: mappings, sequences, text, numbers; None for NaN and infinity.

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
