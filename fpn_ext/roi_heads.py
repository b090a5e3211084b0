"""RoI heads that pool box, mask and keypoint features by the paper's level rule."""

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import (
    ROI_HEADS_REGISTRY,
    StandardROIHeads,
    build_box_head,
    build_keypoint_head,
    build_mask_head,
)
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.structures import Instances

from .pooler import LevelMappedROIPooler, assign_levels


@ROI_HEADS_REGISTRY.register()
class PyramidROIHeads(StandardROIHeads):
    """Detectron2's StandardROIHeads with :class:`LevelMappedROIPooler` in all its branches.

    Sampling, losses and inference are Detectron2's. Parameters keep their names
    (``box_head.*``, ``box_predictor.*``, ``mask_head.*``, ``keypoint_head.*``).

    Args:
        keep_pooled_level: give every detection a field ``pooled_level``, (R,) int64: the level k
            its box features were pooled from, i.e. that of the proposal it came from.
        **kwargs: of StandardROIHeads: ``box_in_features``, ``box_pooler``, ``box_head``,
            ``box_predictor``, the same for ``mask_`` and ``keypoint_``, and the sampling.
    """

    @configurable
    def __init__(self, *, keep_pooled_level: bool = False, **kwargs: Any):
        super().__init__(**kwargs)
        self.keep_pooled_level = keep_pooled_level

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        _check_in_features(cfg.MODEL.ROI_HEADS.IN_FEATURES, input_shape)
        ret = super().from_config(cfg, input_shape)
        ret["keep_pooled_level"] = cfg.MODEL.FPN_EXT.KEEP_POOLED_LEVEL
        return ret

    # The three hooks of StandardROIHeads.from_config, one per branch.

    @classmethod
    def _init_box_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        box_head = build_box_head(cfg, _pooled_shape(cfg, input_shape, "ROI_BOX_HEAD"))
        return {
            "box_in_features": cfg.MODEL.ROI_HEADS.IN_FEATURES,
            "box_pooler": LevelMappedROIPooler(cfg, input_shape, branch="ROI_BOX_HEAD"),
            "box_head": box_head,
            "box_predictor": FastRCNNOutputLayers(cfg, box_head.output_shape),
        }

    @classmethod
    def _init_mask_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        if not cfg.MODEL.MASK_ON:
            return {}
        return cls._init_branch(cfg, input_shape, "mask", build_mask_head)

    @classmethod
    def _init_keypoint_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        if not cfg.MODEL.KEYPOINT_ON:
            return {}
        return cls._init_branch(cfg, input_shape, "keypoint", build_keypoint_head)

    @classmethod
    def _init_branch(
        cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec], name: str, build_head: Any
    ) -> dict:
        branch = f"ROI_{name.upper()}_HEAD"
        in_features = cfg.MODEL.ROI_HEADS.IN_FEATURES
        # Detectron2's convention: an empty POOLER_TYPE hands the head whole maps, unpooled.
        if cfg.MODEL[branch].POOLER_TYPE:
            pooler = LevelMappedROIPooler(cfg, input_shape, branch=branch)
            head = build_head(cfg, _pooled_shape(cfg, input_shape, branch))
        else:
            pooler = None
            head = build_head(cfg, {f: input_shape[f] for f in in_features})
        return {
            f"{name}_in_features": in_features,
            f"{name}_pooler": pooler,
            f"{name}_head": head,
        }

    def _forward_box(
        self, features: dict[str, torch.Tensor], proposals: list[Instances]
    ) -> dict[str, torch.Tensor] | list[Instances]:
        if self.training or not self.keep_pooled_level:
            return super()._forward_box(features, proposals)
        # The parent's inference, which drops the row of the proposal behind each detection.
        boxes = [p.proposal_boxes for p in proposals]
        pooled = self.box_pooler([features[f] for f in self.box_in_features], boxes)
        predictions = self.box_predictor(self.box_head(pooled))
        detections, rows = self.box_predictor.inference(predictions, proposals)
        pooler = self.box_pooler
        for found, proposal_rows, candidates in zip(detections, rows, boxes, strict=True):
            found.pooled_level = assign_levels(
                candidates.tensor[proposal_rows],
                pooler.min_level,
                pooler.max_level,
                pooler.canonical_box_size,
                pooler.canonical_level,
            )
        return detections


def _check_in_features(in_features: list[str], input_shape: dict[str, ShapeSpec]) -> None:
    missing = [f for f in in_features if f not in input_shape]
    if missing or not in_features:
        raise ValueError(
            f"MODEL.ROI_HEADS.IN_FEATURES asks for {missing or 'no map at all'}; the backbone "
            f"gives {list(input_shape)}. Change MODEL.ROI_HEADS.IN_FEATURES."
        )
    channels = {f: input_shape[f].channels for f in in_features}
    if len(set(channels.values())) > 1:
        raise ValueError(
            "one head serves all levels, so the maps of MODEL.ROI_HEADS.IN_FEATURES need the same "
            f"number of channels, got {channels}"
        )


def _pooled_shape(cfg: CfgNode, input_shape: dict[str, ShapeSpec], branch: str) -> ShapeSpec:
    side = cfg.MODEL[branch].POOLER_RESOLUTION
    channels = input_shape[cfg.MODEL.ROI_HEADS.IN_FEATURES[0]].channels
    return ShapeSpec(channels=channels, height=side, width=side)
