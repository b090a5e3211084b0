"""How boxes are matched and regressed: what Detectron2 asserts without a word, or reads late."""

import math
from collections.abc import Iterable, Sequence

from detectron2.config import CfgNode
from detectron2.modeling import ROI_HEADS_REGISTRY

from ..registries.architectures import reads_node
from ..registries.lookup import inherits

LABELS = (-1, 0, 1)  # of a candidate: ignored, background, object
LOSSES = ("smooth_l1", "giou", "diou", "ciou")
MATCHING = ("RPN", "ROI_HEADS", "RETINANET")
# Nodes of regression, and the node that a model reads them with.
REGRESSING = {"RPN": "RPN", "ROI_BOX_HEAD": "ROI_HEADS", "RETINANET": "RETINANET"}


def matching_problems(cfg: CfgNode) -> Iterable[str]:
    """Thresholds and labels of matching; weights and losses of regression."""
    for node in MATCHING:
        if reads_node(cfg, node):
            values = cfg.MODEL[node]
            yield from _threshold_problems(node, values.IOU_THRESHOLDS, values.IOU_LABELS)
    for node, reader in REGRESSING.items():
        if reads_node(cfg, reader):
            weights, loss = cfg.MODEL[node].BBOX_REG_WEIGHTS, cfg.MODEL[node].BBOX_REG_LOSS_TYPE
            yield from _weight_problems(f"MODEL.{node}.BBOX_REG_WEIGHTS", weights)
            if loss not in LOSSES:
                yield f"MODEL.{node}.BBOX_REG_LOSS_TYPE must be one of {LOSSES}, got {loss!r}"
    if reads_node(cfg, "ROI_HEADS") and inherits(
        ROI_HEADS_REGISTRY, cfg.MODEL.ROI_HEADS.NAME, "CascadeROIHeads"
    ):
        yield from _cascade_problems(cfg)


def _threshold_problems(
    node: str, thresholds: Sequence[float], labels: Sequence[int]
) -> Iterable[str]:
    key = f"MODEL.{node}.IOU_THRESHOLDS"
    ascending = sorted(thresholds) == list(thresholds)
    if not (thresholds and ascending and thresholds[0] > 0 and thresholds[-1] <= 1):
        yield f"{key} must ascend, above 0 and up to 1, got {list(thresholds)}"
    if len(labels) != len(thresholds) + 1 or not all(label in LABELS for label in labels):
        yield (
            f"MODEL.{node}.IOU_LABELS needs one label more than {key} {list(thresholds)} has, each "
            f"of -1 (ignored), 0 (background) and 1 (object), got {list(labels)}"
        )


def _weight_problems(key: str, weights: Sequence[float]) -> Iterable[str]:
    if len(weights) != 4 or not all(math.isfinite(w) and w > 0 for w in weights):
        yield f"{key} needs four weights above 0, of x, y, width and height, got {list(weights)}"


def _cascade_problems(cfg: CfgNode) -> Iterable[str]:
    key = "MODEL.ROI_BOX_CASCADE_HEAD"
    cascade, heads = cfg.MODEL.ROI_BOX_CASCADE_HEAD, cfg.MODEL.ROI_HEADS
    for weights in cascade.BBOX_REG_WEIGHTS:
        yield from _weight_problems(f"{key}.BBOX_REG_WEIGHTS", weights)
    if len(cascade.BBOX_REG_WEIGHTS) != len(cascade.IOUS) or not cascade.IOUS:
        yield (
            f"{key}: a stage has one of IOUS and one of BBOX_REG_WEIGHTS, got "
            f"{len(cascade.IOUS)} and {len(cascade.BBOX_REG_WEIGHTS)}"
        )
    elif list(cascade.IOUS[:1]) != list(heads.IOU_THRESHOLDS):
        yield (
            f"MODEL.ROI_HEADS.IOU_THRESHOLDS {list(heads.IOU_THRESHOLDS)} is that of the first "
            f"stage, {key}.IOUS {list(cascade.IOUS)}: the two must agree"
        )
