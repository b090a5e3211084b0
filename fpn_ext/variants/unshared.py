"""Unshared heads: one set of parameters per pyramid level.

The paper shares its heads across all levels and reports similar accuracy without sharing (Sec.
4.1), but gives no numbers. These components serve to measure it.
"""

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import (
    ROI_HEADS_REGISTRY,
    RPN_HEAD_REGISTRY,
    build_anchor_generator,
)
from detectron2.modeling.proposal_generator.rpn import StandardRPNHead
from detectron2.structures import Boxes, Instances
from torch import nn

from ..modeling.roi_heads import PyramidROIHeads


@RPN_HEAD_REGISTRY.register()
class UnsharedRPNHead(nn.Module):
    """A separate RPN head per level; levels may have different numbers of anchors.

    Args:
        heads: one head per level, fine to coarse, each called with a list of that level's map, like
            :class:`StandardRPNHead`.

    Raises:
        ValueError: no heads.
    """

    @configurable
    def __init__(self, *, heads: list[nn.Module]):
        super().__init__()
        if not heads:
            raise ValueError("MODEL.RPN.IN_FEATURES names no map: an RPN needs at least one")
        self.heads = nn.ModuleList(heads)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: list[ShapeSpec]) -> dict:
        generator = build_anchor_generator(cfg, input_shape)
        return {
            "heads": [
                StandardRPNHead(
                    in_channels=shape.channels,
                    num_anchors=num_anchors,
                    box_dim=generator.box_dim,
                    conv_dims=cfg.MODEL.RPN.CONV_DIMS,
                )
                for shape, num_anchors in zip(input_shape, generator.num_anchors, strict=True)
            ]
        }

    def forward(
        self, features: list[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """L maps (N, d, H_i, W_i) -> L (N, A_i, H_i, W_i) logits, L (N, 4 A_i, H_i, W_i) deltas."""
        logits: list[torch.Tensor] = []
        deltas: list[torch.Tensor] = []
        for head, level_map in zip(self.heads, features, strict=True):
            level_logits, level_deltas = head([level_map])
            logits += level_logits
            deltas += level_deltas
        return logits, deltas


@ROI_HEADS_REGISTRY.register()
class UnsharedROIHeads(PyramidROIHeads):
    """:class:`PyramidROIHeads` with a separate box head and box predictor per level.

    A box uses those of the level it is pooled from. Parameters: ``box_head.{i}.*`` and
    ``box_predictor.{i}.*``, i from the finest level to the coarsest.
    """

    @classmethod
    def _init_box_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        if cfg.MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES:
            raise ValueError(
                "MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES must be False: UnsharedROIHeads do not "
                "train on predicted boxes"
            )
        per_level = []
        for _ in cfg.MODEL.ROI_HEADS.IN_FEATURES:
            per_level.append(super()._init_box_head(cfg, input_shape))
        return {
            **per_level[0],
            "box_head": nn.ModuleList(level["box_head"] for level in per_level),
            "box_predictor": nn.ModuleList(level["box_predictor"] for level in per_level),
        }

    def _forward_box(self, features: dict[str, torch.Tensor], proposals: list[Instances]) -> Any:
        boxes = [p.proposal_boxes for p in proposals]
        pooled = self.box_pooler([features[f] for f in self.box_in_features], boxes)
        map_index = self.box_pooler.rule(Boxes.cat(boxes).tensor)
        rows, scores, deltas = [], [], []
        heads = zip(self.box_head, self.box_predictor, strict=True)
        for level, (head, predictor) in enumerate(heads):
            of_level = (map_index == level).nonzero().flatten()
            # Levels without boxes run, too: distributed training needs every gradient.
            level_scores, level_deltas = predictor(head(pooled[of_level]))
            rows.append(of_level)
            scores.append(level_scores)
            deltas.append(level_deltas)
        back = torch.cat(rows).argsort()
        predictions = torch.cat(scores)[back], torch.cat(deltas)[back]
        # Losses and inference use no parameters: any level's predictor will do.
        if self.training:
            return self.box_predictor[0].losses(predictions, proposals)
        return self.box_predictor[0].inference(predictions, proposals)[0]
