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
from typing import IO, Any, ClassVar, NoReturn

import numpy as np

from .limits import ExcessError, Room, Steps, check_key, check_nesting


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
        ValueError: the file uses any other name, is truncated, exceeds a limit of
            :mod:`fpn_ext.files.limits`, or is not a pickle; says which.
    """
    calls = CALLS | dict(extra_globals or {})
    with Path(file).open("rb") as stream:
        try:
            with MappedFile.of(stream) as content:
                value = BoundedUnpickler(content, calls, Room(len(content))).load()
                check_nesting(value, _value_of)
                return _plain(value, {})
        except RefusedError as error:
            raise ValueError(
                f"{file} asks for {error}; it was not read and nothing in it was run. Only NumPy "
                "arrays and plain containers are read from a pickle"
            ) from None
        except ExcessError as error:
            raise ValueError(f"{file} is not read: {error}") from None
        # A damaged pickle can raise anything, from EOFError to UnicodeDecodeError.
        except Exception as error:
            raise ValueError(
                f"{file} is damaged or not a pickle of arrays ({type(error).__name__}: {error})"
            ) from error


class RefusedError(Exception):
    """A file requested something that is not allowed."""


class MappedFile(mmap.mmap):
    """Reads never exceed the file, whatever length is requested."""

    @classmethod
    def of(cls, stream: IO[bytes]) -> "MappedFile":
        """An open file's, which must not be empty."""
        return cls(stream.fileno(), 0, access=mmap.ACCESS_READ)

    def readline(self) -> bytes:
        line = super().readline()
        if not line.endswith(b"\n"):
            raise EOFError("it ends within a line")  # the Unpickler would accept it
        return line


def _with_checked_keys(load: Callable[[Any], None], keys: slice) -> Callable[[Any], None]:
    """An opcode that first checks the keys among the values on the stack since the last mark."""

    def checked(unpickler: Any) -> None:
        for key in unpickler.stack[keys]:
            check_key(key)
        load(unpickler)

    return checked


# The C implementation allocates memory for bogus memo indices of damaged files; this does not.
class BoundedUnpickler(pickle._Unpickler):
    """Python's unpickler with names that stand for other callables, and limits.

    Args:
        stream: a binary file.
        calls: what stands for each name, ``"module.name"``.
        room: for what they return.
    """

    stack: list[Any]
    read: Callable[[int], bytes]
    append: Callable[[object], None]
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)

    def __init__(self, stream: Any, calls: Mapping[str, Callable[..., Any]], room: Room):
        super().__init__(stream, encoding="latin1")
        self.calls = calls
        self.room = room
        self.dispatch = Steps(self.dispatch)  # type: ignore[misc]  # of this object alone

    def find_class(self, module: str, name: str) -> Any:
        full_name = f"{module}.{name}"
        if full_name not in self.calls:
            raise RefusedError(full_name)
        return _Admitted(self.calls[full_name], self.room)

    def load_build(self) -> None:
        # The original would set any attribute of any object here.
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, _Admitted):
            raise RefusedError("changes to an admitted name")
        if not isinstance(target, _Array | _Dtype):
            raise RefusedError(f"setting the state of a {type(target).__name__}")
        target.__setstate__(state)
        self.room.take(target.value)

    def load_bytearray8(self) -> None:
        # The original allocates memory for bogus lengths of damaged files.
        (length,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(length)))

    for opcode, keys in (
        (pickle.SETITEM, slice(-2, -1)),
        (pickle.SETITEMS, slice(0, None, 2)),
        (pickle.DICT, slice(0, None, 2)),
        (pickle.ADDITEMS, slice(None)),
        (pickle.FROZENSET, slice(None)),
    ):
        dispatch[opcode[0]] = _with_checked_keys(dispatch[opcode[0]], keys)
    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8


class _Admitted:
    """The stand-in for an allowed name: callable, nothing else."""

    __slots__ = ("_call", "_room")
    __hash__ = None  # type: ignore[assignment]  # not in sets, not as keys: see _plain

    def __init__(self, call: Callable[..., Any], room: Room):
        self._call = call
        self._room = room

    def __call__(self, *args: Any) -> Any:
        result = self._call(*args)
        self._room.take(_value_of(result))
        return result


class _Dtype:
    """Replaces ``numpy.dtype`` while reading; ``value`` is the dtype in native byte order."""

    __slots__ = ("stored", "value")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, code: str, align: bool = False, copy: bool = False):
        # Only one-field codes: "f4,O" or a list of fields would be a structured dtype.
        kind = np.dtype(code).kind if isinstance(code, str) and code.isalnum() else "?"
        if kind not in "biufcSUO":
            raise RefusedError(f"an array of dtype {code!r}")
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
                raise RefusedError(f"an array of objects of {len(shape)} dimensions")
            self.value = data
            return
        self.value = _array(data, dtype, shape, "F" if is_fortran else "C")


def _array(data: Any, dtype: _Dtype, shape: tuple[int, ...], order: Any) -> np.ndarray:
    if isinstance(data, str):  # bytes written by Python 2
        data = data.encode("latin1")
    if not isinstance(data, bytes | bytearray) or dtype.value.kind == "O":
        raise RefusedError("an array of objects in an unknown form")
    if len(data) != math.prod(shape) * dtype.stored.itemsize:
        raise ValueError(f"{len(data)} bytes for an array of {shape}, {dtype.stored}")
    stored = np.frombuffer(data, np.uint8).view(dtype.stored) if data else np.empty(0, dtype.stored)
    return stored.reshape(shape, order=order).astype(dtype.value)  # astype copies: writable


def _ndarray(*args: Any) -> NoReturn:
    raise RefusedError("a call of numpy.ndarray")


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
        raise RefusedError(f"_codecs.encode to {encoding!r}")
    return text.encode("latin1")


def _with_plain_keys(container: Callable[..., Any]) -> Callable[..., Any]:
    """A set or dictionary of values, or of pairs, in one call."""

    def make(values: Any = ()) -> Any:
        values = list(values)
        for value in values:
            check_key(value[0] if container is dict else value)
        return container(values)

    return make


CALLS: dict[str, Callable[..., Any]] = {
    "_codecs.encode": _encode,
    "collections.OrderedDict": _with_plain_keys(dict),
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
            ("set", _with_plain_keys(set)),
            ("frozenset", _with_plain_keys(frozenset)),
            ("bytes", lambda: b""),  # how Python 3 writes empty bytes for Python 2
        )
    },
}


def _value_of(value: Any) -> Any:
    return value.value if isinstance(value, _Array | _Dtype) else value


def _plain(value: Any, done: dict[int, Any]) -> Any:
    """``value`` with real arrays and dtypes; lists and dicts in place, each object once."""
    value = _value_of(value)
    if isinstance(value, _Admitted):
        raise RefusedError("a class or function as a value")
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
