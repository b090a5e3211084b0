"""Alternative upsampling for the top-down pathway: bilinear and learned.

Lin et al. 2017 upsample by nearest neighbour "for simplicity" (Sec. 3). Both alternatives are from
Long et al., "Fully Convolutional Networks for Semantic Segmentation", CVPR 2015 (arXiv 1411.4038),
Sec. 3.3; DSSD (Fu et al. 2017, arXiv 1701.06659), a top-down detector, prefers the learned one.
Choices they leave open: docs/paper/differences.md.
"""

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.modeling import BACKBONE_REGISTRY
from torch import nn

from ..modeling.fpn import FeaturePyramid
from .between_levels import check_fuse_type, check_several, ratio_of, resized


class BilinearSum(nn.Module):
    """One top-down step: the coarser map bilinearly upsampled, plus the lateral."""

    def forward(self, lateral: torch.Tensor, coarser: torch.Tensor) -> torch.Tensor:
        """(N, d, H, W) and (N, d, ceil(H/2), ceil(W/2)) -> (N, d, H, W).

        Values are located at cell centres (``align_corners=False``).
        """
        size = lateral.shape[-2:]
        return F.interpolate(coarser, size=size, mode="bilinear", align_corners=False).add_(lateral)


@BACKBONE_REGISTRY.register()
class BilinearPyramid(FeaturePyramid):
    """:class:`FeaturePyramid` whose top-down pathway upsamples bilinearly.

    Arguments, keys and parameter names are FeaturePyramid's; checkpoints of either load into the
    other.

    Raises:
        ValueError: as FeaturePyramid; a single level; a ``fuse_type`` other than ``"sum"``.
    """

    @configurable
    def __init__(self, *, fuse_type: str = "sum", **kwargs: Any):
        check_fuse_type(fuse_type, type(self).__name__)
        super().__init__(**kwargs)
        check_several(self._out_features[: len(self.in_features)], type(self).__name__)
        self.top_down = BilinearSum()


class LearnedSum(nn.Module):
    """One top-down step: the coarser map upsampled by a transposed convolution, plus the lateral.

    Kernel and stride are equal, 2x2 without a gap: every cell yields its own 2 x 2 cells.
    Initialised to copy the cell, i.e. to nearest neighbour, with zero biases.

    Args:
        channels: d, of all maps.
        stride: stride ratio of the coarser map to the lateral.
    """

    def __init__(self, channels: int, stride: int = 2):
        super().__init__()
        self.up = nn.ConvTranspose2d(channels, channels, stride, stride)
        nn.init.zeros_(self.up.bias)  # type: ignore[arg-type]  # not None
        with torch.no_grad():
            self.up.weight.copy_(torch.eye(channels)[:, :, None, None].expand_as(self.up.weight))

    def forward(self, lateral: torch.Tensor, coarser: torch.Tensor) -> torch.Tensor:
        """(N, d, H, W) and (N, d, ceil(H/2), ceil(W/2)) -> (N, d, H, W).

        If the upsampled map exceeds the lateral, because sides were rounded up on the way to the
        coarser map, cells are dropped as nearest neighbour does; with stride 2, the last.
        """
        return resized(self.up(coarser), lateral) + lateral


@BACKBONE_REGISTRY.register()
class LearnedUpsamplingPyramid(FeaturePyramid):
    """:class:`FeaturePyramid` with learned upsampling, separate for each top-down step.

    Before training it equals FeaturePyramid to rounding if each stride is twice the last or image
    sides are multiples of the coarsest stride. Arguments and keys are FeaturePyramid's; the added
    parameters are ``fpn_upsample{k}.up.*``, which upsample to the lateral of level k.

    Raises:
        ValueError: as FeaturePyramid; a single level; a ``fuse_type`` other than ``"sum"``.
    """

    @configurable
    def __init__(self, *, fuse_type: str = "sum", channels_last: bool = False, **kwargs: Any):
        check_fuse_type(fuse_type, type(self).__name__)
        super().__init__(channels_last=channels_last, **kwargs)
        levels = self._out_features[: len(self.in_features)]
        check_several(levels, type(self).__name__)
        steps = []
        for finer, coarser in itertools.pairwise(levels):
            stride = math.ceil(ratio_of(finer, coarser))
            step = LearnedSum(self._out_feature_channels[finer], stride)
            self.add_module(f"fpn_upsample{finer[1:]}", step)
            steps.append(step)
        # A plain list, coarse to fine: see FeaturePyramid. The first is never called.
        self.steps = [self.top_down, *steps[::-1]]
        del self.top_down
        if channels_last:
            self.to(memory_format=torch.channels_last)

    def levels_on_maps(self, maps: list[torch.Tensor]) -> list[torch.Tensor]:
        """As :meth:`FeaturePyramid.levels_on_maps`, with a module per top-down step."""
        levels: list[torch.Tensor] = []
        coarser: torch.Tensor | None = None
        walk = zip(self.laterals, self.steps, self.outputs)  # noqa: B905 (TorchScript)
        for lateral, step, output in walk:
            merged = lateral(maps.pop())
            if coarser is not None:
                merged = step(merged, coarser)
            levels.insert(0, output(merged))
            coarser = merged
        return levels
