"""Whether image files can be decoded, and their sizes."""

import os
import stat
import warnings
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from .dataset_contents import printable
from .reading import load_array

EXIF_ORIENTATION = 0x0112
TURNED = (5, 6, 7, 8)  # the orientations that swap width and height


@dataclass(frozen=True, slots=True)
class Look:
    """Result of decoding an image; sizes are (width, height)."""

    kind: str | None = None  # of the problem, if unusable
    detail: str = ""
    size: tuple[int, int] | None = None  # as Detectron2 reads it: with EXIF rotation applied
    stored_size: tuple[int, int] | None = None  # as in the file
    mode: str = ""


def look_at_pictures(files: Iterable[str], workers: int = 1) -> dict[str, Look]:
    """Decode images, in this process or in several.

    Raises:
        RuntimeError: a decoding process died.
    """
    unique = list(dict.fromkeys(files))
    if workers <= 1 or len(unique) < 2:
        return {file: look_at(file) for file in unique}
    try:
        with ProcessPoolExecutor(workers) as pool:
            return dict(zip(unique, pool.map(look_at, unique, chunksize=16), strict=True))
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a process died while decoding pictures (killed for its memory?); run with --workers 1"
        ) from error


def look_at(file: str) -> Look:
    """Decode one image completely."""
    try:
        if not stat.S_ISREG(os.stat(file).st_mode):  # opening a pipe would block forever
            return Look("unreadable-image", f"{printable(file)} is not a file")
    except (OSError, ValueError) as error:
        return Look("missing-image", _where(file, error))
    if file.lower().endswith(".npy"):
        return _look_at_array(file)
    try:
        with warnings.catch_warnings():  # about broken metadata and large images
            warnings.simplefilter("ignore")
            with Image.open(file) as image:
                image.load()
                turned = _orientation(image) in TURNED
                stored = image.size
                return Look(None, "", stored[::-1] if turned else stored, stored, image.mode)
    except Exception as error:  # decoders raise anything: OSError, SyntaxError, struct.error
        return Look("unreadable-image", f"{type(error).__name__}: {str(error)[:200]}")


def size_of_picture(file: str | os.PathLike) -> tuple[int, int]:
    """Width and height as Detectron2 reads an image, turned as its EXIF says; from its header.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no header of an image.
    """
    if not os.path.isfile(file):
        raise FileNotFoundError(f"no file {file}")
    try:
        if os.fspath(file).lower().endswith(".npy"):
            height, width = load_array(Path(file)).shape[:2]
            return width, height
        with warnings.catch_warnings():  # about broken metadata and large images
            warnings.simplefilter("ignore")
            with Image.open(file) as image:
                width, height = image.size
                return (height, width) if _orientation(image) in TURNED else (width, height)
    except Exception as error:  # decoders raise what they like: OSError, SyntaxError, struct.error
        raise ValueError(f"{type(error).__name__}: {str(error)[:200]}") from error


def identity_of(file: Path) -> object:
    """Equal for all names of a file: hard links, and symbolic links to it or to its folder."""
    try:
        found = file.stat()
    except (OSError, ValueError):  # there is none
        return file
    return found.st_dev, found.st_ino


def _look_at_array(file: str) -> Look:
    try:
        array = load_array(Path(file))
    except (OSError, ValueError) as error:
        return Look("unreadable-image", f"{type(error).__name__}: {str(error)[:200]}")
    height, width = array.shape[:2]
    return Look(None, "", (width, height), (width, height), str(array.dtype))


def _orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(EXIF_ORIENTATION)
    except Exception:  # Detectron2 ignores broken EXIF
        return None


def _where(file: str, error: OSError | ValueError) -> str:
    """A missing file, and the likely intended one beside it."""
    stem, suffix = os.path.splitext(file)
    if isinstance(error, FileNotFoundError):
        for other in (".jpg", ".JPG", ".jpeg", ".png", ".PNG"):
            if other != suffix and os.path.isfile(stem + other):
                return f"no file {printable(file)}, but one that ends in {other}"
        return f"no file {printable(file)}"
    return f"{type(error).__name__}: {str(error)[:200]}"
