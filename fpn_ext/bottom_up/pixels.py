"""Pixels as the bottom-up was trained with: mean, standard deviation and order of channels.

A file of ``BOTTOM_UP_WEIGHTS`` that ``fpn-ext weights convert`` wrote says which; of any other,
they are what the network's library says of the weights that it publishes.
"""

import json
import math
import os
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.config import get_cfg as get_detectron2_cfg

from ..files.weight_files import metadata_of
from ..keys import declare, own_keys
from ..registries.lookup import is_pyramid
from .libraries import Pixels, library_of
from .pretrained import is_package, package_named

declare(
    "MODEL.FPN_EXT.KEEP_PIXELS",
    False,
    "False: MODEL.PIXEL_MEAN, PIXEL_STD and INPUT.FORMAT follow BOTTOM_UP_WEIGHTS, where the file "
    "says them, or a bottom-up of torchvision, timm or detectron2/...; True: they stay as written.",
    "FeaturePyramid",
    "Detectron2Pyramid",
)

PIXEL_KEYS = ("INPUT.FORMAT", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD")


def is_from_library(cfg: CfgNode) -> bool:
    """Whether a config's pyramid stands on a network out of a library, ``"library/network"``."""
    return is_pyramid(cfg) and "/" in own_keys(cfg).BOTTOM_UP


def resolve_bottom_up(cfg: CfgNode) -> list[str]:
    """Set the pixel normalisation that ``MODEL.FPN_EXT.BOTTOM_UP`` was trained with.

    ``INPUT.FORMAT``, ``MODEL.PIXEL_MEAN`` and ``MODEL.PIXEL_STD`` still at Detectron2's defaults
    are set, in place, to those in the metadata of ``MODEL.FPN_EXT.BOTTOM_UP_WEIGHTS``, else to
    those of the network's library. Nothing changes for a network in Detectron2's registry, images
    without exactly 3 channels, or ``MODEL.FPN_EXT.KEEP_PIXELS``.

    Returns:
        Notes for the log: one line per key set.

    Raises:
        ValueError: an unknown network, or a value that is neither the default nor the network's.
    """
    wanted, source = _pixels_of(cfg)
    if wanted is None:
        return []
    given, default = _pixels_in(cfg), _pixels_in(get_detectron2_cfg())
    agrees = (
        given.format in (default.format, wanted.format),
        given.mean == default.mean or _agrees(given.mean, given.format, wanted.mean, wanted.format),
        given.std == default.std or _agrees(given.std, given.format, wanted.std, wanted.format),
    )
    both = (_as_written(given), _as_written(wanted))
    if not all(agrees):
        raise ValueError(
            "\n".join(
                f"{key} is {value}, but {source} was trained with "
                f"{own}" + ("" if key == PIXEL_KEYS[0] else f" ({wanted.format})")
                for key, value, own, fits in zip(PIXEL_KEYS, *both, agrees, strict=True)
                if not fits
            )
            + "\nTake the network's, or keep yours with MODEL.FPN_EXT.KEEP_PIXELS True"
        )
    cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = both[1]
    return [
        f"{key} is {new}, as {source} was trained with"
        for key, old, new in zip(PIXEL_KEYS, *both, strict=True)
        if old != new
    ]


def check_pixels_resolved(cfg: CfgNode) -> None:
    (wanted, source), given = _pixels_of(cfg), _pixels_in(cfg)
    if wanted is None:
        return
    if not (
        given.format == wanted.format
        and _close(given.mean, wanted.mean)
        and _close(given.std, wanted.std)
    ):
        raise ValueError(
            f"INPUT.FORMAT, MODEL.PIXEL_MEAN and MODEL.PIXEL_STD are {_as_written(given)}, "
            f"but {source} was trained with {_as_written(wanted)}: call "
            "fpn_ext.resolve_bottom_up(cfg) before building the model, or keep yours with "
            "MODEL.FPN_EXT.KEEP_PIXELS True"
        )


def _pixels_of(cfg: CfgNode) -> tuple[Pixels | None, str]:
    """What images are to follow, and whose it is; None where they stay as they are."""
    own = own_keys(cfg)
    if not is_from_library(cfg) or own.KEEP_PIXELS or len(cfg.MODEL.PIXEL_MEAN) != 3:
        return None, ""
    library, name = library_of(own.BOTTOM_UP)
    weights = own.BOTTOM_UP_WEIGHTS
    named = package_named(weights).pixels if is_package(weights) else pixels_in_file(weights)
    if named:
        return named, f"MODEL.FPN_EXT.BOTTOM_UP_WEIGHTS {weights}"
    return library.pixels(name), own.BOTTOM_UP


def pixels_in_file(file: str) -> Pixels | None:
    """What a file of weights says that its network was trained with; None where it says nothing.

    Args:
        file: a path; one that is not there, or another format than .safetensors, says nothing.

    Raises:
        ValueError: its metadata are not as :func:`pixels_as_metadata` writes them.
    """
    if not os.path.isfile(file):
        return None
    metadata = metadata_of(file)
    if "pixel_mean" not in metadata:
        return None
    try:
        mean, std = (
            tuple(float(v) for v in json.loads(metadata[key]))
            for key in ("pixel_mean", "pixel_std")
        )
        pixels = Pixels(metadata["pixel_format"], mean, std)
    except (KeyError, ValueError, TypeError):
        pixels = Pixels("", (), ())
    whole = len(pixels.mean) == len(pixels.std) == 3 and pixels.format in ("RGB", "BGR")
    if not whole or not all(math.isfinite(v) for v in pixels.mean) or min(pixels.std) <= 0:
        raise ValueError(
            f"{file}: its metadata say pixel_format, pixel_mean and pixel_std, but not as RGB or "
            "BGR, three numbers and three numbers above 0: convert it again with "
            "fpn-ext weights convert"
        )
    return pixels


def pixels_as_metadata(pixels: Pixels) -> dict[str, str]:
    """As a .safetensors file holds them beside its tensors.

    >>> pixels_as_metadata(Pixels("RGB", (127.0,) * 3, (128.0,) * 3))["pixel_mean"]
    '[127.0, 127.0, 127.0]'
    """
    return {
        "pixel_format": pixels.format,
        "pixel_mean": json.dumps(list(pixels.mean)),
        "pixel_std": json.dumps(list(pixels.std)),
    }


def _pixels_in(cfg: CfgNode) -> Pixels:
    return Pixels(cfg.INPUT.FORMAT, tuple(cfg.MODEL.PIXEL_MEAN), tuple(cfg.MODEL.PIXEL_STD))


def _as_written(pixels: Pixels) -> tuple[Any, ...]:
    """The values of ``PIXEL_KEYS``, as a config has them."""
    return pixels.format, list(pixels.mean), list(pixels.std)


def _agrees(given: tuple, given_format: str, wanted: tuple, wanted_format: str) -> bool:
    """In the network's order of channels, or in another that is given with them."""
    return _close(given, wanted) or (given_format != wanted_format and _close(given, wanted[::-1]))


def _close(some: Sequence[float], others: Sequence[float]) -> bool:
    return len(some) == len(others) and all(
        math.isclose(a, b, rel_tol=1e-3) for a, b in zip(some, others, strict=True)
    )
