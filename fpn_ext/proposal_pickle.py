"""Detectron2's files of proposals (``.pkl``), read without running what is in them.

A pickle is a program: Detectron2's ``pickle.load`` runs it. Here a pickle may name numpy arrays,
numbers and dtypes, and Detectron2's BoxMode; each of these is rebuilt by a function of this module
from plain bytes and numbers. Anything else that a file names ends in a ValueError.
"""

import mmap
import os
import pickle
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from .proposal_file import ImageId, ProposalFile, Proposals, checked_ids, replacing, write_proposals

PICKLE_SUFFIXES = (".pkl", ".pickle")
# Detectron1's names of the keys, which Detectron2 reads too.
_DETECTRON1_KEYS = {"indexes": "ids", "scores": "objectness_logits"}
_BOX_MODES = (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)


def is_pickle(file: str | os.PathLike) -> bool:
    """Whether a file of proposals is Detectron2's kind, by its suffix."""
    return Path(file).suffix in PICKLE_SUFFIXES


def open_proposals(file: str | os.PathLike) -> Proposals:
    """A file of proposals of either kind; Detectron2's ``.pkl`` is held in memory.

    Args:
        file: a path, or an address that Detectron2's PathManager knows (``detectron2://...``).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not what its suffix says; see :class:`ProposalFile`, :func:`read_pickle`.
    """
    name = os.fspath(file)
    local = PathManager.get_local_path(name) if "://" in name else name
    return read_pickle(local) if is_pickle(local) else ProposalFile(local)


def read_pickle(file: str | os.PathLike) -> Proposals:
    """Detectron2's proposals: a pickled dict of ``ids``, ``boxes``, ``objectness_logits``.

    An optional ``bbox_mode`` says XYXY_ABS (if it is not there) or XYWH_ABS, which is converted.
    Detectron1's keys ``indexes`` and ``scores`` are understood. Boxes and scores become float32;
    those of an image are sorted by score, highest first, equal scores keep their order.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such pickle, or asks for anything but arrays and numbers: the name of
            what it asks for is in the message, and nothing of it was run.
    """
    path = os.fspath(file)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no file of proposals {path}")
    content = _load(path)
    try:
        ids, boxes, scores = _fields(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    for i, own_scores in enumerate(scores):
        order = np.argsort(-own_scores, kind="stable")
        boxes[i], scores[i] = boxes[i][order], own_scores[order]
    offsets = np.cumsum([0, *map(len, boxes)])
    return Proposals(
        path,
        ids,
        offsets,
        np.concatenate([np.zeros((0, 4), dtype=np.float32), *boxes]),
        np.concatenate([np.zeros(0, dtype=np.float32), *scores]),
        source=f"{Path(path).name}, a .pkl of Detectron2",
    )


def write_pickle(file: str | os.PathLike, proposals: Proposals) -> None:
    """Write proposals as Detectron2 reads them, XYXY_ABS; all are in memory for that."""
    boxes, scores = [], []
    for image_id in proposals.image_ids:
        own_boxes, own_scores = proposals[image_id]
        boxes.append(own_boxes)
        scores.append(own_scores)
    content = {
        "ids": list(proposals.image_ids),
        "boxes": boxes,
        "objectness_logits": scores,
        "bbox_mode": BoxMode.XYXY_ABS.value,
    }
    with replacing(file) as out:
        pickle.dump(content, out, protocol=4)


def convert(source: str | os.PathLike, target: str | os.PathLike, dataset: str = "") -> None:
    """Detectron2's ``.pkl`` into a file of this project's, or back; the suffixes say which.

    Args:
        dataset: name of the data set, to be written into this project's file, which a ``.pkl``
            does not know.

    Raises:
        FileNotFoundError: there is no file ``source``.
        ValueError: both are of one kind, or ``source`` is not what its suffix says.
    """
    if is_pickle(source) == is_pickle(target):
        raise ValueError(
            f"one of {os.fspath(source)!r} and {os.fspath(target)!r} must be a .pkl of Detectron2, "
            "the other a .safetensors"
        )
    proposals = open_proposals(source)
    if is_pickle(target):
        write_pickle(target, proposals)
        return
    write_proposals(
        target, proposals.image_ids, proposals.values(), dataset=dataset, source=proposals.source
    )


def _fields(content: Any) -> tuple[list[ImageId], list[np.ndarray], list[np.ndarray]]:
    """Ids, boxes (R, 4) XYXY float32 and scores (R,) float32 of each image."""
    if not isinstance(content, dict):
        raise ValueError(f"the pickle must hold a dict, it holds a {type(content).__name__}")
    content = {_DETECTRON1_KEYS.get(str(key), key): value for key, value in content.items()}
    missing = [key for key in ("ids", "boxes", "objectness_logits") if key not in content]
    if missing:
        raise ValueError(f"no key {missing} among its keys {sorted(map(str, content))}")
    ids, boxes, scores = (
        _plain_list(key, content[key]) for key in ("ids", "boxes", "objectness_logits")
    )
    if not len(ids) == len(boxes) == len(scores):
        raise ValueError(f"{len(ids)} ids, {len(boxes)} boxes, {len(scores)} objectness_logits")
    mode = content.get("bbox_mode", BoxMode.XYXY_ABS)
    if mode not in [m.value for m in _BOX_MODES]:
        raise ValueError(f"bbox_mode must be one of {[m.name for m in _BOX_MODES]}, got {mode!r}")
    boxes = [_boxes(image_id, b, BoxMode(mode)) for image_id, b in zip(ids, boxes, strict=True)]
    scores = [_scores(image_id, s) for image_id, s in zip(ids, scores, strict=True)]
    for image_id, b, s in zip(ids, boxes, scores, strict=True):
        if len(b) != len(s):
            raise ValueError(f"image id {image_id!r} has {len(b)} boxes and {len(s)} scores")
    return checked_ids(ids), boxes, scores


def _plain_list(key: str, value: Any) -> list[Any]:
    if isinstance(value, _Array):
        value = value.content if isinstance(value.content, list) else value.content.tolist()
    if not isinstance(value, list | tuple):
        raise ValueError(f"{key} must be a list, it is a {type(value).__name__}")
    return list(value)


def _boxes(image_id: Any, value: Any, mode: BoxMode) -> np.ndarray:
    boxes = _numbers(image_id, value, "boxes", 2)
    if boxes.shape[1] != 4:
        raise ValueError(f"image id {image_id!r}: boxes must be (R, 4), got {boxes.shape}")
    if mode == BoxMode.XYWH_ABS:
        boxes = boxes.astype(np.float64)  # x + w is then rounded once
        boxes[:, 2:] += boxes[:, :2]
    return boxes.astype(np.float32)


def _scores(image_id: Any, value: Any) -> np.ndarray:
    return _numbers(image_id, value, "objectness_logits", 1).astype(np.float32)


def _numbers(image_id: Any, value: Any, key: str, ndim: int) -> np.ndarray:
    content = value.content if isinstance(value, _Array) else None
    if not isinstance(content, np.ndarray) or content.dtype.kind not in "iuf":
        raise ValueError(f"image id {image_id!r}: {key} must be an array of numbers")
    if content.size == 0:  # Detectron1 writes (0,)
        return np.zeros((0, 4)[:ndim], dtype=np.float32)
    if content.ndim != ndim:
        raise ValueError(f"image id {image_id!r}: {key} has the shape {content.shape}")
    return content


# Reading a pickle.


def _load(path: str) -> Any:
    try:
        with (
            open(path, "rb") as opened,
            mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            return _Unpickler(content, encoding="latin1").load()
    except _Refused as error:
        raise ValueError(
            f"{path} is refused: it asks for {error}, which proposals have no need of. Nothing of "
            "it was run."
        ) from None
    except Exception as error:  # whatever a damaged pickle can raise, which is anything
        raise ValueError(
            f"{path} is no pickle, or is damaged: {type(error).__name__}: {error}"
        ) from None


class _Refused(Exception):
    """The name of what a pickle asked for."""


class _DType:
    """What a pickle has for a numpy.dtype."""

    def __init__(self, code: str, *ignored: object):
        if not re.fullmatch(r"[iufU]\d{1,4}|O\d*", code):
            raise _Refused(f"an array of dtype {code!r}")
        self.code = code

    def __setstate__(self, state: tuple) -> None:
        order = state[1]
        if order in ("<", ">"):
            self.code = order + self.code
        elif order != "|":
            raise ValueError(f"byte order {order!r}")

    @property
    def is_object(self) -> bool:
        return "O" in self.code


class _Array:
    """What a pickle has for a numpy array; ``content`` is the array, or the list of its objects."""

    content: Any = None

    def __setstate__(self, state: tuple) -> None:
        shape, dtype, fortran_order, content = state[-4:]
        if dtype.is_object:
            self.content = list(content)
            return
        # Python 2 wrote bytes as text.
        raw = content.encode("latin1") if isinstance(content, str) else content
        array = np.frombuffer(raw, dtype=dtype.code)
        self.content = array.reshape(shape, order="F" if fortran_order else "C")


def _reconstruct(*ignored: object) -> _Array:
    return _Array()


def _frombuffer(
    buffer: Any, dtype: _DType, shape: tuple, order: str, axis_order: tuple | None = None
) -> _Array:
    array = _Array()
    flat = np.frombuffer(buffer, dtype=dtype.code)
    if order == "K" and axis_order is not None:
        array.content = flat.reshape(shape).transpose(axis_order)
    else:
        array.content = flat.reshape(shape, order="F" if order == "F" else "C")
    return array


def _scalar(dtype: _DType, raw: bytes | str) -> Any:
    raw = raw.encode("latin1") if isinstance(raw, str) else raw
    return np.frombuffer(raw, dtype=dtype.code)[0].item()


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise _Refused(f"_codecs.encode to {encoding!r}")
    return text.encode("latin1")


def _empty_bytes() -> bytes:
    return b""


def _ndarray(*ignored: object) -> None:
    raise _Refused("a call of numpy.ndarray")


def _box_mode(value: int) -> int:
    return value


# What a pickle may name. Protocols below 3 write bytes as a call of encode, or of bytes if empty.
_GLOBALS: dict[str, Callable] = {
    **{
        f"numpy.{core}.{name}": function
        for core in ("core", "_core")
        for name, function in (
            ("multiarray._reconstruct", _reconstruct),
            ("multiarray.scalar", _scalar),
            ("numeric._frombuffer", _frombuffer),
        )
    },
    "numpy.ndarray": _ndarray,
    "numpy.dtype": _DType,
    "_codecs.encode": _latin1,
    "builtins.bytes": _empty_bytes,
    "__builtin__.bytes": _empty_bytes,
    "detectron2.structures.boxes.BoxMode": _box_mode,
}


# The one in C fills memory for a memo index that a damaged file makes up; this one does not.
class _Unpickler(pickle._Unpickler):
    stack: list[Any]
    read: Callable[[int], bytes]
    append: Callable[[object], None]
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _GLOBALS[f"{module}.{name}"]
        except KeyError:
            raise _Refused(f"{module}.{name}") from None

    def load_build(self) -> None:
        # The original would set any attribute of anything above, functions included.
        state = self.stack.pop()
        target = self.stack[-1]
        if not isinstance(target, _Array | _DType):
            raise _Refused(f"setting the state of a {type(target).__name__}")
        target.__setstate__(state)

    def load_bytearray8(self) -> None:
        # The original fills memory for a length that a damaged file makes up.
        (length,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(length)))

    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8
