"""Images that no annotation names: they are left out, or declared to be without objects."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..data_file import DataFile, Source
from ..dataset import AnnotatedImage, Dataset
from ..picture_files import size_of_picture
from .layout import Files


def add(dataset: Dataset, data: DataFile, splits: Mapping[str, Source], files: Files) -> None:
    """Count these images, and take them into their split where ``unannotated: empty`` is declared.

    An image that has an XML file was left out of the lists on purpose, and stays out. A link to an
    image that is named is that image.
    """
    used = {os.path.realpath(image.file) for image in dataset.images}
    annotated = {file.stem for file in files.others[".xml"]} if dataset.format == "voc" else set()
    for split, picture in _candidates(dataset, data, splits, files):
        if (real := os.path.realpath(picture)) in used:
            continue
        used.add(real)
        empty = data.unannotated == "empty" and split and picture.stem not in annotated
        if empty:
            dataset.splits[split].append(_of_its_size(picture))
            what = "images that no annotation names: taken as images without objects"
        else:
            what = "images that no annotation names: left out"
            if data.unannotated != "empty" and picture.stem not in annotated:
                what += " (`unannotated: empty` in the data file takes them as without objects)"
        dataset.tally.note(what, picture.name)


def _candidates(
    dataset: Dataset, data: DataFile, splits: Mapping[str, Source], files: Files
) -> Iterable[tuple[str, Path]]:
    """(split, image) of those that may be meant; the split "" where nothing says one."""
    for split, source in data.splits.items():
        for folder in filter(Path.is_dir, (data.root / name for name in source.images)):
            yield from ((split, picture) for picture in Files(folder).pictures)
    if data.splits:
        return
    lists = [name for source in splits.values() for name in source.images]
    for picture in files.pictures:
        named = next(iter(splits)) if len(splits) == 1 else files.split_of(picture)
        yield (named if named in dataset.splits and not lists else ""), picture


def _of_its_size(picture: Path) -> AnnotatedImage:
    try:
        return AnnotatedImage(picture, *size_of_picture(picture))
    except (FileNotFoundError, ValueError):  # said where all images are looked at
        return AnnotatedImage(picture)
