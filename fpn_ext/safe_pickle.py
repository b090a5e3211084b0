"""Pickles of NumPy arrays and plain containers, read without running anything in them.

A pickle is a program: it may name any importable function and have it called. Here the few names
that NumPy's arrays and Python 2's containers need stand for code of this module; any other is
refused. NumPy's own ``_reconstruct`` and ``dtype.__setstate__`` are not called either: with crafted
arguments they make arrays over foreign memory.
"""

import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np


def load_pickle(
    file: str | os.PathLike, extra_globals: Mapping[str, Callable[..., Any]] | None = None
) -> Any:
    """What a pickle file holds: None, bool, numbers, str, bytes, list, tuple, dict, set, arrays.

    An OrderedDict becomes a dict, an array's numbers get this machine's byte order. Strings of
    Python 2 are decoded as Latin-1, as Detectron2 does.

    Args:
        extra_globals: more names (``"module.name"``) the file may ask for, and what is called for
            each with arguments from the file. It must be harmless with any and return a new or
            plain value: ``int`` for an IntEnum, whose members a file could otherwise change.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file asks for another name, or is truncated, or is no pickle. It says which.
    """
    admitted = _ADMITTED | {n: _Admitted(f) for n, f in (extra_globals or {}).items()}
    with Path(file).open("rb") as stream:
        try:
            return _plain(_Unpickler(stream, admitted).load(), {})
        except _RefusedError as error:
            raise ValueError(
                f"{file} asks for {error}; it was not read and nothing in it was run. Only NumPy "
                "arrays of numbers or strings and plain containers are read from a pickle"
            ) from None
        # A damaged pickle raises anything, from EOFError to UnicodeDecodeError.
        except Exception as error:
            raise ValueError(
                f"{file} is damaged or not a pickle of arrays ({type(error).__name__}: {error})"
            ) from error


class _RefusedError(Exception):
    """What a file asked for and does not get."""


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: Any, admitted: Mapping[str, "_Admitted"]):
        super().__init__(stream, encoding="latin1")
        self.admitted = admitted

    def find_class(self, module: str, name: str) -> Any:
        full_name = f"{module}.{name}"
        if full_name not in self.admitted:
            raise _RefusedError(full_name)
        return self.admitted[full_name]


class _Admitted:
    """A callable whose attributes a pickle cannot set (BUILD sets them on whatever it is given)."""

    __slots__ = ("_call",)
    __hash__ = None  # type: ignore[assignment]  # no member of a set, no key: see _plain

    def __init__(self, call: Callable[..., Any]):
        self._call = call

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __setstate__(self, state: object) -> NoReturn:
        raise _RefusedError("changes to an admitted name")


class _Dtype:
    """In place of ``numpy.dtype`` while reading; ``value`` is the dtype in native byte order."""

    __slots__ = ("stored", "value")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, code: str, align: bool = False, copy: bool = False):
        # Only one-field codes: "f4,O" or a list of fields would be a structured dtype.
        kind = np.dtype(code).kind if isinstance(code, str) and code.isalnum() else "?"
        if kind not in "biufcSU":
            raise _RefusedError(f"an array of dtype {code!r}")
        self.stored = self.value = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] == ">":
            self.stored = self.value.newbyteorder(">")


class _Array:
    """In place of ``numpy.ndarray`` while reading."""

    __slots__ = ("value",)
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, *args: Any):
        self.value = np.empty(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, is_fortran, data = state
        self.value = _array(data, dtype, shape, "F" if is_fortran else "C")


def _array(data: Any, dtype: _Dtype, shape: tuple[int, ...], order: Any) -> np.ndarray:
    if isinstance(data, str):  # bytes written by Python 2
        data = data.encode("latin1")
    if not isinstance(data, bytes | bytearray):
        raise _RefusedError("an array of Python objects")
    stored = np.frombuffer(data, np.uint8).view(dtype.stored) if data else np.empty(0, dtype.stored)
    # reshape refuses another number of them; astype copies: writable.
    return stored.reshape(shape, order=order).astype(dtype.value)


def _from_buffer(data: Any, dtype: _Dtype, shape: tuple[int, ...], order: Any) -> np.ndarray:
    return _array(data, dtype, shape, order)


def _scalar(dtype: _Dtype, data: Any) -> Any:
    return _array(data, dtype, (), "C")[()]


def _encode(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes for Python 2."""
    if encoding != "latin1":
        raise _RefusedError(f"_codecs.encode to {encoding!r}")
    return text.encode("latin1")


_CALLS: dict[str, Callable[..., Any]] = {
    "_codecs.encode": _encode,
    "collections.OrderedDict": dict,
    "numpy.ndarray": _Array,
    "numpy.dtype": _Dtype,
    # numpy.core became numpy._core in NumPy 2.
    **{
        f"numpy.{core}.{name}": call
        for core in ("core", "_core")
        for name, call in (
            ("multiarray._reconstruct", _Array),
            ("multiarray.scalar", _scalar),
            ("numeric._frombuffer", _from_buffer),
        )
    },
    # __builtin__ is Python 2's name of builtins.
    **{f"{builtins}.set": set for builtins in ("builtins", "__builtin__")},
    **{f"{builtins}.frozenset": frozenset for builtins in ("builtins", "__builtin__")},
    "__builtin__.bytes": lambda: b"",  # how Python 3 writes none for Python 2
}
_ADMITTED = {name: _Admitted(call) for name, call in _CALLS.items()}


def _plain(value: Any, done: dict[int, Any]) -> Any:
    """``value`` with real arrays and dtypes; lists and dicts in place, each object once."""
    if isinstance(value, _Array | _Dtype):
        return value.value
    if isinstance(value, _Admitted):
        raise _RefusedError("a class or function as a value")
    if id(value) in done:
        return done[id(value)]
    if isinstance(value, tuple):
        done[id(value)] = tuple(_plain(v, done) for v in value)
        return done[id(value)]
    if isinstance(value, list | dict):
        done[id(value)] = value
        for key, item in enumerate(value) if isinstance(value, list) else value.items():
            value[key] = _plain(item, done)  # existing keys: safe while iterating
    return value
