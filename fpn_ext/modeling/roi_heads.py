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
from detectron2.modeling.proposal_generator.proposal_utils import add_ground_truth_to_proposals
from detectron2.modeling.roi_heads import (
    FastRCNNConvFCHead,
    FastRCNNOutputLayers,
    MaskRCNNConvUpsampleHead,
)
from detectron2.modeling.roi_heads.fast_rcnn import fast_rcnn_inference
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import get_event_storage
from torch import nn

from ..kernels.box_matching import match_boxes
from ..keys import declare, own_keys
from ..levels import LevelError
from .pooler import ContiguousROIPooler, LevelMappedROIPooler

declare(
    "MODEL.FPN_EXT.BOXES_PER_CHUNK",
    256,
    "Boxes pooled at once, per image, in inference: bounds the memory.",
    "ChunkedROIHeads",
)


@ROI_HEADS_REGISTRY.register()
class PyramidROIHeads(StandardROIHeads):
    """Detectron2's StandardROIHeads with :class:`LevelMappedROIPooler` in all its branches.

    Constructor, sampling, losses and inference are Detectron2's; proposals are matched to ground
    truth by :func:`~fpn_ext.kernels.box_matching.match_boxes`, with Detectron2's result. Parameters
    keep their names (``box_head.*``, ``box_predictor.*``, ``mask_head.*``, ``keypoint_head.*``).
    """

    # Lets TorchScript drop disabled branches, as Detectron2's export does for the parent.
    mask_on: torch.jit.Final[bool]  # type: ignore[misc]
    keypoint_on: torch.jit.Final[bool]  # type: ignore[misc]

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        _check_in_features(cfg.MODEL.ROI_HEADS.IN_FEATURES, input_shape)
        return super().from_config(cfg, input_shape)

    # The three hooks of StandardROIHeads.from_config, one per branch.

    @classmethod
    def _init_box_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        pooler = cls._pooler(cfg, input_shape, "ROI_BOX_HEAD")
        box_head = build_box_head(cfg, _pooled_shape(cfg, input_shape, "ROI_BOX_HEAD"))
        _pool_as_read(pooler, box_head)
        return {
            "box_in_features": cfg.MODEL.ROI_HEADS.IN_FEATURES,
            "box_pooler": pooler,
            "box_head": box_head,
            "box_predictor": cls._box_predictor(cfg, box_head.output_shape, pooler),
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
        # Detectron2's convention: with an empty POOLER_TYPE the head gets whole feature maps.
        if cfg.MODEL[branch].POOLER_TYPE:
            pooler = cls._pooler(cfg, input_shape, branch)
            head = build_head(cfg, _pooled_shape(cfg, input_shape, branch))
            _pool_as_read(pooler, head)
        else:
            pooler = None
            head = build_head(cfg, {f: input_shape[f] for f in in_features})
        return {
            f"{name}_in_features": in_features,
            f"{name}_pooler": pooler,
            f"{name}_head": head,
        }

    @torch.no_grad()
    def label_and_sample_proposals(
        self, proposals: list[Instances], targets: list[Instances]
    ) -> list[Instances]:
        """The proposals that are trained on, with the ground truth each is matched to.

        Args:
            proposals: per image, ``proposal_boxes`` and ``objectness_logits``.
            targets: per image, ``gt_boxes``, ``gt_classes`` and further ``gt_*`` of M_n objects.

        Returns:
            Per image, at most ``batch_size_per_image`` of the proposals and, if
            ``proposal_append_gt``, of the objects, with ``gt_classes`` (``num_classes`` is
            background) and, if the image has objects, all ``gt_*`` of the matched one.
        """
        if self.proposal_append_gt:
            proposals = add_ground_truth_to_proposals(targets, proposals)
        sampled = []
        for candidates, objects in zip(proposals, targets, strict=True):
            matches, labels = match_boxes(
                objects.gt_boxes, candidates.proposal_boxes, self.proposal_matcher
            )
            rows, classes = self._sample_proposals(matches, labels, objects.gt_classes)
            chosen = candidates[rows]
            chosen.gt_classes = classes
            if len(objects):
                for name, values in objects.get_fields().items():
                    if name.startswith("gt_") and not chosen.has(name):
                        chosen.set(name, values[matches[rows]])
            sampled.append(chosen)
        foreground = sum(int((s.gt_classes != self.num_classes).sum()) for s in sampled)
        storage = get_event_storage()
        # Means of an image.
        storage.put_scalar("roi_head/num_fg_samples", foreground / len(sampled))
        background = sum(map(len, sampled)) - foreground
        storage.put_scalar("roi_head/num_bg_samples", background / len(sampled))
        return sampled

    # Hooks for variants.

    @classmethod
    def _pooler(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec], branch: str) -> Any:
        try:
            return LevelMappedROIPooler(cfg, input_shape, branch=branch)
        except ValueError as error:
            raise type(error)(f"MODEL.{branch}: {error}") from None

    @classmethod
    def _box_predictor(cls, cfg: CfgNode, input_shape: ShapeSpec, pooler: Any) -> Any:
        if own_keys(cfg).KEEP_LEVELS:
            return LevelKeepingOutputLayers(cfg, input_shape, pooler=pooler)
        return FastRCNNOutputLayers(cfg, input_shape)


@ROI_HEADS_REGISTRY.register()
class ChunkedROIHeads(PyramidROIHeads):
    """:class:`PyramidROIHeads` that, in inference, pool and run the box head chunk by chunk.

    Features of 1000 boxes, 256 x 7 x 7 each, are 50 MB per image; a chunk's stay in the cache.
    Results agree to rounding: a matrix product with another row count sums in another order.

    Args:
        boxes_per_chunk: boxes pooled at once, per image.
        **kwargs: of PyramidROIHeads.

    Raises:
        ValueError: ``boxes_per_chunk`` under 1.
    """

    @configurable
    def __init__(self, *, boxes_per_chunk: int, **kwargs: Any):
        super().__init__(**kwargs)
        self.boxes_per_chunk = _checked_chunk(boxes_per_chunk)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        return {
            **super().from_config(cfg, input_shape),
            "boxes_per_chunk": own_keys(cfg).BOXES_PER_CHUNK,
        }

    @classmethod
    def from_heads(cls, heads: PyramidROIHeads, boxes_per_chunk: int) -> "ChunkedROIHeads":
        """The same heads, sharing their modules, in chunks."""
        chunked = cls.__new__(cls)
        chunked.__dict__.update(heads.__dict__)
        chunked.boxes_per_chunk = _checked_chunk(boxes_per_chunk)
        return chunked

    def _forward_box(self, features: dict[str, torch.Tensor], proposals: list[Instances]) -> Any:
        if self.training:
            return super()._forward_box(features, proposals)
        maps = [features[f] for f in self.box_in_features]
        predictions = []
        for image, candidates in enumerate(proposals):
            maps_of_image = [m[image : image + 1] for m in maps]
            for boxes in candidates.proposal_boxes.tensor.split(self.boxes_per_chunk):
                # Naming the pooled features would keep them alive beside the next chunk's.
                hidden = self.box_head(self.box_pooler(maps_of_image, [Boxes(boxes)]))
                predictions.append(self.box_predictor(hidden))
        together = tuple(torch.cat(parts) for parts in zip(*predictions, strict=True))
        return self.box_predictor.inference(together, proposals)[0]


def _checked_chunk(boxes_per_chunk: int) -> int:
    if boxes_per_chunk < 1:
        raise ValueError(
            f"MODEL.FPN_EXT.BOXES_PER_CHUNK must be at least 1 box, got {boxes_per_chunk}"
        )
    return boxes_per_chunk


class LevelKeepingOutputLayers(FastRCNNOutputLayers):
    """Detectron2's box predictor that also records the levels each detection comes from.

    In inference, detections get two fields, (R,) int64, from their proposals: ``pooled_level``, the
    level k it was pooled from, by the rule of ``pooler``; and ``proposal_level``, the level k that
    proposed it, if the proposals have that field.

    Args:
        pooler: the pooler in front of the box head; None if it does not pool a box from a single
            level, which omits ``pooled_level``.
        **kwargs: of FastRCNNOutputLayers.
    """

    @configurable
    def __init__(self, *, pooler: LevelMappedROIPooler | None, **kwargs: Any):
        super().__init__(**kwargs)
        self.pooler = pooler

    @classmethod
    def from_config(
        cls, cfg: CfgNode, input_shape: ShapeSpec, pooler: LevelMappedROIPooler | None
    ) -> dict:
        return {**super().from_config(cfg, input_shape), "pooler": pooler}

    def inference(
        self, predictions: tuple[torch.Tensor, torch.Tensor], proposals: list[Instances]
    ) -> tuple[list[Instances], list[torch.Tensor]]:
        """As the parent's: the detections, and the proposal row of each."""
        boxes = self.predict_boxes(predictions, proposals)
        scores = self.predict_probs(predictions, proposals)
        detections, rows_of_finite = fast_rcnn_inference(
            boxes,
            scores,
            [candidates.image_size for candidates in proposals],
            self.test_score_thresh,
            self.test_nms_thresh,
            self.test_topk_per_image,
        )
        rows = []
        for i, (found, candidates) in enumerate(zip(detections, proposals, strict=True)):
            # Detectron2 drops non-finite rows first, and indexes the rest.
            finite = boxes[i].isfinite().all(dim=1) & scores[i].isfinite().all(dim=1)
            proposal_rows = finite.nonzero().flatten()[rows_of_finite[i]]
            rows.append(proposal_rows)
            if self.pooler is not None:
                pooled = candidates.proposal_boxes.tensor[proposal_rows]
                found.pooled_level = self.pooler.assign(pooled)
            if candidates.has("proposal_level"):
                found.proposal_level = candidates.proposal_level[proposal_rows]
        return detections, rows


def reads_channels_last(head: nn.Module) -> bool:
    """Whether a head is known to take pooled features in channels_last memory.

    Others may call ``.view`` on what they compute, as the loss of Detectron2's keypoint heads does,
    and get (R, C, H, W) in that order in memory.
    """
    return type(head) in (FastRCNNConvFCHead, MaskRCNNConvUpsampleHead)


def _pool_as_read(pooler: nn.Module, head: nn.Module) -> None:
    if not reads_channels_last(head):
        for module in pooler.modules():  # several, where a box is pooled from all levels
            if type(module) is LevelMappedROIPooler:
                module.__class__ = ContiguousROIPooler  # the same arguments and buffers


def _check_in_features(in_features: list[str], input_shape: dict[str, ShapeSpec]) -> None:
    missing = [f for f in in_features if f not in input_shape]
    if missing or not in_features:
        raise LevelError(
            f"MODEL.ROI_HEADS.IN_FEATURES asks for {missing or 'no map at all'}; the backbone "
            f"gives {list(input_shape)}. Change MODEL.ROI_HEADS.IN_FEATURES."
        )
    channels = {f: input_shape[f].channels for f in in_features}
    if len(set(channels.values())) > 1:
        raise LevelError(
            "one head serves all levels, so the maps of MODEL.ROI_HEADS.IN_FEATURES need the same "
            f"number of channels, got {channels}"
        )


def _pooled_shape(cfg: CfgNode, input_shape: dict[str, ShapeSpec], branch: str) -> ShapeSpec:
    side = cfg.MODEL[branch].POOLER_RESOLUTION
    channels = input_shape[cfg.MODEL.ROI_HEADS.IN_FEATURES[0]].channels
    return ShapeSpec(channels=channels, height=side, width=side)
