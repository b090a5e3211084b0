"""Pictures as arrays, for training and prediction alike: what Pillow reads, ``.npy``, TIFF pages.

A picture of 8 bits a channel is what Detectron2's ``read_image`` makes of it. One of more has its
values scaled to 8 bits: those of ``INPUT.FPN_EXT.VALUE_RANGE`` become 0 to 255, rounded, and a
value outside is an error. Nothing is clipped.
"""

import contextlib
import functools
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from detectron2.config import CfgNode
from detectron2.data.detection_utils import _apply_exif_orientation, convert_PIL_to_numpy
from PIL import Image, ImageOps

from ..keys import declare, own_keys

declare(
    "INPUT.FPN_EXT.VALUE_RANGE",
    [],
    "Pixel values [low, high] that become 0 and 255, of pictures with more than 8 bits per channel "
    "and of .npy with floating point; [] for 0 and 65535, which is for 16 bits alone.",
    "training",
    "evaluation",
    "inference",
)

logger = logging.getLogger(__name__)

TIFF_SUFFIXES = (".tif", ".tiff")
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", *TIFF_SUFFIXES, ".npy")
CHANNELS = {1: "L", 3: "RGB", 4: "RGBA"}  # of a .npy, and what they are taken for
DEEP_MODES = ("I", "F")  # and I;16 of several byte orders: Pillow's, of more than 8 bits
MOST_PAGES = 10_000  # of a TIFF
WHOLE_16_BITS = (0.0, 65535.0)
PIXELS_AT_A_TIME = 4_000_000  # of a large picture, from Pillow to NumPy


def value_range(cfg: CfgNode) -> tuple[float, ...]:
    """``INPUT.FPN_EXT.VALUE_RANGE``, checked.

    Raises:
        ValueError: it is neither empty nor two numbers, the lower first.
    """
    given = tuple(float(value) for value in own_keys(cfg, "INPUT").VALUE_RANGE)
    if given and not (len(given) == 2 and np.isfinite(given).all() and given[0] < given[1]):
        raise ValueError(
            f"INPUT.FPN_EXT.VALUE_RANGE must be [] or [low, high] with low < high, got {given}"
        )
    return given


def num_pages(file: str | Path) -> int:
    """How many pictures a file holds: the pages of a TIFF, 1 of any other.

    Raises:
        OSError: a TIFF that cannot be opened.
        ValueError: a TIFF of more than :data:`MOST_PAGES`.
    """
    if Path(file).suffix.lower() not in TIFF_SUFFIXES:
        return 1
    with Image.open(file) as image:
        return _pages(image)


def _pages(image: Image.Image) -> int:
    """Of an opened TIFF, which is left at its first page; no more of it is read than is allowed."""
    number = 0
    with contextlib.suppress(EOFError):
        while number <= MOST_PAGES:
            image.seek(number)
            number += 1
    if number > MOST_PAGES:
        name = getattr(image, "filename", "the TIFF")
        raise ValueError(f"{name} has more than {MOST_PAGES} pages: split it")
    image.seek(0)
    return number


def read_picture(
    file: str | Path, pixel_format: str, values: Sequence[float] = (), page: int | None = None
) -> np.ndarray:
    """A picture, (H, W, C), in the channels of ``INPUT.FORMAT``; uint8 unless that is YUV-BT.601.

    Args:
        file: what Pillow reads; or ``.npy`` of (H, W) or (H, W, C), uint8, uint16 or floating
            point, whose 1, 3 or 4 channels are grey, RGB or RGBA. Pickled objects are not read.
        pixel_format: as in ``INPUT.FORMAT``: "BGR", "RGB", "L", "RGBA", ...
        values: ``INPUT.FPN_EXT.VALUE_RANGE``.
        page: of a TIFF with several, from 0; None for the first, which is said if there are more.

    Raises:
        OSError: the file cannot be read, or not decoded, or states more pixels than Pillow reads.
        ValueError: an array that is no picture; values outside of ``values``; floating point
            without ``values``; ``values`` with colours of 16 bits, which are read as 8.
    """
    path = Path(file)
    try:
        return _read(path, pixel_format, values, page)
    except Exception as error:  # decoders raise what they like, and most do not name the file
        if str(path) in str(error):
            raise
        raise OSError(f"{path} cannot be read: {type(error).__name__}: {error}") from error


def _read(path: Path, pixel_format: str, values: Sequence[float], page: int | None) -> np.ndarray:
    if path.suffix.lower() == ".npy":
        return convert_PIL_to_numpy(scaled(load_array(path), values, str(path)), pixel_format)
    with Image.open(path) as image:
        pages = _pages(image) if path.suffix.lower() in TIFF_SUFFIXES else 1
        if pages > 1 and page is None:
            _say_first_page(str(path), pages)
        if page:
            image.seek(page)
        if values and _is_cut_to_8_bits(image):
            raise ValueError(
                f"{path} has {image.mode} of 16 bits per channel, of which only the upper 8 bits "
                "are read, and INPUT.FPN_EXT.VALUE_RANGE would have no effect: convert it to 8 "
                "bits or .npy, or leave the key []"
            )
        if not page and not _is_deep(image.mode):
            return array_of(_apply_exif_orientation(image), pixel_format)
        return converted(image, pixel_format, values, str(path))


def converted(
    image: Image.Image, pixel_format: str, values: Sequence[float] = (), name: str = "the picture"
) -> np.ndarray:
    """A Pillow picture as :func:`read_picture` gives its file: turned as EXIF says, (H, W, C).

    Args:
        image: of any mode. Of a file of several pages, the one it stands at.
        pixel_format, values: as in :func:`read_picture`.
        name: for messages.

    Raises:
        OSError: it cannot be decoded.
        ValueError: values outside of ``values``; floating point without ``values``.
    """
    image.load()
    turned = ImageOps.exif_transpose(image)
    if _is_deep(turned.mode):
        turned = scaled(np.asarray(turned), values, name)
    return array_of(turned, pixel_format)


def array_of(image: Image.Image, pixel_format: str) -> np.ndarray:
    """Detectron2's ``convert_PIL_to_numpy``, of a large picture some rows at a time.

    Pillow holds four bytes a pixel, converts into a copy and hands the pixels over in pieces that
    are then joined: of the whole picture at once, 12000x9000 pixels take 1.5 GB instead of 0.75.

    Args:
        image: of at most 8 bits a channel.
        pixel_format: as in :func:`read_picture`.

    Returns:
        (H, W, C), as :func:`read_picture`.
    """
    width, height = image.size
    rows = max(1, PIXELS_AT_A_TIME // max(1, width))
    if height <= rows:
        return convert_PIL_to_numpy(image, pixel_format)
    array: np.ndarray | None = None
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        part = convert_PIL_to_numpy(image.crop((0, top, width, bottom)), pixel_format)
        if array is None:
            array = np.empty((height, *part.shape[1:]), part.dtype)
        array[top:bottom] = part
    assert array is not None
    return array


def _is_deep(mode: str) -> bool:
    return mode in DEEP_MODES or mode.startswith("I;16")


def _is_cut_to_8_bits(image: Image.Image) -> bool:
    """Whether Pillow drops the lower half of each value, as of colours with 16 bits."""
    return not _is_deep(image.mode) and any(
        ";16" in str(tile[3]) for tile in getattr(image, "tile", ())
    )


def load_array(file: Path) -> np.ndarray:
    """The array of a ``.npy``: (H, W) or (H, W, C) with 1, 3 or 4 channels.

    Raises:
        OSError: it cannot be opened.
        ValueError: it holds something else; pickled objects are not read.
    """
    try:
        # Mapped: read, it would be allocated first, as large as the file states it is.
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(
            f"{file}: no array of numbers ({error}). Arrays are read as data alone: save numbers, "
            "with numpy.save"
        ) from error
    if not isinstance(array, np.ndarray) or array.ndim not in (2, 3) or 0 in array.shape:
        raise ValueError(f"{file}: a picture is (H, W) or (H, W, C), got {np.shape(array)}")
    if array.ndim == 3 and array.shape[2] not in CHANNELS:
        raise ValueError(
            f"{file}: {array.shape[2]} channels in (H, W, C) {array.shape}; a picture has 1, 3 or 4"
        )
    return np.array(array)


def scaled(
    array: np.ndarray, values: Sequence[float] = (), name: str = "the picture"
) -> Image.Image:
    """An array of any depth as a picture of 8 bits a channel.

    Args:
        array: (H, W) or (H, W, C), 1, 3 or 4 channels being grey, RGB or RGBA.
        values, name: as in :func:`converted`.

    Raises:
        ValueError: values outside of ``values``; floating point without ``values``.
    """
    if array.dtype != np.uint8:
        low, high = _range_of(array, values, name)
        lowest, highest = float(array.min()), float(array.max())
        if not low <= lowest <= highest <= high:  # nor NaN
            raise ValueError(
                f"{name}: its values go from {lowest:g} to {highest:g}, outside of {low:g} to "
                f"{high:g}; they are not clipped: set INPUT.FPN_EXT.VALUE_RANGE to the range of "
                "all pictures"
            )
        array = np.rint((array.astype(np.float64) - low) * (255 / (high - low))).astype(np.uint8)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    return Image.fromarray(np.ascontiguousarray(array))


def _range_of(array: np.ndarray, values: Sequence[float], name: str) -> tuple[float, float]:
    if array.dtype.kind not in "uif":
        raise ValueError(f"{name}: values of type {array.dtype}; uint8, uint16 or floating point")
    if values:
        low, high = values
        return low, high
    if array.dtype.kind == "f":
        raise ValueError(
            f"{name}: floating point has no range of its own; set INPUT.FPN_EXT.VALUE_RANGE to the "
            "values that are to become 0 and 255, e.g. [0.0, 1.0]"
        )
    _say_16_bits()
    return WHOLE_16_BITS


@functools.cache
def _say_16_bits() -> None:
    logger.warning(
        "pictures of 16 bits: 0 to 65535 become 0 to 255; where they use a smaller range, "
        "INPUT.FPN_EXT.VALUE_RANGE keeps more of it"
    )


@functools.cache
def _say_first_page(file: str, pages: int) -> None:
    logger.warning('%s has %d pages, and the first is read; a record\'s "page" names another',
                   file, pages)  # fmt: skip


def as_rgb(image: np.ndarray, pixel_format: str) -> np.ndarray:
    """A picture in the channels of ``INPUT.FORMAT`` as (H, W, 3) uint8 RGB, to be drawn on.

    Transparency is left out.

    >>> as_rgb(np.array([[[7]]], dtype=np.uint8), "L").tolist()
    [[[7, 7, 7]]]
    >>> as_rgb(np.array([[[1, 2, 3]]], dtype=np.uint8), "BGR").tolist()
    [[[3, 2, 1]]]
    """
    if pixel_format == "BGR":
        image = image[:, :, ::-1]
    elif pixel_format not in ("RGB", "L", "RGBA"):
        raise ValueError(f"INPUT.FORMAT {pixel_format!r} cannot be drawn; BGR, RGB, L and RGBA can")
    if image.shape[2] == 1:
        image = np.repeat(image, 3, axis=2)
    return np.ascontiguousarray(image[:, :, :3])


def from_rgb(image: np.ndarray, pixel_format: str) -> np.ndarray:
    """An (H, W, 3) uint8 RGB picture in the channels of ``INPUT.FORMAT``; opaque in RGBA.

    >>> from_rgb(np.array([[[1, 2, 3]]], dtype=np.uint8), "RGBA").tolist()
    [[[1, 2, 3, 255]]]
    """
    return convert_PIL_to_numpy(Image.fromarray(image), pixel_format)
