"""Limits on what a pickle may build: a few bytes of one can stand for any amount of memory or time.

A pickle is a program. It can name an object again and again, copy it, or hold it in tuples of
tuples whose hash takes forever to compute. What real files of weights and proposals hold is far
below these limits.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

MOST_STEPS = 30_000_000  # a file of proposals for 100 000 images has some ten million
MOST_VALUES = 30_000_000  # each counted as often as it is held
MOST_LEVELS = 60
GROWTH = 4  # times the file: Python 3 writes bytes as a text and a call, and arrays copy them
MORE_BYTES = 1 << 20  # beyond that, for small files
LONGEST_KEY = 16  # parts of a tuple that is a key

Plain = str | bytes | int | float | bool | complex | None


class ExcessError(ValueError):
    """A file goes beyond a limit of this module."""


class Steps(dict):
    """A table of what each opcode of a pickle does, which ends after a number of them."""

    def __init__(self, table: dict[int, Callable[[Any], None]]):
        super().__init__(table)
        self.left = MOST_STEPS

    def __getitem__(self, opcode: int) -> Callable[[Any], None]:
        self.left -= 1
        if self.left < 0:
            raise ExcessError(f"it takes more than {MOST_STEPS} steps")
        return super().__getitem__(opcode)


class Room:
    """How much the values that calls return may take: a few times as much as the file."""

    def __init__(self, size_of_file: int):
        self.left = GROWTH * size_of_file + MORE_BYTES

    def take(self, value: Any) -> None:
        """Take the bytes of an array or a text, or the number of values in a container."""
        if isinstance(value, np.ndarray):
            self.left -= value.nbytes
        elif isinstance(value, str | bytes | bytearray | list | set | frozenset | dict):
            self.left -= len(value)
        if self.left < 0:
            raise ExcessError(
                f"what it would build is more than {GROWTH} times as large: it repeats parts"
            )


def check_key(key: Any) -> None:
    """Raise unless a key, or a member of a set, is plain: its hash takes no time."""
    parts = key if isinstance(key, tuple) and len(key) <= LONGEST_KEY else (key,)
    if not all(isinstance(part, Plain) for part in parts):
        raise ExcessError(f"a key that is a {type(key).__name__} of other values")


def check_nesting(value: Any, inside: Callable[[Any], Any] = lambda value: value) -> None:
    """Raise unless containers are nested a few levels deep, without loops, and of bounded size.

    Args:
        inside: returns what stands in a value's place.
    """
    done: dict[int, tuple[int, int] | None] = {}

    def measured(value: Any, level: int) -> tuple[int, int]:
        value = inside(value)
        if not isinstance(value, tuple | list | dict | set | frozenset):
            return 1, 0
        if id(value) in done:
            known = done[id(value)]
            if known is None:
                raise ExcessError("a value that contains itself")
            return known
        if level > MOST_LEVELS:
            raise ExcessError(f"values nested more than {MOST_LEVELS} levels deep")
        done[id(value)] = None
        size, height = 1, 0
        for item in value.values() if isinstance(value, dict) else value:
            more, below = measured(item, level + 1)
            size, height = size + more, max(height, below + 1)
        if size > MOST_VALUES:
            raise ExcessError(f"more than {MOST_VALUES} values, counted as often as they are held")
        if height > MOST_LEVELS:
            raise ExcessError(f"values nested more than {MOST_LEVELS} levels deep")
        done[id(value)] = size, height
        return size, height

    measured(value, 1)
