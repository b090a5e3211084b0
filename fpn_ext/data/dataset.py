"""A dataset in memory: the one form that every reader gives and every writer takes.

Classes are names here. Numbers are given to them when the dataset is written, by their order in
:attr:`Dataset.classes`; so splits whose files number the same names differently agree.
"""

import os
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from .dataset_contents import Corners, printable

SPLITS = ("train", "val", "test")
# Boxes are kept to this many decimals of a pixel, as COCO's own are: a relative coordinate that was
# written with six digits gives the same number as the pixels it was made from.
DECIMALS = 2


@dataclass(slots=True)
class Instance:
    """One object, or one crowd region.

    Attributes:
        category: name of its class.
        box: XYXY in pixels of the image, 0-based: (0, 0, width, height) is all of it.
        iscrowd: a region of many objects, neither trained on nor scored.
        segmentation: polygons ``[[x, y, x, y, ...], ...]`` in pixels, 0-based, or COCO's
            run-length object ``{"size": [height, width], "counts": ...}``; None without a mask.
        keypoints: ``[x, y, visibility, ...]`` in pixels; None without.
        area: of the mask in square pixels where the annotations give it; None where they do not.
    """

    category: str
    box: Corners
    iscrowd: bool = False
    segmentation: list[list[float]] | dict[str, Any] | None = None
    keypoints: list[float] | None = None
    area: float | None = None


@dataclass(slots=True)
class AnnotatedImage:
    """An image file and what is on it; width and height in pixels, 0 where nobody has said them."""

    file: Path
    width: int = 0
    height: int = 0
    instances: list[Instance] = field(default_factory=list)


class Tally:
    """What was filled in, mended or left out, and what is wrong: kinds, each with its count.

    Attributes:
        notes: what changes nothing, or was asked for.
        warnings: what was left out and may have been meant.
        faults: what must be mended first.

    >>> tally = Tally()
    >>> for name in ("a.jpg", "b.jpg"):
    ...     tally.note("annotations have no area", name)
    >>> tally.lines()
    ['2 annotations have no area (first: a.jpg)']
    """

    def __init__(self) -> None:
        self.notes: dict[str, list[Any]] = {}  # kind: [count, place of the first]
        self.warnings: dict[str, list[Any]] = {}
        self.faults: dict[str, list[Any]] = {}

    def note(self, what: str, where: object) -> None:
        """Count something that the dataset can be used in spite of."""
        self.notes.setdefault(what, [0, where])[0] += 1

    def warn(self, what: str, where: object) -> None:
        """Count something that is left out, and may have been meant."""
        self.warnings.setdefault(what, [0, where])[0] += 1

    def fault(self, what: str, where: object) -> None:
        """Count something that must be mended first."""
        self.faults.setdefault(what, [0, where])[0] += 1

    def lines(self) -> list[str]:
        """Warnings, then notes."""
        return [*self.warned(), *self.noted()]

    def warned(self) -> list[str]:
        """The warnings alone."""
        return _lines(self.warnings)

    def noted(self) -> list[str]:
        """The notes alone."""
        return _lines(self.notes)

    def check(self, source: object) -> None:
        """Raise ValueError with all faults, if there are any."""
        if self.faults:
            faults = "; ".join(_lines(self.faults))
            raise ValueError(f"{source}: {faults}. `{command_that_lists(source)}` lists all")


def command_that_lists(source: object) -> str:
    """The command that reports everything about a dataset.

    >>> command_that_lists("/data/my photos")
    "fpn-ext data --data '/data/my photos'"
    """
    return f"fpn-ext data --data {shlex.quote(str(source))}"


def _lines(kinds: dict[str, list[Any]]) -> list[str]:
    return [
        f"{count} {what} (first: {printable(str(first))})" for what, (count, first) in kinds.items()
    ]


@dataclass
class Dataset:
    """Images by split.

    Attributes:
        source: the file or folder it was read from.
        classes: names in the order of their numbers.
        splits: of ``"train"``, ``"val"``, ``"test"``; ``"all"`` where nothing divides the images.
        keypoint_names: of all classes alike; empty without keypoints.
        tally: what was counted on the way.
    """

    source: Path
    format: str
    classes: list[str]
    splits: dict[str, list[AnnotatedImage]]
    keypoint_names: list[str] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)

    @property
    def images(self) -> list[AnnotatedImage]:
        """Of all splits."""
        return [image for images in self.splits.values() for image in images]


def rounded(corners: Sequence[float]) -> Corners:
    """XYXY to :data:`DECIMALS` decimals."""
    x0, y0, x1, y1 = (round(float(value), DECIMALS) + 0.0 for value in corners)
    return x0, y0, x1, y1


def common_folder(files: Iterable[Path]) -> Path:
    """The innermost folder that has all of these files in it, or below it; ``/`` of none.

    >>> common_folder([Path("/a/b/1.jpg"), Path("/a/c/1.jpg")]).as_posix()
    '/a'
    """
    folders = [str(file.parent) for file in files]
    return Path(os.path.commonpath(folders)) if folders else Path("/")


def names_of(files: Sequence[Path]) -> dict[Path, str]:
    """Each file's name relative to their common folder, with slashes.

    >>> names_of([Path("/a/b/1.jpg"), Path("/a/c/1.jpg")])[Path("/a/c/1.jpg")]
    'c/1.jpg'
    """
    folder = common_folder(files)
    return {file: PurePosixPath(file.relative_to(folder)).as_posix() for file in files}
