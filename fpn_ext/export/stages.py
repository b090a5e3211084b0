"""The stages of a two-stage detector after the backbone, for exporters."""

from typing import Any

import torch
import torch.nn.functional as F
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import (
    BaseKeypointRCNNHead,
    BaseMaskRCNNHead,
    FastRCNNOutputLayers,
)
from torch import nn

from ..modeling.rpn import PyramidRPN
from .pooling import LevelMappedRoIAlign
from .rows import ABSENT, above, absent, by_anchor, clipped, decoded, larger_than, rows_of, top
from .suppression import Suppression, as_batched_nms_moves_them


class Proposals(nn.Module):
    """An RPN's proposals: ``boxes`` (N, P, 4), ``logits`` (N, P), and (N, P) whether they exist.

    P is ``MODEL.RPN.POST_NMS_TOPK_TEST``; the best come first.
    """

    def __init__(self, rpn: Any, suppression: Suppression):
        super().__init__()
        # Another way from scores to proposals, as PerLevelRPN's, is not what is written here.
        known = getattr(type(rpn), "predict_proposals", None) in (
            RPN.predict_proposals,
            PyramidRPN.predict_proposals,
        )
        if not known or rpn.anchor_generator.box_dim != 4:
            raise ValueError(
                f"cannot export the proposals of {type(rpn).__name__}: choose "
                "MODEL.PROPOSAL_GENERATOR.NAME PyramidRPN or RPN"
            )
        self.suppression = suppression
        self.in_features = list(rpn.in_features)
        self.head = rpn.rpn_head
        self.anchor_generator = rpn.anchor_generator
        self.transform = rpn.box2box_transform
        self.candidates = checked_limit(rpn.pre_nms_topk[False], "MODEL.RPN.PRE_NMS_TOPK_TEST")
        self.limit = checked_limit(rpn.post_nms_topk[False], "MODEL.RPN.POST_NMS_TOPK_TEST")
        self.nms_threshold = checked_nms_threshold(rpn.nms_thresh, "MODEL.RPN.NMS_THRESH")
        self.smallest = rpn.min_box_size

    def forward(
        self, maps: dict[str, torch.Tensor], size: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        levels = [maps[f] for f in self.in_features]
        logits, deltas = self.head(levels)
        anchors = self.anchor_generator(levels)
        lowest = -torch.inf  # of what no anchor has
        boxes, scores = [], []
        for level_logits, level_deltas, level_anchors in zip(logits, deltas, anchors, strict=True):
            objectness = by_anchor(level_logits, 1).flatten(1)
            best, index = top(objectness, self.candidates, lowest)
            boxes.append(
                decoded(self.transform, level_anchors.tensor, by_anchor(level_deltas, 4), index)
            )
            scores.append(best)
        all_boxes, all_scores = torch.cat(boxes, dim=1), torch.cat(scores, dim=1)  # (N, L k, ...)
        present = all_boxes.isfinite().all(dim=2) & all_scores.isfinite()
        all_boxes = clipped(all_boxes, size)
        present = present & larger_than(all_boxes, self.smallest)
        level = torch.arange(len(levels)).repeat_interleave(self.candidates)
        apart = as_batched_nms_moves_them(all_boxes, level, present)
        # Within its level a box's rank is its score: logits may be negative.
        rank = torch.arange(self.candidates, 0, -1, dtype=torch.float32).repeat(len(levels))
        rank = torch.where(present, rank.expand_as(all_scores), absent(all_scores))
        kept = self.suppression(
            apart.reshape(-1, self.candidates, 4),
            rank.reshape(-1, 1, self.candidates),
            self.nms_threshold,
        )
        kept_scores = torch.where(
            kept.reshape(all_scores.shape), all_scores, torch.full_like(all_scores, lowest)
        )
        best, index = top(kept_scores, self.limit, lowest)
        return rows_of(all_boxes, index), best, best > lowest


class Detections(nn.Module):
    """From a box head's predictions to detections: Detectron2's ``fast_rcnn_inference``."""

    def __init__(self, predictor: FastRCNNOutputLayers, num_classes: int, nms: Suppression):
        super().__init__()
        self.suppression = nms
        self.transform = predictor.box2box_transform
        self.num_classes = num_classes
        self.boxes_per_row = predictor.bbox_pred.out_features // 4  # 1 if classes share them
        self.threshold = checked_score_threshold(predictor.test_score_thresh, "MODEL.ROI_HEADS.")
        self.nms_threshold = checked_nms_threshold(
            predictor.test_nms_thresh, "MODEL.ROI_HEADS.NMS_THRESH_TEST"
        )
        self.limit = checked_limit(predictor.test_topk_per_image, "TEST.DETECTIONS_PER_IMAGE")

    def forward(
        self,
        logits: torch.Tensor,
        deltas: torch.Tensor,
        proposals: torch.Tensor,
        image: torch.Tensor,
        rows: torch.Tensor,
        size: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Detections of all images.

        Args:
            logits: (R, C + 1).
            deltas: (R, 4 C), or (R, 4) if all classes share them.
            proposals: (N, P, 4).
            image: (R,) and
            rows: (R,), of which proposals the predictions are.
            size: height and width of the images.

        Returns:
            Boxes (D, 4), scores (D,), classes (D,), images (D,).
        """
        n, p = proposals.shape[:2]
        probabilities = F.softmax(logits, dim=1)
        boxes = self.transform.apply_deltas(deltas, proposals[image, rows])
        is_finite = boxes.isfinite().all(dim=1) & probabilities.isfinite().all(dim=1)
        scores = above(probabilities[:, :-1], self.threshold)
        scores = torch.where(is_finite[:, None], scores, torch.full_like(scores, ABSENT))
        # Back to a row for each proposal, and to a list for each class.
        c = self.num_classes
        boxes = boxes.reshape(boxes.shape[0], self.boxes_per_row, 4).expand(-1, c, 4)
        all_boxes = proposals.new_zeros((n, p, c, 4)).index_put((image, rows), boxes)
        all_scores = proposals.new_full((n, p, c), ABSENT).index_put((image, rows), scores)
        all_boxes = clipped(all_boxes, size).reshape(n, p * c, 4)
        all_scores = all_scores.reshape(n, p * c)
        classes = torch.arange(c).expand(p, c).flatten()
        apart = as_batched_nms_moves_them(all_boxes, classes, all_scores > ABSENT)
        kept = self.suppression(
            apart.reshape(n, p, c, 4).transpose(1, 2).reshape(n * c, p, 4),
            all_scores.reshape(n, p, c).transpose(1, 2).reshape(n * c, 1, p),
            self.nms_threshold,
        )
        kept = kept.reshape(n, c, p).transpose(1, 2).reshape(n, p * c)
        kept_scores = torch.where(kept, all_scores, absent(all_scores))
        best, index = top(kept_scores, self.limit, ABSENT)
        found = rows_of(all_boxes, index)
        image, rows = torch.nonzero((best > ABSENT) & larger_than(found, 0), as_tuple=True)
        return found[image, rows], best[image, rows], (index % c)[image, rows], image


class Branch(nn.Module):
    """Pooled features of the detections, and a head on them."""

    def __init__(self, heads: Any, name: str):
        super().__init__()
        pooler = getattr(heads, f"{name}_pooler")
        if pooler is None:
            raise ValueError(
                f"cannot export a {name} head on whole maps: MODEL.ROI_{name.upper()}_HEAD."
                "POOLER_TYPE is empty"
            )
        self.in_features = list(getattr(heads, f"{name}_in_features"))
        self.pooler = LevelMappedRoIAlign(pooler)
        self.head = getattr(heads, f"{name}_head")

    def logits(self, maps: dict[str, torch.Tensor], rois: torch.Tensor) -> torch.Tensor:
        return self.head.layers(self.pooler([maps[f] for f in self.in_features], rois))


class MaskBranch(Branch):
    """(D, S, S) probabilities of the mask of each detection's class."""

    def __init__(self, heads: Any):
        super().__init__(heads, "mask")
        _check_layers(self.head, BaseMaskRCNNHead, "MODEL.ROI_MASK_HEAD.NAME")

    def forward(
        self, maps: dict[str, torch.Tensor], rois: torch.Tensor, classes: torch.Tensor
    ) -> torch.Tensor:
        logits = self.logits(maps, rois)
        if logits.shape[1] == 1:  # one mask for all classes
            return logits[:, 0].sigmoid()
        return logits[torch.arange(classes.shape[0]), classes].sigmoid()


class KeypointBranch(Branch):
    """(D, K, S, S) logits of each detection's keypoints."""

    def __init__(self, heads: Any):
        super().__init__(heads, "keypoint")
        _check_layers(self.head, BaseKeypointRCNNHead, "MODEL.ROI_KEYPOINT_HEAD.NAME")

    def forward(
        self, maps: dict[str, torch.Tensor], rois: torch.Tensor, classes: torch.Tensor
    ) -> torch.Tensor:
        return self.logits(maps, rois)


def _check_layers(head: nn.Module, base: type, key: str) -> None:
    if not (isinstance(head, base) and hasattr(head, "layers")):
        raise ValueError(f"cannot export {type(head).__name__} ({key}): it has no layers(features)")


def checked_score_threshold(threshold: float, node: str) -> float:
    if not threshold >= 0:
        raise ValueError(f"{node}SCORE_THRESH_TEST must be 0 or more to export, got {threshold}")
    return threshold


def checked_nms_threshold(threshold: float, key: str) -> float:
    if not 0 <= threshold <= 1:
        raise ValueError(
            f"{key} must be from 0 to 1 to export, got {threshold}: runtimes take no other. 1 "
            "suppresses nothing"
        )
    return threshold


def checked_limit(limit: int, key: str) -> int:
    if limit < 1:
        raise ValueError(
            f"{key} must be at least 1 to export, got {limit}: a graph keeps room for so many"
        )
    return limit
