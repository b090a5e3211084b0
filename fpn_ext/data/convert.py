"""A dataset written in another format."""

from pathlib import Path

from ..files.atomic import staged_folder
from ..files.paths import without_dots
from .canonical import complete
from .data_file import open_data
from .formats import FORMATS, read_dataset
from .formats.voc import LABELIMG


def convert(source: str | Path, to: str, output: Path) -> str:
    """Read a dataset, write it with its images in another format, and say what was written.

    Args:
        source: a folder, or a YAML file that describes one.
        to: ``"coco"``, ``"voc"`` or ``"yolo"``.
        output: a folder that is empty or not there.

    Raises:
        FileNotFoundError, ValueError: what is wrong with the data; ``output`` lies among them.
        FileExistsError: there is something in ``output``.
        OSError: it cannot be written; then there is nothing of it.
    """
    data = open_data(source)
    if output.is_dir() and any(output.iterdir()):
        raise FileExistsError(f"--output {output} is not empty: name a folder that is not there")
    if data.root in without_dots(output).parents:
        raise ValueError(
            f"--output {output} is in {data.root}, whose images and annotations would then be "
            "there twice: name a folder outside of it"
        )
    dataset = complete(read_dataset(data), data.classes)
    write = FORMATS[to].write
    assert write is not None, to
    with staged_folder(output) as folder:
        write(dataset, folder)
    objects = sum(len(image.instances) for image in dataset.images)
    splits = ", ".join(f"{split} {len(images)}" for split, images in dataset.splits.items())
    first = (
        f"{source} ({dataset.format}) to {output} ({to}): {len(dataset.images)} images ({splits}), "
        f"{objects} objects of {len(dataset.classes)} classes"
    )
    lines = dataset.tally.lines()
    if LABELIMG in dataset.tally.notes:
        lines.append(
            f"`corners: 1` was assumed, and {output} has the boxes that follow and no note of it: "
            "if it is wrong, say `corners: 0` and convert again"
        )
    return "\n".join([first, *(f"  {line}" for line in lines)])
