"""A dataset by its folder or data file, as :mod:`fpn_ext.data.check` looks at it."""

import contextlib
from pathlib import Path

from .canonical import (
    EMPTY,
    OUTSIDE,
    UNUSED,
    complete,
    look_for_untrained,
    look_over,
    nothing_to_learn,
    written_box,
)
from .data_file import DataFile, open_data
from .dataset import SPLITS, Dataset, Tally, names_of
from .dataset_contents import Contents, Picture, printable
from .formats import read_dataset


def read_data(path: str | Path) -> Contents:
    """All splits of a dataset in any format, as read; what a training mends is counted besides.

    Raises:
        FileNotFoundError, ValueError: what cannot be read.
    """
    data = open_data(path)
    dataset = read_dataset(data)
    look_over(dataset)
    look_for_untrained(dataset)
    classes = list(data.classes) or dataset.classes
    splits = ", ".join(f"{s} {len(dataset.splits[s])}" for s in SPLITS if s in dataset.splits)
    how = f"{dataset.format}; {splits}" if splits else dataset.format
    contents = Contents(f"{data.file} ({how})", classes)
    names = names_of([image.file for image in dataset.images])
    for image in dataset.images:
        size = (image.width, image.height) if image.width and image.height else None
        picture = Picture(names[image.file], str(image.file), size)
        contents.pictures.append(picture)
        for number, instance in enumerate(image.instances):
            if instance.category not in classes:
                contents.report("unknown-class", instance.category, picture.name, number)
                continue
            picture.boxes.append(written_box(number, instance, dataset.format))
    if not dataset.tally.faults and (nothing := nothing_to_learn(dataset)):
        contents.report("no-objects", nothing)
    read, mended = dataset.tally, _mended(dataset, data)
    for kind, counted in (
        ("bad-field", read.faults),
        ("left-out", {**mended.warnings, **read.warnings}),
        ("read-otherwise", {**mended.notes, **read.notes}),
    ):
        for what, (count, first) in counted.items():
            contents.report(kind, f"{what} (first: {printable(str(first))})", count=count)
    return contents


def _mended(dataset: Dataset, data: DataFile) -> Tally:
    """What a training will say of a dataset that was read; what :mod:`.check` finds is left out.

    The dataset is completed, or not wholly where a training would refuse it.
    """
    dataset.tally = tally = Tally()
    with contextlib.suppress(ValueError):  # check finds why
        complete(dataset, data.classes)
    for what in (EMPTY, OUTSIDE, UNUSED):
        tally.warnings.pop(what, None)
    return tally
