"""What lies in a folder: images and annotation files, and which image a name is of."""

import itertools
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from ...files.paths import without_dots
from ..data_file import split_named
from ..dataset import Tally
from ..reading import PICTURE_SUFFIXES

ANNOTATIONS = (".json", ".xml", ".txt")
NAMES = ".names"  # Darknet's lists of classes


class Files:
    """The files of a folder and the folders in it, in alphabetical order; hidden ones left out.

    Attributes:
        pictures: image files, by their suffix.
        others: of JSON, XML, text and lists of names, by suffix.
    """

    def __init__(self, root: Path):
        self.root = without_dots(root)
        self.pictures: list[Path] = []
        self.others: dict[str, list[Path]] = {s: [] for s in (*ANNOTATIONS, NAMES)}
        for folder, folders, names in os.walk(self.root, followlinks=True):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(names):
                suffix = os.path.splitext(name)[1].lower()
                if name.startswith("."):
                    continue
                if suffix in PICTURE_SUFFIXES:
                    self.pictures.append(Path(folder, name))
                elif suffix in self.others:
                    self.others[suffix].append(Path(folder, name))

    def split_of(self, file: Path) -> str:
        """The split that a file's name, or the innermost folder that says one, is of."""
        parts = file.relative_to(self.root).with_suffix("").parts
        return next((split for part in reversed(parts) if (split := split_named(part))), "")


def by_split(files: Iterable[Path], split_of: dict[Path, str], what: str) -> dict[str, list[Path]]:
    """Files by the split that their names say: ``{"all": ...}`` where none says one.

    Raises:
        ValueError: some say a split and others do not.
    """
    splits: dict[str, list[Path]] = defaultdict(list)
    for file in files:
        splits[split_of[file]].append(file)
    if "trainval" in splits:  # of both; it is train where there is no train
        both = splits.pop("trainval")
        splits.setdefault("train", both)
    if set(splits) == {""}:
        return {"all": splits[""]}
    if "" in splits:
        raise ValueError(
            f"of the {what}, {len(splits[''])} are of no split ({splits[''][0]}), and others are "
            f"({', '.join(sorted(filter(None, splits)))}): say in a data file which they are of "
            "(train:, val:, test:)"
        )
    return dict(splits)


def lines_of(file: Path) -> list[str]:
    """The lines of a text file in UTF-8, with or without a byte order mark; empty ones too.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another encoding, or no text.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}")
    try:
        return file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not text in UTF-8: {error}") from error


class Pictures:
    """Finds images by the names that annotations give them.

    Args:
        pictures: the image files there are.
        folders: where a relative name is looked for first.
    """

    def __init__(self, pictures: Sequence[Path], folders: Sequence[Path], tally: Tally):
        self.folders = folders
        self.tally = tally
        self.there = set(pictures)
        self.by_name: dict[str, list[Path]] = defaultdict(list)
        self.by_stem: dict[str, list[Path]] = defaultdict(list)
        for picture in pictures:
            self.by_name[picture.name].append(picture)
            self.by_stem[picture.stem].append(picture)

    def named(self, written: str) -> Path | None:
        """The image of a file name in an annotation; None where there is none, or several."""
        name = written
        if "\\" in name:
            name = name.replace("\\", "/")
            self.tally.note("file names have backslashes: read as /", written)
        for folder in self.folders:
            picture = without_dots(folder / name)
            if picture in self.there or picture.is_file():
                return picture
        found = self.by_name[os.path.basename(name)]
        if len(found) == 1:
            self.tally.note("images were found by their names, in another folder", written)
            return found[0]
        return None

    def beside(self, annotation: Path) -> Path | None:
        """The image of an annotation file of the same stem; None where none is the nearest.

        The nearest lies beside it, or in folders of the same names, or is the only one.
        """
        found = self.by_stem[annotation.stem]
        if len(found) == 1:
            return found[0]
        nearness = [
            (picture.parent == annotation.parent, _common_parents(picture, annotation))
            for picture in found
        ]
        if not found or nearness.count(max(nearness)) > 1:
            return None
        return found[nearness.index(max(nearness))]


def _common_parents(file: Path, other: Path) -> int:
    """How many of the innermost folders of two files have the same names."""
    pairs = zip(reversed(file.parent.parts), reversed(other.parent.parts), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
