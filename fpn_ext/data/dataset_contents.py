"""The contents of annotation files: images, boxes, and problems found while reading.

Malformed content becomes a :class:`Problem` of one of the :data:`KINDS`, never an exception.
"""

import math
import numbers
import reprlib
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

MAX_DETAIL = 400  # characters: a detail may quote file contents

Name = int | str
Corners = tuple[float, float, float, float]

# Every kind of problem: its severity, and what it means or what to do. An error aborts training or
# teaches the model something false; a warning is left out, or may be intended; a note only informs.
KINDS: dict[str, tuple[Literal["error", "warning", "note"], str]] = {
    "unreadable-annotations": ("error", "the file is not JSON or XML: write it again"),
    "bad-field": ("error", "a field is missing or of a wrong type"),
    "no-images": ("error", "there is nothing to train on"),
    "no-objects": ("error", "there is nothing to learn"),
    "missing-annotations": ("error", "a listed image has no annotation file: training ends there"),
    "missing-image": ("error", "the picture is not there: training ends when it comes up"),
    "unreadable-image": ("error", "the picture cannot be decoded: training ends when it comes up"),
    "exif-rotated": (
        "error",
        "the file's EXIF orientation turns the picture, which swaps its sides; the annotations "
        "have them unturned. Rotate the pixels and drop the tag, or annotate the turned picture",
    ),
    "swapped-size": ("error", "width and height are swapped in the annotations"),
    "wrong-size": ("error", "the picture's size is not the one in the annotations"),
    "duplicate-image-id": ("error", "two images have the same id: one of them is lost"),
    "duplicate-file-name": ("error", "two images are the same file"),
    "duplicate-annotation-id": ("error", "two annotations have the same id: Detectron2 refuses it"),
    "duplicate-class": ("error", "two classes have the same id or name"),
    "unknown-image": ("error", "the annotation's image is not in the file: it is never used"),
    "unknown-class": ("error", "the annotation's class is not among the classes"),
    "class-count": ("error", "MODEL.ROI_HEADS.NUM_CLASSES and the data disagree"),
    "bad-box": ("error", "a box is four finite numbers"),
    "looks-like-xyxy": (
        "error",
        "the boxes look like corners (x0, y0, x1, y1) written where COCO has (x, y, width, height)",
    ),
    "looks-like-xywh": (
        "error",
        "the boxes look like (x, y, width, height) written where corners are read",
    ),
    "looks-relative": (
        "error",
        "the boxes look like fractions of the image's sides; they are read as pixels",
    ),
    "inverted-box": ("warning", "a box with a negative side: training leaves it out"),
    "empty-box": ("warning", "a box without width or height: training leaves it out"),
    "outside-box": ("warning", "a box wholly outside its image: training leaves it out"),
    "bad-segmentation": ("error", "no mask can be read: Detectron2 leaves the object out or stops"),
    "partly-outside": (
        "warning",
        "a box reaches more than 1 pixel beyond its image: training clips it",
    ),
    "zero-based": (
        "warning",
        "a box starts at 0, Pascal VOC's first pixel is 1: if all boxes were written from 0, all "
        "are read 1 pixel too far up and left",
    ),
    "mask-mismatch": ("warning", "box and mask of an object differ by more than 2 pixels"),
    "duplicate-box": ("warning", "the same box of the same class twice on one image"),
    "class-without-boxes": ("warning", "the class cannot be learnt, nor scored"),
    "tiny-after-resize": (
        "warning",
        "after the test resize the box is narrower than one cell of the finest map",
    ),
    "colour-depth": (
        "warning",
        "more than 8 bits a channel: INPUT.FPN_EXT.VALUE_RANGE scales them",
    ),
    "other-box-mode": ("warning", "boxes that are neither XYXY_ABS nor XYWH_ABS are not checked"),
    "left-out": ("warning", "it is not used, and may have been meant"),
    "read-otherwise": ("note", "not as written: filled in, mended or taken otherwise"),
    "image-without-boxes": ("note", "an image without any object (crowd regions do not count)"),
}


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem at one place, or several alike that were counted."""

    kind: str  # a key of KINDS
    image: str | None  # file name as in the annotations, or image id
    annotation: Name | None  # id in COCO JSON; otherwise 0-based index within its image
    detail: str
    count: int | None = None  # where they were counted: how many

    @property
    def severity(self) -> str:
        return KINDS[self.kind][0]


@dataclass(slots=True)
class Box:
    """A box with four finite coordinates."""

    annotation: Name
    written: Corners  # as in the file
    form: Literal["XYWH", "XYXY", "VOC"]  # VOC: 1-based, inclusive corners
    category: str
    crowd: bool = False
    mask_extent: Corners | None = None  # XYXY of its polygons

    @property
    def corners(self) -> Corners:
        """XYXY in pixels, 0-based."""
        x, y, a, b = self.written
        if self.form == "XYWH":
            return x, y, x + a, y + b
        return (x - 1, y - 1, a, b) if self.form == "VOC" else self.written

    @property
    def sides(self) -> tuple[float, float]:
        """Width and height that decide whether training keeps it; VOC's are one pixel less."""
        x, y, a, b = self.written
        return (a, b) if self.form == "XYWH" else (a - x, b - y)


@dataclass(slots=True)
class Picture:
    """An image as described by the annotations."""

    name: str
    file: str
    size: tuple[int, int] | None  # width, height; None if not in the annotations
    boxes: list[Box] = field(default_factory=list)


@dataclass
class Contents:
    """Everything that could be read from a dataset."""

    source: str
    classes: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def report(
        self,
        kind: str,
        detail: str,
        image: str | None = None,
        annotation: Name | None = None,
        count: int | None = None,
    ) -> None:
        self.problems.append(Problem(kind, image, annotation, detail[:MAX_DETAIL], count))


class _Short(reprlib.Repr):
    """A repr() that stays short and shallow for any file contents."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxdict, self.maxlist, self.maxtuple = 3, 3, 6, 6
        self.maxstring = self.maxother = self.maxlong = 80


short = _Short().repr


def printable(text: str) -> str:
    """A string from a file made safe for a terminal: short, no control characters."""
    return text if text.isprintable() and len(text) <= 300 else short(text)


def id_of(value: Any) -> Name | None:
    """An id: an integer (1.0 counts) or a string; None for anything else."""
    if type(value) is int:  # quick, for files of millions of ids
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    return None


def number_of(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        return float(value)
    except OverflowError:  # an integer of more than 308 digits
        return math.inf


def size_of(width: Any, height: Any) -> tuple[int, int] | None:
    """Width and height, if both are positive integers."""
    sides = [number_of(width), number_of(height)]
    whole = [int(side) for side in sides if side and side > 0 and side.is_integer()]
    return (whole[0], whole[1]) if len(whole) == 2 else None


def four_numbers(value: Any) -> Corners | None:
    """A box's coordinates, if they are four finite numbers."""
    if type(value) is list and len(value) == 4:  # quick, for files of millions of boxes
        x, y, a, b = value
        if type(x) is type(y) is type(a) is type(b) is float and math.isfinite(x + y + a + b):
            return x, y, a, b
    if not isinstance(value, list | tuple | np.ndarray):
        return None
    found = [number_of(v) for v in value] if len(value) == 4 else []
    finite = [v for v in found if v is not None and math.isfinite(v)]
    return (finite[0], finite[1], finite[2], finite[3]) if len(finite) == 4 else None
