"""What lies in a folder: images and annotation files, and which image a name is of."""

import itertools
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ...files.paths import without_dots
from ...reporting.drawn import is_drawing
from ..data_file import DataFile, split_named
from ..dataset import Tally
from ..reading import PICTURE_SUFFIXES

ANNOTATIONS = (".json", ".xml", ".txt")
NAMES = ".names"  # Darknet's lists of classes
OURS = ".written_by_fpn_ext"  # in OUTPUT_DIR/data of a training, and in a folder of detections


DETECTIONS = re.compile(r"detections(-\d+)?\.json")  # of predict, and those of before


class Files:
    """The files of a folder and the folders in it, in alphabetical order; hidden ones left out.

    So are folders of trainings, what ``fpn-ext predict`` has written, and all drawings. Links are
    followed, unless to a folder that the link itself lies in.

    Attributes:
        pictures: image files, by their suffix.
        others: of JSON, XML, text and lists of names, by suffix.
    """

    def __init__(self, root: Path):
        self.root = without_dots(root)
        self.pictures: list[Path] = []
        self.others: dict[str, list[Path]] = {s: [] for s in (*ANNOTATIONS, NAMES)}
        for file in _files_below(os.fspath(self.root)):
            suffix = file.suffix.lower()
            if suffix in PICTURE_SUFFIXES:
                self.pictures.append(file)
            elif suffix in self.others:
                self.others[suffix].append(file)

    def split_of(self, file: Path) -> str:
        """The split that a file's name, or the innermost folder that says one, is of."""
        parts = file.relative_to(self.root).with_suffix("").parts
        return next((split for part in reversed(parts) if (split := split_named(part))), "")


def _files_below(folder: str, around: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """Those of a folder, then those of the folders in it; ``around`` are folders it lies in."""
    real = Path(os.path.realpath(folder))
    around |= {real, *real.parents}
    entries = sorted(
        (entry for entry in os.scandir(folder) if not entry.name.startswith(".")),
        key=lambda entry: entry.name,
    )
    folders = [entry for entry in entries if entry.is_dir()]
    files = [Path(entry.path) for entry in entries if entry not in folders]
    found = set().union(*(detected_in(file) for file in files if DETECTIONS.fullmatch(file.name)))
    yield from (file for file in files if file.name not in found and not is_drawing(file))
    for entry in folders:
        if Path(os.path.realpath(entry.path)) not in around and not _is_written_by_us(entry.path):
            yield from _files_below(entry.path, around)


def _is_written_by_us(folder: str) -> bool:
    """Whether it is an ``OUTPUT_DIR`` with data, the ``data`` in one, or detections of predict."""
    return any(os.path.exists(os.path.join(folder, *p)) for p in ((OURS,), ("data", OURS)))


def detected_in(file: Path) -> set[str]:
    """The names of a file of ``fpn-ext predict`` and of its drawings; none for any other file.

    They lie among photographs if it was told to write there, and are no data.
    """
    try:
        content = json.loads(file.read_bytes())
        if not content.keys() >= {"images", "annotations", "skipped", "complete"}:
            return set()
        return {file.name, *(str(image["drawing"]) for image in content["images"])}
    except (OSError, ValueError, RecursionError, AttributeError, KeyError, TypeError):
        return set()


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


def check_folders(data: DataFile, folders: Iterable[Path]) -> None:
    """Raise FileNotFoundError where a folder that a description names is not there."""
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"{data.file} names {folder}, and there is no such folder")


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
        self.in_any_case: dict[str, str] = {}
        for picture in pictures:
            self.by_name[picture.name].append(picture)
            self.by_stem[picture.stem].append(picture)
            self.in_any_case[picture.name.lower()] = picture.name

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
        return nearest(annotation, self.by_stem[annotation.stem])

    def miss(self, written: str, annotation: str) -> None:
        """Count a file name that :meth:`named` finds no image of, with the cause."""
        name = os.path.basename(written.replace("\\", "/"))
        there = self.in_any_case.get(name.lower())
        if len(self.by_name.get(name, ())) > 1:
            self.tally.fault("file names are those of several images", written)
        elif there:
            what = "images are missing; others differ in upper and lower case alone"
            self.tally.fault(what, f"{written}, of {annotation}; {there} is there")
        else:
            self.tally.fault("images are missing", f"{written}, of {annotation}")


def nearest(file: Path, others: Sequence[Path]) -> Path | None:
    """The one of several files of a name that belongs to another; None where none is the nearest.

    The nearest lies beside it, or in folders of the same names, or has the most folders in common
    with it; or is the only one.

    >>> others = [Path(f"/a/{year}/JPEGImages/1.jpg") for year in (2007, 2012)]
    >>> nearest(Path("/a/2007/Annotations/1.xml"), others).as_posix()
    '/a/2007/JPEGImages/1.jpg'
    """
    if len(others) == 1:
        return others[0]
    folders = file.parent.parts
    nearness = [
        (
            other.parent == file.parent,
            _equal_at_first(reversed(folders), reversed(other.parent.parts)),
            _equal_at_first(folders, other.parent.parts),
        )
        for other in others
    ]
    if not others or nearness.count(max(nearness)) > 1:
        return None
    return others[nearness.index(max(nearness))]


def _equal_at_first(parts: Iterable[str], others: Iterable[str]) -> int:
    """How many of two sequences are equal before the first that are not."""
    pairs = zip(parts, others, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
