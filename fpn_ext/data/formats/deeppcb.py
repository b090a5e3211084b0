"""DeepPCB's layout (github.com/tangsanli5201/DeepPCB), read only.

Lists (trainval.txt, test.txt) of pairs ``groupX/X/N.jpg groupX/X_not/N.txt``. The tested image is
``N_test.jpg``, the one without defects ``N_temp.jpg``, and a line of the text is
``x1 y1 x2 y2 class``.

The corners are the first and the last pixel, counted from 0, so a box is (x1, y1, x2 + 1, y2 + 1):
of 703 copper spots and pin-holes that stand alone in theirs, most begin 10 pixels after x1 and end
10 pixels before x2, and the corners of all boxes go from 0 to 639 on images of 640 pixels.
"""

from collections.abc import Mapping
from pathlib import Path

from ..data_file import DataFile, Source
from ..dataset import AnnotatedImage, Dataset, Instance, Tally, rounded
from .layout import Files, lines_of

CLASSES = ("open", "short", "mousebite", "spur", "copper", "pin-hole")  # numbered from 1


def find(files: Files) -> dict[str, Source]:
    """The lists trainval.txt and test.txt, here or in PCBData; {} where they are not there."""
    for folder in (files.root, files.root / "PCBData"):
        lists = {"train": folder / "trainval.txt", "test": folder / "test.txt"}
        if all(file.is_file() and _looks_like_list(file) for file in lists.values()):
            return {
                split: Source(images=(str(file.relative_to(files.root)),))
                for split, file in lists.items()
            }
    return {}


def _looks_like_list(file: Path) -> bool:
    with file.open("rb") as stream:
        words = stream.readline(4096).split()
    return len(words) == 2 and words[0].endswith(b".jpg") and words[1].endswith(b".txt")


def read(data: DataFile, splits: Mapping[str, Source], files: Files) -> Dataset:
    """The tested images and their defects; classes as the publication numbers them.

    Raises:
        FileNotFoundError: a list or an annotation file that is not there.
    """
    dataset = Dataset(data.file, "deeppcb", list(CLASSES), {}, [], Tally())
    for split, source in splits.items():
        images = []
        for written in source.images:
            listed = data.root / written
            for line in lines_of(listed):
                if line.strip():
                    images.append(_image(listed.parent, line.split(), dataset.tally))
        dataset.splits[split] = images
    return dataset


def _image(folder: Path, names: list[str], tally: Tally) -> AnnotatedImage:
    picture, annotation = folder / names[0], folder / names[1]
    image = AnnotatedImage(picture.with_name(f"{picture.stem}_test{picture.suffix}"))
    for number, line in enumerate(lines_of(annotation), 1):
        try:
            x0, y0, x1, y1, category = (int(word) for word in line.replace(",", " ").split())
            name = CLASSES[category - 1] if category >= 1 else ""
        except (ValueError, IndexError):
            name = ""
        if name:
            image.instances.append(Instance(name, rounded((x0, y0, x1 + 1, y1 + 1))))
        elif line.strip():
            tally.fault("lines are no `x1 y1 x2 y2 class`", f"{annotation.name}, line {number}")
    return image
