"""Resizing between adjacent levels and argument checks, shared by the variant pyramids."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..exporting import records_a_graph
from ..levels import stride_named


def ratio_of(finer: str, coarser: str) -> float:
    """Ratio of strides: cells of the finer level along one cell of the coarser.

    >>> ratio_of("p2", "p3"), ratio_of("p2", "p4"), ratio_of("p2", "ps6")
    (2.0, 4.0, 1.5)
    """
    strides = stride_named(finer), stride_named(coarser)
    assert strides[0] is not None and strides[1] is not None, (finer, coarser)
    return strides[1] / strides[0]


def whole_step(ratio: float) -> int:
    """Stride of a layer from the finer level to the coarser: 2; 4 across a gap.

    If the ratio is not an integer the layer's output is finer, and :func:`resized` does the rest.

    >>> [whole_step(ratio) for ratio in (2.0, 4.0, 1.5)]
    [2, 4, 1]
    """
    return math.floor(ratio)


def resized(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(N, d, H', W') resized to that of ``like``, (N, d, H, W), by nearest neighbour."""
    # In a graph the two may be of one size only where it was recorded.
    if not torch.jit.is_scripting() and records_a_graph():
        return F.interpolate(x, size=like.shape[2:], mode="nearest")
    if x.shape[2] == like.shape[2] and x.shape[3] == like.shape[3]:
        return x
    return F.interpolate(x, size=like.shape[2:], mode="nearest")


def check_several(names: Sequence[str], pyramid: str) -> None:
    """Raise ValueError unless ``pyramid`` has at least two levels to merge."""
    if len(names) < 2:
        raise ValueError(
            f"MODEL.BACKBONE.NAME {pyramid} merges levels and needs at least two, got "
            f"{list(names)}: name more maps in MODEL.FPN.IN_FEATURES, or use FeaturePyramid"
        )


def check_fuse_type(fuse_type: str, pyramid: str) -> None:
    """Raise ValueError unless levels are summed, the only way ``pyramid`` supports."""
    if fuse_type != "sum":
        raise ValueError(
            f"MODEL.FPN.FUSE_TYPE must be 'sum' with MODEL.BACKBONE.NAME {pyramid}, "
            f"got {fuse_type!r}"
        )
