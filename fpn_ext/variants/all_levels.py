"""RoI heads that pool every box from all levels instead of one."""

from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.structures import Boxes
from torch import nn

from ..keys import declare, own_keys
from ..modeling.pooler import LevelMappedROIPooler
from ..modeling.roi_heads import PyramidROIHeads

declare(
    "MODEL.FPN_EXT.LEVEL_FUSION",
    "max",
    'How a box\'s features of all levels are merged: "max" or "sum".',
    "AllLevelsROIHeads",
)

FUSIONS = ("max", "sum")


class AllLevelsROIPooler(nn.Module):
    """Pools every box from every level, and fuses the features by maximum or sum.

    PANet's adaptive feature pooling (Liu et al. 2018, Sec. 3.2), fused right after pooling; in the
    paper the box head's first layer runs on each level before fusion. The sum is GRoIE's baseline
    (Rossi et al. 2020).

    Args:
        poolers: one single-level pooler per level, fine to coarse.
        fusion: ``"max"`` or ``"sum"``.

    Raises:
        ValueError: no pooler, or an unknown ``fusion``.
    """

    def __init__(self, poolers: list[LevelMappedROIPooler], fusion: str = "max"):
        super().__init__()
        if not poolers:
            raise ValueError("MODEL.ROI_HEADS.IN_FEATURES names no map to pool from")
        if fusion not in FUSIONS:
            raise ValueError(f"MODEL.FPN_EXT.LEVEL_FUSION must be one of {FUSIONS}, got {fusion!r}")
        self.poolers = nn.ModuleList(poolers)
        self.takes_maximum = fusion == "max"
        self.output_size = poolers[0].output_size

    @property
    @torch.jit.unused
    def num_degenerate(self) -> torch.Tensor:
        """Number of degenerate boxes, as counted by LevelMappedROIPooler."""
        first: Any = self.poolers[0]
        return first.num_degenerate

    def forward(self, x: list[torch.Tensor], box_lists: list[Boxes]) -> torch.Tensor:
        """As LevelMappedROIPooler's: maps and boxes -> (R, C, output height, output width)."""
        if len(x) != len(self.poolers):
            raise ValueError(
                f"the pooler is configured for {len(self.poolers)} levels, got {len(x)} maps"
            )
        fused = x[0]
        for i, pooler in enumerate(self.poolers):
            pooled = pooler([x[i]], box_lists)
            if i == 0:
                fused = pooled
            elif self.takes_maximum:
                fused = torch.maximum(fused, pooled)
            else:
                fused = fused + pooled
        return fused


@ROI_HEADS_REGISTRY.register()
class AllLevelsROIHeads(PyramidROIHeads):
    """:class:`PyramidROIHeads` with :class:`AllLevelsROIPooler` in all branches.

    Detections have no field ``pooled_level``: they are pooled from all levels.
    """

    @classmethod
    def _pooler(
        cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec], branch: str
    ) -> AllLevelsROIPooler:
        of_all = LevelMappedROIPooler.from_config(cfg, input_shape, branch)
        scales = of_all.pop("scales")
        poolers = [LevelMappedROIPooler(scales=[scale], **of_all) for scale in scales]
        return AllLevelsROIPooler(poolers, own_keys(cfg).LEVEL_FUSION)

    @classmethod
    def _box_predictor(cls, cfg: CfgNode, input_shape: ShapeSpec, pooler: nn.Module) -> Any:
        return super()._box_predictor(cfg, input_shape, None)
