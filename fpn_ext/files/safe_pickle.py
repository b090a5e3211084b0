"""Read pickles of NumPy arrays and plain containers without executing code in them.

A pickle is a program: it can call any importable function. Here the few names needed by NumPy
arrays and Python 2 containers map to code in this module; all others are refused. NumPy's own
``_reconstruct`` and ``dtype.__setstate__`` are not called either: crafted arguments make them
create arrays over arbitrary memory.
"""

import math
import mmap
import os
import pickle
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import numpy as np


def load_pickle(
    file: str | os.PathLike, extra_globals: Mapping[str, Callable[..., Any]] | None = None
) -> Any:
    """A pickle's contents: None, bool, numbers, str, bytes, list, tuple, dict, set, arrays.

    An OrderedDict becomes a dict, a 1-D object array a list; arrays are converted to native byte
    order. Python 2 strings are decoded as Latin-1, as in Detectron2.

    Args:
        extra_globals: further names (``"module.name"``) the file may use, each with the callable to
            use instead, called with arguments from the file. It must be safe for any arguments and
            return a new or plain value: ``int`` for an IntEnum, whose members a file could modify.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file uses any other name, is truncated, or is not a pickle; says which.
    """
    admitted = _ADMITTED | {n: _Admitted(f) for n, f in (extra_globals or {}).items()}
    with Path(file).open("rb") as stream:
        try:
            with _MappedFile(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _plain(_Unpickler(content, admitted).load(), {})
        except _RefusedError as error:
            raise ValueError(
                f"{file} asks for {error}; it was not read and nothing in it was run. Only NumPy "
                "arrays and plain containers are read from a pickle"
            ) from None
        # A damaged pickle can raise anything, from EOFError to UnicodeDecodeError.
        except Exception as error:
            raise ValueError(
                f"{file} is damaged or not a pickle of arrays ({type(error).__name__}: {error})"
            ) from error


class _RefusedError(Exception):
    """A file requested something that is not allowed."""


class _MappedFile(mmap.mmap):
    """Reads never exceed the file, whatever length is requested."""

    def readline(self) -> bytes:
        line = super().readline()
        if not line.endswith(b"\n"):
            raise EOFError("it ends within a line")  # the Unpickler would accept it
        return line


# The C implementation allocates memory for bogus memo indices of damaged files; this does not.
class _Unpickler(pickle._Unpickler):
    stack: list[Any]
    read: Callable[[int], bytes]
    append: Callable[[object], None]
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)

    def __init__(self, stream: Any, admitted: Mapping[str, "_Admitted"]):
        super().__init__(stream, encoding="latin1")
        self.admitted = admitted

    def find_class(self, module: str, name: str) -> Any:
        full_name = f"{module}.{name}"
        if full_name not in self.admitted:
            raise _RefusedError(full_name)
        return self.admitted[full_name]

    def load_build(self) -> None:
        # The original would set any attribute of any object here.
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, _Admitted):
            raise _RefusedError("changes to an admitted name")
        if not isinstance(target, _Array | _Dtype):
            raise _RefusedError(f"setting the state of a {type(target).__name__}")
        target.__setstate__(state)

    def load_bytearray8(self) -> None:
        # The original allocates memory for bogus lengths of damaged files.
        (length,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(length)))

    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8


class _Admitted:
    """The stand-in for an allowed name: callable, nothing else."""

    __slots__ = ("_call",)
    __hash__ = None  # type: ignore[assignment]  # not in sets, not as keys: see _plain

    def __init__(self, call: Callable[..., Any]):
        self._call = call

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)


class _Dtype:
    """Replaces ``numpy.dtype`` while reading; ``value`` is the dtype in native byte order."""

    __slots__ = ("stored", "value")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, code: str, align: bool = False, copy: bool = False):
        # Only one-field codes: "f4,O" or a list of fields would be a structured dtype.
        kind = np.dtype(code).kind if isinstance(code, str) and code.isalnum() else "?"
        if kind not in "biufcSUO":
            raise _RefusedError(f"an array of dtype {code!r}")
        self.stored = self.value = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.stored = self.value.newbyteorder(state[1])


class _Array:
    """Replaces ``numpy.ndarray`` while reading; ``value`` is the array, or list of objects."""

    __slots__ = ("value",)
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, *args: Any):
        self.value: np.ndarray | list[Any] = np.empty(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        shape, dtype, is_fortran, data = state[-4:]
        if dtype.value.kind == "O":
            if not isinstance(data, list) or shape != (len(data),):
                raise _RefusedError(f"an array of objects of {len(shape)} dimensions")
            self.value = data
            return
        self.value = _array(data, dtype, shape, "F" if is_fortran else "C")


def _array(data: Any, dtype: _Dtype, shape: tuple[int, ...], order: Any) -> np.ndarray:
    if isinstance(data, str):  # bytes written by Python 2
        data = data.encode("latin1")
    if not isinstance(data, bytes | bytearray) or dtype.value.kind == "O":
        raise _RefusedError("an array of objects in an unknown form")
    if len(data) != math.prod(shape) * dtype.stored.itemsize:
        raise ValueError(f"{len(data)} bytes for an array of {shape}, {dtype.stored}")
    stored = np.frombuffer(data, np.uint8).view(dtype.stored) if data else np.empty(0, dtype.stored)
    return stored.reshape(shape, order=order).astype(dtype.value)  # astype copies: writable


def _ndarray(*args: Any) -> NoReturn:
    raise _RefusedError("a call of numpy.ndarray")


def _from_buffer(
    data: Any,
    dtype: _Dtype,
    shape: tuple[int, ...],
    order: Any,
    axis_order: tuple[int, ...] | None = None,
) -> np.ndarray:
    if axis_order is None:
        return _array(data, dtype, shape, order)
    return _array(data, dtype, shape, "C").transpose(axis_order)


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
    "numpy.ndarray": _ndarray,
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
    # __builtin__ is Python 2's name for builtins.
    **{
        f"{builtins}.{name}": call
        for builtins in ("builtins", "__builtin__")
        for name, call in (
            ("set", set),
            ("frozenset", frozenset),
            ("bytes", lambda: b""),  # how Python 3 writes empty bytes for Python 2
        )
    },
}
_ADMITTED = {name: _Admitted(call) for name, call in _CALLS.items()}


def _plain(value: Any, done: dict[int, Any]) -> Any:
    """``value`` with real arrays and dtypes; lists and dicts in place, each object once."""
    if isinstance(value, _Array | _Dtype):
        value = value.value
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
