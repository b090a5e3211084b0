"""Formats of annotations: which one a folder is in, and each one's reader and writer."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from ...files.paths import without_dots
from ..data_file import DataFile, Source
from ..dataset import Dataset
from . import coco, deeppcb, unannotated, voc, yolo
from .layout import ANNOTATIONS, Files

Find = Callable[[Files], dict[str, Source]]
Read = Callable[[DataFile, Mapping[str, Source], Files], Dataset]
Write = Callable[[Dataset, Path], None]


class Format(NamedTuple):
    """How a format is recognised, read and written."""

    find: Find
    read: Read
    write: Write | None = None


FORMATS: dict[str, Format] = {
    "coco": Format(coco.find, coco.read, coco.write),
    "voc": Format(voc.find, voc.read, voc.write),
    "yolo": Format(yolo.find, yolo.read, yolo.write),
    "deeppcb": Format(deeppcb.find, deeppcb.read),
}


def read_dataset(data: DataFile) -> Dataset:
    """Read a dataset, in the format its description names or its files are in.

    Returns:
        As it is in the files; what is wrong with it is in its tally, to be checked.

    Raises:
        FileNotFoundError: a file that the description names is not there.
        ValueError: no format or several; files that are not what they must be.
    """
    files = Files(data.root)
    name = data.format or _found_format(data, files)
    splits = data.splits or FORMATS[name].find(files)
    if not splits:
        raise ValueError(
            f"{data.file}: no annotations in format {name} in {data.root}.{_hint(files)}"
        )
    dataset = FORMATS[name].read(data, splits, files)
    for image in dataset.images:
        image.file = without_dots(image.file)
    if name in ("coco", "voc"):
        unannotated.add(dataset, data, splits, files)
    for note in data.notes:
        dataset.tally.note(note, data.file.name)
    return dataset


def _found_format(data: DataFile, files: Files) -> str:
    written = [path for source in data.splits.values() for path in source.annotations]
    if written and all(path.endswith(".json") for path in written):
        return "coco"
    found = [name for name, known in FORMATS.items() if known.find(files)]
    if len(found) == 1:
        return found[0]
    there = ", ".join(
        [f"{len(files.pictures)} images"]
        + [
            f"{len(paths)} {suffix}"
            for suffix, paths in files.others.items()
            if paths or suffix in ANNOTATIONS
        ]
    )
    if found:
        raise ValueError(
            f"{data.root} has annotations in several formats, {' and '.join(found)} ({there}): "
            f"name the one that is meant, `format: {found[0]}` in data.yaml in the folder"
        )
    raise ValueError(
        f"{data.root} has no annotations in a known format ({there}).{_hint(files)} Needed: a COCO "
        "JSON (images, annotations and categories), VOC's XML files (<annotation>), or YOLO's "
        "label files with a data.yaml that names the classes (docs/start/your_data.md)"
    )


def _hint(files: Files) -> str:
    """What to do about a tool's own format, which is none of these."""
    if any(b'"shapes"' in file.read_bytes() for file in files.others[".json"][:20]):
        return " The JSON files are labelme's: convert them with labelme2coco."
    if any(b"<annotations" in file.read_bytes()[:4096] for file in files.others[".xml"][:20]):
        return " The XML (<annotations>) is CVAT's own: export the task as COCO 1.0."
    return ""
