"""The proposals of a dataset in one file, read image by image.

A safetensors file (cannot contain code) with three tensors and a text header:

===========  ==============  ======================================================================
``boxes``    (N, 4) float32  XYXY, pixels of the original image, 0-based; N over all images
``scores``   (N,) float32    objectness logits; within an image the highest comes first
``offsets``  (I + 1,) int64  image i has the boxes ``offsets[i]`` to ``offsets[i + 1]``
===========  ==============  ======================================================================

``format`` "fpn_ext.proposals", ``version`` "1", ``image_ids`` a JSON list of I integers or strings,
``dataset`` the name of the dataset, ``source`` what made the proposals, ``crc32`` a JSON object
with the CRC-32 of each tensor's bytes.

The file is memory-mapped: all processes of a machine share one copy in the page cache, and each
holds only the image it reads.
"""

import json
import math
import os
import shutil
import struct
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from ..files.atomic import replacing

FORMAT = "fpn_ext.proposals"
VERSION = "1"

ImageId = int | str
BoxesAndScores = tuple[np.ndarray, np.ndarray]


class Proposals(Mapping[ImageId, BoxesAndScores]):
    """Proposals by image id: ``boxes, scores = proposals[image_id]``.

    ``boxes`` are (R, 4) float32, XYXY in pixels of the original image, ``scores`` (R,) float32
    objectness logits, highest first. Ids are compared as text, as Detectron2 does: 7 finds "7".

    Args:
        file: their origin, for messages.
        image_ids: one per image, unique.
        offsets: (I + 1,) int64; image i has the rows ``offsets[i]`` to ``offsets[i + 1]``.
        boxes, scores: all images' rows; anything that returns an array for a slice.
        dataset: name of the dataset they were made for; "" if unknown.
        source: what made them.
    """

    def __init__(
        self,
        file: str,
        image_ids: Sequence[ImageId],
        offsets: np.ndarray,
        boxes: Any,
        scores: Any,
        dataset: str = "",
        source: str = "",
    ):
        self.file = file
        self.image_ids = image_ids
        self.offsets = offsets
        self.dataset = dataset
        self.source = source
        self._boxes = boxes
        self._scores = scores
        self._index = {str(image_id): i for i, image_id in enumerate(image_ids)}

    def __getitem__(self, image_id: ImageId) -> BoxesAndScores:
        try:
            i = self._index[str(image_id)]
        except KeyError:
            raise KeyError(f"{self.file} has no entry for image id {image_id!r}") from None
        start, stop = self.offsets[i : i + 2].tolist()
        return _rows(self._boxes, start, stop, 4), _rows(self._scores, start, stop)

    def __contains__(self, image_id: object) -> bool:
        return str(image_id) in self._index

    def __iter__(self) -> Iterator[ImageId]:
        return iter(self.image_ids)

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def num_boxes(self) -> int:
        """Total number of boxes."""
        return int(self.offsets[-1])


class ProposalFile(Proposals):
    """An open proposal file; see the module docstring for the format.

    Opening reads the header and ``offsets``, never the boxes. An unpickled copy, e.g. in a worker
    process, reopens the file by its path.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another format or version, truncated, or inconsistent parts; lists all faults.
            Values are not checked: use ``fpn-ext proposals validate``.
    """

    def __init__(self, file: str | os.PathLike):
        path = os.fspath(file)
        if not os.path.isfile(path):
            raise FileNotFoundError(f"no file of proposals {path}")
        try:
            handle: Any = safe_open(path, framework="np")
            tensors = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
            metadata = handle.metadata() or {}
            problems = _header_problems(metadata, tensors)
            offsets = np.zeros(0) if problems else tensors["offsets"][:]
        except SafetensorError as error:
            raise ValueError(
                f"{path} is no safetensors file, or is truncated: {error}. Detectron2's .pkl of "
                "proposals: fpn-ext proposals convert"
            ) from error
        if not problems:
            image_ids = json.loads(metadata["image_ids"])
            problems = _fit_problems(image_ids, offsets, tensors)
        if problems:
            raise ValueError(f"{path} is not a sound file of proposals: " + "; ".join(problems))
        super().__init__(
            path,
            image_ids,
            offsets,
            tensors["boxes"],
            tensors["scores"],
            metadata["dataset"],
            metadata["source"],
        )
        self._checksums: dict[str, int] = json.loads(metadata["crc32"])
        self._tensors = tensors

    def __getitem__(self, image_id: ImageId) -> BoxesAndScores:
        if not self._tensors:
            raise ValueError(f"{self.file} was closed")
        return super().__getitem__(image_id)

    def __enter__(self) -> "ProposalFile":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return ProposalFile, (self.file,)

    def close(self) -> None:
        """Close the file."""
        self._tensors = {}
        self._boxes = self._scores = None

    def damaged_tensors(self) -> list[str]:
        """Names of the tensors that fail their checksum; reads the whole file.

        >>> import numpy as np, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = f"{folder}/x.safetensors"
        ...     one = (np.array([[0.0, 0, 9, 9]]), np.array([1.0]))
        ...     write_proposals(file, [7], [one], dataset="x", source="an example")
        ...     with ProposalFile(file) as proposals:
        ...         proposals[7], proposals.damaged_tensors()
        ((array([[0., 0., 9., 9.]], dtype=float32), array([1.], dtype=float32)), [])
        """
        return [
            name
            for name, tensor in self._tensors.items()
            if self._checksums.get(name) != _checksum(tensor)
        ]


def write_proposals(
    file: str | os.PathLike,
    image_ids: Iterable[ImageId],
    proposals: Iterable[BoxesAndScores],
    *,
    dataset: str,
    source: str,
) -> None:
    """Write a file for :class:`ProposalFile`, atomically.

    Holds one image in memory at a time. Boxes and scores are rounded to float32, and sorted per
    image by descending score (stable).

    Args:
        file: target; its folder is created, an existing file replaced.
        image_ids: integers or strings, unique also as text.
        proposals: boxes (R, 4), XYXY in pixels of the original image, and scores (R,), per image,
            in the order of ``image_ids``.
        dataset: name of the dataset; "" if unknown.
        source: what made the proposals, in words.

    Raises:
        ValueError: ids that are neither integers nor strings, or not unique; arrays of other
            shapes; NaN or infinite values (the image is named).
    """
    ids = checked_ids(image_ids)
    offsets = np.zeros(len(ids) + 1, dtype="<i8")
    checksums = {"boxes": 0, "scores": 0, "offsets": 0}
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "dataset": dataset,
        "source": source,
        "image_ids": json.dumps(ids),
    }
    # The header comes first but is known last: reserve its max size.
    longest = dict.fromkeys(checksums, 2**32)
    room = len(_header(metadata, longest, len(ids), 10**15))
    # safetensors' own writer needs all tensors in memory.
    with replacing(file) as out, tempfile.TemporaryFile(dir=Path(file).parent) as scores_part:
        out.seek(room + offsets.nbytes)
        for i, (image_id, (boxes, scores)) in enumerate(zip(ids, proposals, strict=True)):
            boxes, scores = _checked_arrays(image_id, boxes, scores)
            order = np.argsort(-scores, kind="stable")
            for part, name, array in (
                (out, "boxes", boxes[order]),
                (scores_part, "scores", scores[order]),
            ):
                raw = array.tobytes()
                part.write(raw)
                checksums[name] = zlib.crc32(raw, checksums[name])
            offsets[i + 1] = offsets[i] + len(boxes)
        scores_part.seek(0)
        shutil.copyfileobj(scores_part, out)
        checksums["offsets"] = zlib.crc32(offsets.tobytes())
        out.seek(0)
        out.write(_header(metadata, checksums, len(ids), int(offsets[-1]), room))
        out.write(offsets.tobytes())


def first_ids(image_ids: Sequence[ImageId], limit: int = 5) -> str:
    """The first few image ids, for a message.

    >>> first_ids([1, 2, "x"]), first_ids(range(99), limit=2)
    ("image ids 1, 2, 'x'", 'image ids 0, 1, ...')
    """
    shown = ", ".join(repr(image_id) for image_id in image_ids[:limit])
    return f"image ids {shown}" + (", ..." if len(image_ids) > limit else "")


def _rows(tensor: Any, start: int, stop: int, *columns: int) -> np.ndarray:
    # safetensors 0.8 rejects an empty slice at the end of a tensor.
    return tensor[start:stop] if stop > start else np.zeros((0, *columns), dtype=np.float32)


def _checksum(tensor: Any, rows_at_once: int = 1 << 20) -> int:
    checksum = 0
    length = tensor.get_shape()[0]
    for start in range(0, length, rows_at_once):
        raw = tensor[start : min(start + rows_at_once, length)].tobytes()
        checksum = zlib.crc32(raw, checksum)
    return checksum


def _header(
    metadata: Mapping[str, str],
    checksums: Mapping[str, int],
    num_images: int,
    num_boxes: int,
    room: int = 0,
) -> bytes:
    """The bytes before the first tensor: header size, JSON, spaces up to ``room``."""
    header: dict[str, Any] = {"__metadata__": {**metadata, "crc32": json.dumps(checksums)}}
    end = 0
    for name, dtype, size, shape in (
        ("offsets", "I64", 8, [num_images + 1]),
        ("boxes", "F32", 4, [num_boxes, 4]),
        ("scores", "F32", 4, [num_boxes]),
    ):
        start, end = end, end + size * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    room = room or -(-(8 + len(text)) // 8) * 8  # tensors start at a multiple of 8 bytes
    return struct.pack("<Q", room - 8) + text.ljust(room - 8)


def _header_problems(metadata: Mapping[str, str], tensors: Mapping[str, Any]) -> list[str]:
    if metadata.get("format") != FORMAT:
        return [f"its format is {metadata.get('format')!r}, not {FORMAT!r}"]
    if metadata.get("version") != VERSION:
        return [f"its version is {metadata.get('version')!r}; this fpn_ext reads {VERSION!r}"]
    problems = [f"no {key} in its header" for key in ("dataset", "source") if key not in metadata]
    image_ids = _json(metadata.get("image_ids"))
    if not isinstance(image_ids, list) or not all(map(_is_id, image_ids)):
        problems.append("image_ids in its header is no JSON list of integers and strings")
    if not isinstance(_json(metadata.get("crc32")), dict):
        problems.append("crc32 in its header is no JSON object")
    for name, dtype, columns in (
        ("boxes", "F32", [4]),
        ("scores", "F32", []),
        ("offsets", "I64", []),
    ):
        if name not in tensors:
            problems.append(f"no tensor {name!r}")
            continue
        shape = tensors[name].get_shape()
        if tensors[name].get_dtype() != dtype or not shape or shape[1:] != columns:
            problems.append(f"{name} is {tensors[name].get_dtype()} of shape {shape}")
    return problems


def _fit_problems(
    image_ids: list[ImageId], offsets: np.ndarray, tensors: Mapping[str, Any]
) -> list[str]:
    problems = []
    repeated = [image_id for image_id, n in Counter(map(str, image_ids)).items() if n > 1]
    if repeated:
        problems.append(f"{len(repeated)} image ids occur more than once, {first_ids(repeated)}")
    if len(offsets) != len(image_ids) + 1:
        problems.append(
            f"{len(image_ids)} image ids need {len(image_ids) + 1} offsets, there are "
            f"{len(offsets)}"
        )
    falls = np.flatnonzero(offsets[1:] < offsets[:-1])
    if falls.size:
        ids = [image_ids[i] for i in falls if i < len(image_ids)]
        problems.append(f"offsets fall {falls.size} times, {first_ids(ids)}")
    num_boxes, num_scores = (tensors[name].get_shape()[0] for name in ("boxes", "scores"))
    if num_boxes != num_scores:
        problems.append(f"{num_boxes} boxes and {num_scores} scores")
    if not offsets.size or offsets[0] != 0 or offsets[-1] != num_boxes:
        ends = offsets[[0, -1]].tolist() if offsets.size else []
        problems.append(f"offsets must go from 0 to the {num_boxes} boxes, their ends are {ends}")
    return problems


def _json(text: str | None) -> Any:
    try:
        return json.loads(text or "")
    except (ValueError, RecursionError):
        return None


def _is_id(value: object) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)


def checked_ids(image_ids: Iterable[Any]) -> list[ImageId]:
    """Image ids as Python's integers and strings; a ValueError if they cannot serve as ids."""
    ids = [i.item() if isinstance(i, np.generic) else i for i in image_ids]
    wrong = [i for i in ids if not _is_id(i)]
    if wrong:
        raise ValueError(f"image ids must be integers or strings, got {wrong[0]!r}")
    repeated = [i for i, n in Counter(map(str, ids)).items() if n > 1]
    if repeated:
        raise ValueError(f"{len(repeated)} image ids occur more than once: {first_ids(repeated)}")
    return ids


def _checked_arrays(image_id: ImageId, boxes: Any, scores: Any) -> BoxesAndScores:
    boxes, scores = np.asarray(boxes), np.asarray(scores)
    if boxes.ndim != 2 or boxes.shape[1] != 4 or scores.shape != boxes.shape[:1]:
        raise ValueError(
            f"image id {image_id!r}: boxes must be (R, 4) and scores (R,), got {boxes.shape} and "
            f"{scores.shape}"
        )
    with np.errstate(over="ignore"):  # float32 overflow becomes inf, and is rejected
        boxes, scores = boxes.astype("<f4"), scores.astype("<f4")
    faulty = ~(np.isfinite(boxes).all(axis=1) & np.isfinite(scores))
    if faulty.any():
        raise ValueError(
            f"image id {image_id!r}: {faulty.sum()} of {len(boxes)} boxes have a coordinate or "
            "score that is NaN or infinite"
        )
    return boxes, scores
