"""Other upsamplings for the top-down pathway: bilinear, and learned.

Lin et al. 2017 upsample by nearest neighbour "for simplicity" (Sec. 3). Both alternatives are those
of Long et al., "Fully Convolutional Networks for Semantic Segmentation", CVPR 2015 (arXiv
1411.4038), Sec. 3.3; DSSD (Fu et al. 2017, arXiv 1701.06659), a top-down detector, prefers the
learned one. Where they are silent: docs/paper/differences.md.
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
    """One top-down step: the coarser map, bilinearly upsampled to the lateral's size, plus it."""

    def forward(self, lateral: torch.Tensor, coarser: torch.Tensor) -> torch.Tensor:
        """(N, d, H, W) and (N, d, ceil(H/2), ceil(W/2)) -> (N, d, H, W).

        Each cell's value stands at its centre (``align_corners=False``).
        """
        size = lateral.shape[-2:]
        return F.interpolate(coarser, size=size, mode="bilinear", align_corners=False).add_(lateral)


@BACKBONE_REGISTRY.register()
class BilinearPyramid(FeaturePyramid):
    """:class:`FeaturePyramid` whose top-down pathway upsamples bilinearly.

    Arguments, keys and names of parameters are FeaturePyramid's; checkpoints of either load into
    the other.

    Raises:
        ValueError: those of FeaturePyramid, one level alone, a ``fuse_type`` other than ``"sum"``.
    """

    @configurable
    def __init__(self, *, fuse_type: str = "sum", **kwargs: Any):
        check_fuse_type(fuse_type, type(self).__name__)
        super().__init__(**kwargs)
        check_several(self._out_features[: len(self.in_features)], type(self).__name__)
        self.top_down = BilinearSum()


class LearnedSum(nn.Module):
    """One top-down step: the coarser map upsampled by a transposed convolution, plus the lateral.

    Kernel and stride are the same, 2x2 without a gap: every cell makes 2 x 2 cells of its own. At
    the start each of them is a copy of it, which is nearest neighbour; biases are 0.

    Args:
        channels: d, of all maps.
        stride: cells of the lateral to one of the coarser map.
    """

    def __init__(self, channels: int, stride: int = 2):
        super().__init__()
        self.up = nn.ConvTranspose2d(channels, channels, stride, stride)
        nn.init.zeros_(self.up.bias)  # type: ignore[arg-type]  # there is one
        with torch.no_grad():
            self.up.weight.copy_(torch.eye(channels)[:, :, None, None].expand_as(self.up.weight))

    def forward(self, lateral: torch.Tensor, coarser: torch.Tensor) -> torch.Tensor:
        """(N, d, H, W) and (N, d, ceil(H/2), ceil(W/2)) -> (N, d, H, W).

        Where the result is larger than the lateral, whose sides were rounded up on the way to the
        coarser map, cells are left out as nearest neighbour does it; with a stride of 2 the last.
        """
        return resized(self.up(coarser), lateral) + lateral


@BACKBONE_REGISTRY.register()
class LearnedUpsamplingPyramid(FeaturePyramid):
    """:class:`FeaturePyramid` whose top-down pathway learns to upsample, at every step by itself.

    Before training it is FeaturePyramid, to rounding, where each stride is twice the one before it,
    or the image's sides are multiples of the coarsest. Arguments and keys are FeaturePyramid's; the
    parameters that are added are ``fpn_upsample{k}.up.*``, which make the map that is added to the
    lateral of level k.

    Raises:
        ValueError: those of FeaturePyramid, one level alone, a ``fuse_type`` other than ``"sum"``.
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
        # A plain list, coarse to fine: see FeaturePyramid. The first one is never called.
        self.steps = [self.top_down, *steps[::-1]]
        del self.top_down
        if channels_last:
            self.to(memory_format=torch.channels_last)

    def levels_on_maps(self, maps: list[torch.Tensor]) -> list[torch.Tensor]:
        """As :meth:`FeaturePyramid.levels_on_maps`, each top-down step by its own module."""
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
