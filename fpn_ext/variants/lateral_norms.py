"""Normalised lateral connections.

``MODEL.FPN.NORM`` puts a norm after every convolution of :class:`FeaturePyramid`, lateral and
output, as Wu & He do with group norm ("Group Normalization", ECCV 2018, arXiv 1803.08494, Sec.
4.2). Liu et al. ("ParseNet", 2015, arXiv 1506.04579, Sec. 3.3) motivate it for laterals only:
feature maps of different layers differ in scale, and when merged the larger dominates. Choices
they leave open: docs/paper/differences.md.
"""

from typing import Any

import torch
from detectron2.config import configurable
from detectron2.modeling import BACKBONE_REGISTRY
from torch import nn

from ..modeling.fpn import FeaturePyramid


@BACKBONE_REGISTRY.register()
class NormalizedLateralPyramid(FeaturePyramid):
    """:class:`FeaturePyramid` with a norm after each lateral 1x1 convolution, and nowhere else.

    The 3x3 output convolutions have biases instead. Arguments, keys and parameter names are
    FeaturePyramid's.

    Args:
        norm: normalisation after the lateral connections, a name known to
            :func:`detectron2.layers.get_norm`.

    Raises:
        ValueError: as FeaturePyramid; an empty ``norm``.
    """

    @configurable
    def __init__(self, *, norm: str, **kwargs: Any):
        if norm == "":
            raise ValueError(
                "MODEL.FPN.NORM is empty: NormalizedLateralPyramid needs the norm that goes after "
                'the lateral connections, e.g. "GN"; without any, use FeaturePyramid'
            )
        super().__init__(norm=norm, **kwargs)
        for output in self.outputs:
            output.norm = None
            output.bias = nn.Parameter(torch.zeros(output.out_channels))
