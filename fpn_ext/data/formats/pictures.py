"""The images of a dataset that is written in another format."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..dataset import AnnotatedImage


def copy_pictures(images: Sequence[AnnotatedImage], names: Mapping[Path, str], to: Path) -> None:
    """Copy each image's file to a folder, under its name there."""
    for image in images:
        file = to / names[image.file]
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(image.file, file)
