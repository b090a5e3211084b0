"""AP by pyramid level: of the objects that the RoI heads pool from it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode

from ..config.level_table import level_rule
from ..data.training_boxes import resized_size
from ..evaluation.coco import CocoScores
from ..levels import stride_named
from .analysis_case import Evaluated
from .analysis_counts import scores_by_area

BEYOND = 1e15  # pixels, more than any object has


@dataclass(frozen=True)
class LevelScores:
    """The objects of one level.

    Attributes:
        level: name of the feature map.
        objects: their number, without crowd regions.
        detections: on this level.
        ap, ap50, ar: from 0 to 1, NaN without objects.
    """

    level: str
    objects: int
    detections: int
    ap: float
    ap50: float
    ar: float


def scores_by_level(case: Evaluated, cfg: CfgNode) -> list[LevelScores] | None:
    """AP by the level of an object's box, fine to coarse; None if the heads have no level rule.

    The level is that of ``MODEL.FPN_EXT.LEVEL_RULE`` (Eq. 1 of the paper, with Detectron2's heads
    as well) for the box as resized for testing. As with COCO's sizes, the objects of other levels
    are neither found nor missed, and a detection without an object counts on its own level: its
    ``pooled_level``, if the model kept it, else that of its box.
    """
    rule = level_rule(cfg)
    if rule is None:
        return None
    names = list(cfg.MODEL.ROI_HEADS.IN_FEATURES)
    objects, detections = case.dataset["annotations"], case.detections
    sizes = {
        image["id"]: (int(image["height"]), int(image["width"])) for image in case.dataset["images"]
    }
    of_objects = _levels(objects, sizes, rule, cfg)
    of_detections = _levels(detections, sizes, rule, cfg)
    numbers = {stride_named(name): i for i, name in enumerate(names)}
    for i, detection in enumerate(detections):
        kept = numbers.get(2 ** detection.get("pooled_level", -1))
        of_detections[i] = of_detections[i] if kept is None else kept
    scores_of = _scores_of_keypoints if case.task == "keypoints" else _scores_of_shapes
    scores = scores_of(case, of_objects, of_detections, names)
    is_object = np.array([case.is_object(o) for o in objects], dtype=bool)
    return [
        LevelScores(
            level=name,
            objects=int(np.count_nonzero(is_object & (of_objects == i))),
            detections=int(np.count_nonzero(of_detections == i)),
            ap=scores[i].ap(size=name),
            ap50=scores[i].ap(0.5, size=name),
            ar=scores[i].ar(size=name),
        )
        for i, name in enumerate(names)
    ]


def _scores_of_shapes(
    case: Evaluated, of_objects: np.ndarray, of_detections: np.ndarray, names: Sequence[str]
) -> list[CocoScores]:
    """Of boxes or masks, by level; ``sizes`` are the names of the levels."""
    # Levels, counted from 1, in place of areas: ranges of areas are what COCO's evaluation has.
    leveled = Evaluated(
        {**case.dataset, "annotations": _with_area(case.dataset["annotations"], of_objects + 1)},
        _with_area(case.detections, of_detections + 1),
        case.task,
    )
    scores = scores_by_area(leveled, {name: (i, i) for i, name in enumerate(names, start=1)})
    return [scores] * len(names)


def _scores_of_keypoints(
    case: Evaluated, of_objects: np.ndarray, of_detections: np.ndarray, names: Sequence[str]
) -> list[CocoScores]:
    """Of keypoints, by level; ``sizes`` are the names of the levels."""
    # OKS needs an object's true area; but objects without keypoints are neither found nor missed.
    scores = []
    for i, name in enumerate(names):
        objects = [
            o if level == i else {**o, "num_keypoints": 0}
            for o, level in zip(case.dataset["annotations"], of_objects, strict=True)
        ]
        of_level = Evaluated(
            {**case.dataset, "annotations": objects},
            _with_area(case.detections, np.where(of_detections == i, 0.0, 2 * BEYOND)),
            case.task,
            case.sigmas,
        )
        scores.append(scores_by_area(of_level, {name: (0.0, BEYOND)}))
    return scores


def _levels(
    items: Sequence[dict[str, Any]], sizes: dict[int, tuple[int, int]], rule: Any, cfg: CfgNode
) -> np.ndarray:
    """(N,) int64 indices of maps, of XYWH boxes in pixels of their images."""
    if not items:
        return np.zeros(0, dtype=np.int64)
    boxes = np.array([item["bbox"] for item in items], dtype=np.float64)
    boxes[:, 2:] += boxes[:, :2]
    least, most = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
    resized = {i: resized_size(*size, least, most) for i, size in sizes.items()}
    scales = {i: (w / sizes[i][1], h / sizes[i][0]) for i, (h, w) in resized.items()}
    boxes *= np.array([2 * scales[item["image_id"]] for item in items])
    return rule(torch.from_numpy(boxes).float()).numpy().copy()  # float32, as the pooler's


def _with_area(items: Sequence[dict[str, Any]], areas: np.ndarray) -> list[dict[str, Any]]:
    return [{**item, "area": area} for item, area in zip(items, areas.tolist(), strict=True)]
