"""BiFPN: Tan, Pang and Le, "EfficientDet: Scalable and Efficient Object Detection".

CVPR 2020 (arXiv 1911.09070), Sec. 3, Fig. 2(d). Choices it leaves open: docs/paper/differences.md.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import fvcore.nn.weight_init as weight_init
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY
from torch import nn

from ..keys import declare, own_keys
from ..modeling.fpn import FeaturePyramid
from .between_levels import check_fuse_type, check_several, ratio_of, resized, whole_step

declare(
    "MODEL.FPN_EXT.BIFPN_REPEATS",
    3,
    "Layers of weighted fusion, one after the other: 3 for EfficientDet-D0.",
    "BiFPN",
)


def fuse(maps: list[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    """Fast normalised fusion (Sec. 3.3): sum_i w_i I_i / (0.0001 + sum_j w_j).

    Negative weights count as 0.

    Args:
        maps: I_i, all of one shape.
        weights: (number of maps,) w_i.

    >>> fuse([torch.tensor(10.0), torch.tensor(20.0)], torch.tensor([1.0, 3.0])).item()
    17.499...
    """
    weights = F.relu(weights)
    shares = weights / (weights.sum() + 1e-4)
    fused = maps[0] * shares[0]
    for i in range(1, len(maps)):
        fused = fused + maps[i] * shares[i]
    return fused


class FusionNode(nn.Module):
    """A BiFPN node: fusion, then a depthwise separable convolution, norm and SiLU.

    Args:
        inputs: number of maps; their weights are initialised to 1.
        channels: d, of all maps.
        norm: name known to :func:`detectron2.layers.get_norm`; ``""`` for none, with a bias.
    """

    def __init__(self, inputs: int, channels: int, norm: str):
        super().__init__()
        self.weights = nn.Parameter(torch.ones(inputs))
        self.depthwise = Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.pointwise = Conv2d(
            channels,
            channels,
            1,
            bias=norm == "",
            norm=get_norm(norm, channels),
            activation=nn.SiLU(),
        )
        for convolution in (self.depthwise, self.pointwise):
            weight_init.c2_xavier_fill(convolution)

    def forward(self, maps: list[torch.Tensor]) -> torch.Tensor:
        """Maps (N, d, H, W), all of one size -> (N, d, H, W)."""
        return self.pointwise(self.depthwise(fuse(maps, self.weights)))


class BiFPNLayer(nn.Module):
    """One layer: a top-down pathway, then a bottom-up one that also reads the layer's input.

    Top-down, each level but the coarsest is fused with the coarser one, upsampled by nearest
    neighbour; bottom-up, each level but the finest fuses its input, its top-down result and the
    finer level, max-pooled. The coarsest level has no top-down node and the finest no bottom-up
    node: they would have a single input (Sec. 3.2).

    Args:
        names: of the levels, fine to coarse.
        channels: d, of all maps.
        norm: as for :class:`FusionNode`.
    """

    def __init__(self, names: Sequence[str], channels: int, norm: str):
        super().__init__()
        coarsest = names[-1]
        # Parameters are named top_down.p4.*, bottom_up.p4.*; both in execution order.
        self.top_down = nn.ModuleDict({p: FusionNode(2, channels, norm) for p in names[-2::-1]})
        self.bottom_up = nn.ModuleDict(
            {p: FusionNode(2 if p == coarsest else 3, channels, norm) for p in names[1:]}
        )
        self.steps = [whole_step(ratio_of(a, b)) for a, b in itertools.pairwise(names)]

    def forward(self, maps: list[torch.Tensor]) -> list[torch.Tensor]:
        """Maps (N, d, H_i, W_i) of all levels, fine to coarse -> the same shapes and order."""
        level = len(maps) - 1
        down = [maps[level]]  # top-down results, coarse to fine
        for node in self.top_down.values():
            level -= 1
            down.append(node([maps[level], resized(down[-1], maps[level])]))
        outputs = [down.pop()]
        for node in self.bottom_up.values():
            step = self.steps[level]
            level += 1
            finer = F.max_pool2d(outputs[-1], kernel_size=step, stride=step, ceil_mode=True)
            inputs = [maps[level], resized(finer, maps[level])]
            if level < len(maps) - 1:
                inputs.append(down.pop())
            outputs.append(node(inputs))
        return outputs


@BACKBONE_REGISTRY.register()
class BiFPN(FeaturePyramid):
    """Lateral connections as in :class:`FeaturePyramid`, then layers of bidirectional fusion.

    All levels take part; the top block makes its levels from the lateral connections' outputs or
    from a C_k. EfficientDet has P3 to P7 (``MODEL.FPN_EXT.LEVELS``), with 64 channels and 3 layers
    for D0, up to 384 and 8.

    Arguments, keys and map names are FeaturePyramid's. Parameters: ``fpn_lateral{k}.*`` and
    ``bifpn.{layer}.{top_down,bottom_up}.p{k}.{weights,depthwise.*,pointwise.*}``.

    Args:
        norm: after the lateral connections and in every node; the paper uses synchronised batch
            norm, ``"SyncBN"``.
        repeats: number of layers.

    Raises:
        ValueError: as FeaturePyramid; a single level; a ``fuse_type`` other than ``"sum"``;
            ``repeats`` below 1.
    """

    @configurable
    def __init__(
        self,
        *,
        norm: str = "",
        fuse_type: str = "sum",
        channels_last: bool = False,
        repeats: int = 3,
        **kwargs: Any,
    ):
        check_fuse_type(fuse_type, type(self).__name__)
        if repeats < 1:
            raise ValueError(f"MODEL.FPN_EXT.BIFPN_REPEATS must be at least 1, got {repeats}")
        super().__init__(norm=norm, channels_last=channels_last, **kwargs)
        names = self._out_features
        check_several(names, type(self).__name__)
        for name in names[: len(self.in_features)]:
            delattr(self, f"fpn_output{name[1:]}")
        del self.outputs, self.top_down
        channels = self._out_feature_channels[names[0]]
        self.bifpn = nn.ModuleList(BiFPNLayer(names, channels, norm) for _ in range(repeats))
        if channels_last:
            self.to(memory_format=torch.channels_last)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict:
        keys = super().from_config(cfg, input_shape)
        return {**keys, "repeats": own_keys(cfg).BIFPN_REPEATS}

    def levels_on_maps(self, maps: list[torch.Tensor]) -> list[torch.Tensor]:
        """As :meth:`FeaturePyramid.levels_on_maps`, only the lateral connections."""
        levels: list[torch.Tensor] = []
        for lateral in self.laterals:
            levels.insert(0, lateral(maps.pop()))
        return levels

    def with_top_block(
        self, levels: list[torch.Tensor], top_map: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """As :meth:`FeaturePyramid.with_top_block`, then the BiFPN layers."""
        levels = levels + self.levels_above(levels, top_map)
        for layer in self.bifpn:
            levels = layer(levels)
        return levels
