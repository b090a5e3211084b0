"""What a detector may be called with, as the array that its model takes."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image

from ..data.reading import converted, read_picture, scaled
from ..names import did_you_mean

Source: TypeAlias = str | os.PathLike[str] | Image.Image | np.ndarray | torch.Tensor

# Order of the channels of an array -> number of channels, and whether they are reversed.
CHANNEL_ORDERS = {"RGB": (3, False), "BGR": (3, True), "RGBA": (4, False), "L": (1, False)}


def picture_of(
    source: Source, channels: str, pixel_format: str, values: Sequence[float] = ()
) -> np.ndarray:
    """A picture, (H, W, C), in the channels of ``INPUT.FORMAT``, whatever it is given as.

    Files are read by :func:`fpn_ext.data.reading.read_picture`. The same picture as a file and as
    what Pillow has read of it gives the same array.

    Args:
        source: a path; a Pillow picture of any mode, turned as its EXIF says; a NumPy array,
            (H, W, C), or (H, W) for grey; or a tensor, (C, H, W), on any device. uint8; of another
            type only with ``values``.
        channels: order of the channels of an array or a tensor: "RGB", "BGR", "RGBA" or "L".
        pixel_format: ``INPUT.FORMAT``.
        values: ``INPUT.FPN_EXT.VALUE_RANGE``.

    Raises:
        OSError: a file that cannot be read, or not decoded.
        TypeError: of another class; an array or tensor that is not uint8, without ``values``.
        ValueError: another shape than ``channels`` has; values outside of ``values``.
    """
    if isinstance(source, str | os.PathLike):
        return read_picture(Path(source), pixel_format, values)
    if isinstance(source, Image.Image):
        return converted(source, pixel_format, values)
    if isinstance(source, torch.Tensor):
        array = _of_tensor(source, channels)
    elif isinstance(source, np.ndarray):
        array = source[:, :, None] if source.ndim == 2 and channels == "L" else source
    else:
        raise TypeError(
            "a picture is a path, a Pillow picture, a NumPy array or a tensor, got "
            f"{type(source).__name__}"
        )
    _check_array(array, channels, values)
    if CHANNEL_ORDERS[channels][1]:
        array = array[:, :, ::-1]
    return converted(scaled(array, values), pixel_format)


def check_channels(channels: str) -> None:
    """Raise ValueError unless ``channels`` is an order of :data:`CHANNEL_ORDERS`."""
    if channels not in CHANNEL_ORDERS:
        raise ValueError(
            f"channels={channels!r}: no such order of channels; "
            + did_you_mean(str(channels), CHANNEL_ORDERS)
        )


def _of_tensor(tensor: torch.Tensor, channels: str) -> np.ndarray:
    count = CHANNEL_ORDERS[channels][0]
    if tensor.ndim != 3 or tensor.shape[0] != count:
        raise ValueError(
            f"a tensor with channels={channels!r} has the shape ({count}, H, W), got "
            f"{tuple(tensor.shape)}; several pictures are given as a list"
        )
    if tensor.dtype == torch.bfloat16:
        raise TypeError("a picture must be uint8, got a tensor of torch.bfloat16")
    return tensor.detach().cpu().permute(1, 2, 0).numpy()


def _check_array(array: np.ndarray, channels: str, values: Sequence[float]) -> None:
    count = CHANNEL_ORDERS[channels][0]
    if array.ndim != 3 or array.shape[2] != count or 0 in array.shape:
        wanted = "(H, W) or (H, W, 1)" if count == 1 else f"(H, W, {count})"
        raise ValueError(
            f"an array with channels={channels!r} has the shape {wanted}, got {array.shape}; "
            f"channels= says another order ({', '.join(CHANNEL_ORDERS)}), and several pictures "
            "are given as a list"
        )
    if array.dtype != np.uint8 and not values:
        raise TypeError(
            f"a picture must be uint8, from 0 to 255, got {array.dtype}. For other values set "
            "INPUT.FPN_EXT.VALUE_RANGE to those that are to become 0 and 255, as in training"
        )


def is_source(source: Any) -> bool:
    """Whether it is one picture, or its path, by its class."""
    return isinstance(source, str | os.PathLike | Image.Image | np.ndarray | torch.Tensor)


def as_list(sources: Any) -> tuple[list[Any], bool]:
    """One or several sources as a list, and whether it was one.

    Raises:
        TypeError: neither; a generator, for example.
    """
    if is_source(sources):
        return [sources], True
    if isinstance(sources, Sequence) and not isinstance(sources, bytes | bytearray):
        return list(sources), False
    raise TypeError(
        "a detector takes a path, a Pillow picture, a NumPy array, a tensor, or a list of these; "
        f"got {type(sources).__name__}. .stream(...) takes any iterable"
    )
