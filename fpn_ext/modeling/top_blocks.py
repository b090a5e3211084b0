"""Levels above the bottom-up's coarsest map: ``MODEL.FPN_EXT.TOP_BLOCK``.

The paper's P6 is subsampled from P5 (Lin et al. 2017, footnote 2). RetinaNet (Lin et al. 2017b,
arXiv 1708.02002, footnote 2) makes P6 and P7 by convolutions on C5, FCOS (Tian et al. 2019) by
convolutions on P5.
"""

from typing import NamedTuple

import fvcore.nn.weight_init as weight_init
import torch
import torch.nn.functional as F
from detectron2.utils.registry import Registry
from torch import nn

from ..keys import declare

declare(
    "MODEL.FPN_EXT.TOP_BLOCK",
    "Subsample",
    "How levels above the bottom-up's coarsest map are made: Subsample (the paper), "
    "ConvolutionsOnP (of stride 2, on the coarsest P_k), ConvolutionsOnC (on C5).",
    "FeaturePyramid",
)

TOP_BLOCK_REGISTRY = Registry("TOP_BLOCK")
TOP_BLOCK_REGISTRY.__doc__ = """
Modules that add coarser levels to a pyramid, each with twice the stride of the last.

A registered class has a classmethod ``on(top: Top)`` that builds the module for a pyramid. The
module has ``in_feature``, the name of the map it reads, ``num_levels``, and ``forward(map)``, which
returns a list of that many maps, fine to coarse.
"""


class Top(NamedTuple):
    """The top of a pyramid, on which a top block is built.

    Attributes:
        p: name of the coarsest P_k.
        c: name of the bottom-up's map below it.
        c_channels: channels of that map.
        out_channels: channels of every P_k.
        names: of the levels to add, fine to coarse.
    """

    p: str
    c: str
    c_channels: int
    out_channels: int
    names: list[str]


@TOP_BLOCK_REGISTRY.register()
class Subsample(nn.Module):
    """P6, "simply a stride two subsampling of P5" (paper, footnote 2): every second cell.

    Args:
        in_feature: name of the map it reads, e.g. ``"p5"``.
        num_levels: levels to add; P7 is subsampled from P6.
    """

    def __init__(self, in_feature: str, num_levels: int = 1):
        super().__init__()
        self.in_feature = in_feature
        self.num_levels = num_levels

    @classmethod
    def on(cls, top: Top) -> "Subsample":
        return cls(top.p, len(top.names))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """(N, d, H, W) -> maps (N, d, ceil(H/2), ceil(W/2)), ..., each half the last."""
        maps: list[torch.Tensor] = []
        for _ in range(self.num_levels):
            x = F.max_pool2d(x, kernel_size=1, stride=2)
            maps.append(x)
        return maps


class Convolutions(nn.Module):
    """A 3x3 convolution of stride 2 per level, with ReLUs in between.

    Parameters are named after the levels (``p6.weight``, ``p7.weight``), as in Detectron2's
    RetinaNet.

    Args:
        in_feature: name of the map it reads.
        in_channels: channels of that map.
        out_channels: of the levels.
        names: of the levels to add, fine to coarse.
    """

    def __init__(self, in_feature: str, in_channels: int, out_channels: int, names: list[str]):
        super().__init__()
        self.in_feature = in_feature
        self.num_levels = len(names)
        convolutions = []
        for name in names:
            convolution = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1)
            weight_init.c2_xavier_fill(convolution)
            self.add_module(name, convolution)
            convolutions.append(convolution)
            in_channels = out_channels
        self.convolutions = convolutions  # a plain list: see FeaturePyramid

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """(N, in_channels, H, W) -> maps (N, d, ceil(H/2), ceil(W/2)), ..., each half the last."""
        maps: list[torch.Tensor] = []
        for convolution in self.convolutions:
            x = convolution(F.relu(x) if len(maps) > 0 else x)
            maps.append(x)
        return maps


@TOP_BLOCK_REGISTRY.register()
class ConvolutionsOnP(Convolutions):
    """:class:`Convolutions` on the coarsest P_k, as in FCOS."""

    @classmethod
    def on(cls, top: Top) -> "ConvolutionsOnP":
        return cls(top.p, top.out_channels, top.out_channels, top.names)


@TOP_BLOCK_REGISTRY.register()
class ConvolutionsOnC(Convolutions):
    """:class:`Convolutions` on the bottom-up's coarsest map, as in RetinaNet."""

    @classmethod
    def on(cls, top: Top) -> "ConvolutionsOnC":
        return cls(top.c, top.c_channels, top.out_channels, top.names)
