"""Bottom-up path augmentation: Liu et al., "Path Aggregation Network for Instance Segmentation".

CVPR 2018 (PANet, arXiv 1803.01534), Sec. 3.1 and Fig. 2. PANet's other parts are outside the
pyramid (adaptive feature pooling: :mod:`fpn_ext.variants.all_levels`). Choices it leaves open:
docs/paper/differences.md.
"""

import itertools
from typing import Any

import fvcore.nn.weight_init as weight_init
import torch
from detectron2.config import configurable
from detectron2.layers import Conv2d, get_norm
from detectron2.modeling import BACKBONE_REGISTRY
from torch import nn

from ..modeling.fpn import FeaturePyramid
from .between_levels import check_several, ratio_of, resized, whole_step


class AugmentationStep(nn.Module):
    """N_{i+1} from N_i and P_{i+1}: a building block of the augmented path.

    Args:
        channels: d, of all maps.
        stride: stride ratio of P_{i+1} to N_i, 2 without a gap.
        norm: name known to :func:`detectron2.layers.get_norm`; ``""`` for none.
    """

    def __init__(self, channels: int, stride: int = 2, norm: str = ""):
        super().__init__()
        # 3x3 for stride 2, as in the paper; across a gap, large enough to skip no cell.
        reach = max(1, stride // 2)
        self.down = _convolution(channels, 2 * reach + 1, stride, norm)
        self.output = _convolution(channels, 3, 1, norm)

    def forward(self, finer: torch.Tensor, coarser: torch.Tensor) -> torch.Tensor:
        """N_i (N, d, H, W), P_{i+1} (N, d, ceil(H/2), ceil(W/2)) -> N_{i+1}, sized as P_{i+1}."""
        return self.output(resized(self.down(finer), coarser) + coarser)


def _convolution(channels: int, size: int, stride: int, norm: str) -> nn.Module:
    convolution = Conv2d(
        channels,
        channels,
        size,
        stride=stride,
        padding=size // 2,
        bias=norm == "",
        norm=get_norm(norm, channels),
        activation=nn.ReLU(),
    )
    weight_init.c2_msra_fill(convolution)
    return convolution


@BACKBONE_REGISTRY.register()
class PathAggregationPyramid(FeaturePyramid):
    """:class:`FeaturePyramid` plus a bottom-up path from its finest level: P2..P5 become N2..N5.

    "N2 is simply P2, without any processing"; each N_{i+1} is a 3x3 convolution on the sum of
    P_{i+1} and a 3x3 convolution of stride 2 on N_i, each followed by a ReLU. This shortens the
    path from low-level localisation features to every level.

    N_k keeps the name of P_k, ``"p{k}"``, so nothing else in a config changes. A top block that
    reads the coarsest P_k reads the coarsest N_k instead. Arguments and keys are FeaturePyramid's;
    the added parameters are ``pan{k}.down.*`` and ``pan{k}.output.*`` for each N_k but the finest.

    Raises:
        ValueError: as FeaturePyramid; a single level.
    """

    @configurable
    def __init__(self, *, norm: str = "", channels_last: bool = False, **kwargs: Any):
        super().__init__(norm=norm, channels_last=channels_last, **kwargs)
        levels = self._out_features[: len(self.in_features)]
        check_several(levels, type(self).__name__)
        steps = []  # a plain list, fine to coarse: see FeaturePyramid
        for finer, coarser in itertools.pairwise(levels):
            stride = whole_step(ratio_of(finer, coarser))
            step = AugmentationStep(self._out_feature_channels[coarser], stride, norm)
            self.add_module(f"pan{coarser[1:]}", step)
            steps.append(step)
        self.steps = steps
        if channels_last:
            self.to(memory_format=torch.channels_last)

    def with_top_block(
        self, levels: list[torch.Tensor], top_map: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """As :meth:`FeaturePyramid.with_top_block`, with P_k replaced by N_k, also in ``levels``.

        N2 is P2.
        """
        for i, step in enumerate(self.steps):
            levels[i + 1] = step(levels[i], levels[i + 1])  # frees P_k once N_k is made
        return levels + self.levels_above(levels, top_map)
