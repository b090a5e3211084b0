"""What a file of torch would build, found out before torch builds it.

``torch.load`` with ``weights_only`` calls nothing that could run code, but it does call what
allocates memory by a number in the file, and it trusts the sizes that the file states. Here the
same pickle is run first with stand-ins that allocate nothing, within :mod:`fpn_ext.files.limits`.
"""

import io
import pickle
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from .limits import ExcessError, Room, check_nesting
from .safe_pickle import CALLS, BoundedUnpickler, RefusedError

PICKLE = "/data.pkl"
LEGACY_PICKLES = 4  # of the older format: a number, a version, a system, and what was saved
PLAIN = ("collections.", "builtins.", "__builtin__.", "_codecs.")  # names of no tensors
# Bytes of a number in torch's types of storages, where they are not 1.
BYTES_OF = {
    **{"Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "ComplexDouble": 16, "ComplexFloat": 8},
    **{"Long": 8, "Int": 4, "Short": 2, "QInt32": 4},
}
BY_NUMBER = ("Storage", "Tensor", ".bytearray")  # ends of names that allocate what they are told


def check_archive(archive: zipfile.ZipFile) -> None:
    """Raise unless a zip archive of ``torch.save`` holds what it states to hold.

    Raises:
        ExcessError: compressed members, or two of one name; a storage or tensor that is larger
            than what is there; a pickle beyond the limits.
        RefusedError: the pickle calls what allocates by a number.
        Exception: a damaged pickle raises anything.
    """
    members = archive.infolist()
    if len({member.filename for member in members}) < len(members):
        raise ExcessError("two members of its archive have one name")
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED:
            raise ExcessError(f"{member.filename} is compressed, which torch.save never does")
    sizes = {member.filename: member.file_size for member in members}
    for name in filter(lambda name: name.endswith(PICKLE), sizes):
        content = archive.read(name)
        folder = f"{name.removesuffix(PICKLE)}/data/"
        in_file = _Storages({key.removeprefix(folder): size for key, size in sizes.items()})
        check_nesting(_Unpickler(io.BytesIO(content), len(content), in_file).load())


def check_stream(stream: Any, size: int) -> None:
    """Raise unless a file in torch's older format holds what it states to hold.

    Args:
        stream: at its begin; never reads beyond the file, whatever length is asked for.
        size: of the file in bytes.

    Raises:
        ExcessError, RefusedError, Exception: as :func:`check_archive`.
    """
    in_file = _Storages(None)
    for _ in range(LEGACY_PICKLES):
        check_nesting(_Unpickler(stream, size, in_file).load())
    if sum(in_file.stated.values()) > size:
        raise ExcessError(f"it states storages of more bytes than its own {size}")


class _Storages:
    """The storages that a pickle states: their bytes by their keys, and the most there can be."""

    def __init__(self, most: Mapping[Any, int] | None):
        self.most = most
        self.stated: dict[Any, int] = {}

    def add(self, key: Any, size: int) -> None:
        if self.most is not None and size > self.most.get(key, 0):
            raise ExcessError(f"it states a storage {key!r} of {size} bytes, which is not there")
        self.stated[key] = size


class _Named:
    """The stand-in for one of torch's names, and for what a call of it returns."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self, *args: Any) -> "_Named":
        if args and isinstance(args[0], _Storage):
            args[0].check(*args[1:4])
        elif self.name.endswith(BY_NUMBER) and any(isinstance(a, int | tuple) for a in args):
            raise RefusedError(f"{self.name} of a size")
        return _Named(f"a result of {self.name}")


class _Storage:
    """The stand-in for a storage: how many numbers are in it."""

    def __init__(self, count: int):
        self.count = count

    def check(self, offset: int, sizes: tuple[int, ...], strides: tuple[int, ...], *_: Any) -> None:
        """Raise unless a tensor lies within: torch would enlarge the storage."""
        last = sum((n - 1) * stride for n, stride in zip(sizes, strides, strict=True))
        if 0 not in sizes and offset + last >= self.count:
            raise ExcessError(f"it states a tensor of {sizes} in a storage of {self.count} numbers")


class _Unpickler(BoundedUnpickler):
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(BoundedUnpickler.dispatch)

    def __init__(self, stream: Any, size: int, storages: _Storages):
        super().__init__(stream, CALLS, Room(size))
        self.storages = storages

    def find_class(self, module: str, name: str) -> Any:
        full_name = f"{module}.{name}"
        if full_name.startswith(PLAIN) and full_name in CALLS:
            return super().find_class(module, name)
        return _Named(full_name)  # what torch does not admit, it refuses itself afterwards

    def persistent_load(self, about: Any) -> Any:
        """``("storage", its type, its key, a device, how many numbers, ...)``."""
        _, kind, key, _, count, *_ = about
        name = kind.name.rpartition(".")[2].removesuffix("Storage")
        self.storages.add(key, count * BYTES_OF.get(name, 1))
        return _Storage(count)

    def load_newobj(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = self.stack[-1](*args)

    def load_build(self) -> None:
        state = self.stack.pop()
        if isinstance(state, tuple) and state and isinstance(state[0], _Storage):
            state[0].check(*state[1:])

    dispatch[pickle.NEWOBJ[0]] = load_newobj
    dispatch[pickle.BUILD[0]] = load_build
