"""A dataset by its folder or data file, as :mod:`fpn_ext.data.check` looks at it."""

from pathlib import Path

from .canonical import look_over, nothing_to_learn, written_box
from .data_file import open_data
from .dataset import names_of
from .dataset_contents import Contents, Picture
from .formats import read_dataset


def read_data(path: str | Path) -> Contents:
    """All splits of a dataset in any format, as read and before anything is mended.

    Raises:
        FileNotFoundError, ValueError: what cannot be read.
    """
    data = open_data(path)
    dataset = read_dataset(data)
    look_over(dataset)
    classes = list(data.classes) or dataset.classes
    contents = Contents(f"{data.file} ({dataset.format})", classes)
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
    for what, (count, first) in dataset.tally.faults.items():
        contents.report("bad-field", f"{count} {what}", str(first))
    for what, (count, first) in dataset.tally.notes.items():
        contents.report("read-otherwise", f"{count} {what}", str(first))
    return contents
