"""Formats of annotations: which one a folder is in, and each one's reader and writer."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from ..data_file import DataFile, Source
from ..dataset import Dataset
from . import coco, deeppcb, voc, yolo
from .layout import Files

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
        raise ValueError(f"{data.file}: no annotations in format {name} in {data.root}")
    dataset = FORMATS[name].read(data, splits, files)
    if not data.splits and name in ("coco", "voc"):
        used = {image.file for image in dataset.images}
        for picture in files.pictures:
            if picture not in used:
                dataset.tally.note("images that no annotation names: left out", picture.name)
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
        + [f"{len(paths)} {suffix}" for suffix, paths in files.others.items()]
    )
    if found:
        raise ValueError(
            f"{data.root} has annotations in several formats, {' and '.join(found)} ({there}): "
            f"name the one that is meant, `format: {found[0]}` in data.yaml in the folder"
        )
    labelme = any(b'"shapes"' in file.read_bytes() for file in files.others[".json"][:20])
    hint = " The JSON files are labelme's: convert them with labelme2coco." if labelme else ""
    raise ValueError(
        f"{data.root} has no annotations in a known format ({there}).{hint} Needed: a COCO JSON "
        "(images, annotations and categories), VOC's XML files (<annotation>), or YOLO's label "
        "files with a data.yaml that names the classes (docs/start/your_data.md)"
    )
