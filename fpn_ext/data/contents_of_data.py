"""A dataset by its folder or data file, as :mod:`fpn_ext.data.check` looks at it."""

from pathlib import Path

from .data_file import open_data
from .dataset import names_of
from .dataset_contents import Box, Contents, Picture
from .formats import read_dataset


def read_data(path: str | Path) -> Contents:
    """All splits of a dataset in any format, as read and before anything is mended.

    Raises:
        FileNotFoundError, ValueError: what cannot be read.
    """
    data = open_data(path)
    dataset = read_dataset(data)
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
            extent = None
            if isinstance(instance.segmentation, list):
                xs = [x for polygon in instance.segmentation for x in polygon[::2]]
                ys = [y for polygon in instance.segmentation for y in polygon[1::2]]
                extent = min(xs), min(ys), max(xs), max(ys)
            picture.boxes.append(
                Box(number, instance.box, "XYXY", instance.category, instance.iscrowd, extent)
            )
    for what, (count, first) in dataset.tally.faults.items():
        contents.report("bad-field", f"{count} {what}", str(first))
    for what, (count, first) in dataset.tally.notes.items():
        contents.report("read-otherwise", f"{count} {what}", str(first))
    return contents
