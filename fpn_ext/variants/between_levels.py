"""From one level's size to the next one's: what the pyramids beside the plain one share."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..levels import stride_named


def ratio_of(finer: str, coarser: str) -> float:
    """How many cells of the finer level lie side by side in one of the coarser level.

    >>> ratio_of("p2", "p3"), ratio_of("p2", "p4"), ratio_of("p2", "ps6")
    (2.0, 4.0, 1.5)
    """
    strides = stride_named(finer), stride_named(coarser)
    assert strides[0] is not None and strides[1] is not None, (finer, coarser)
    return strides[1] / strides[0]


def whole_step(ratio: float) -> int:
    """The stride of a layer that goes from the finer level to the coarser: 2; 4 over a gap.

    Where the ratio is no whole number the layer stays finer, and :func:`resized` does the rest.

    >>> [whole_step(ratio) for ratio in (2.0, 4.0, 1.5)]
    [2, 4, 1]
    """
    return math.floor(ratio)


def resized(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(N, d, H', W') in the size of ``like``, (N, d, H, W), by nearest neighbour."""
    if x.shape[2] == like.shape[2] and x.shape[3] == like.shape[3]:
        return x
    return F.interpolate(x, size=like.shape[2:], mode="nearest")


def check_several(names: Sequence[str], pyramid: str) -> None:
    """Raise ValueError unless there are two levels at least for ``pyramid`` to merge."""
    if len(names) < 2:
        raise ValueError(
            f"MODEL.BACKBONE.NAME {pyramid} merges levels and needs at least two, got "
            f"{list(names)}: name more maps in MODEL.FPN.IN_FEATURES, or use FeaturePyramid"
        )


def check_fuse_type(fuse_type: str, pyramid: str) -> None:
    """Raise ValueError unless levels are summed, for a ``pyramid`` that has no other way."""
    if fuse_type != "sum":
        raise ValueError(
            f"MODEL.FPN.FUSE_TYPE must be 'sum' with MODEL.BACKBONE.NAME {pyramid}, "
            f"got {fuse_type!r}"
        )
