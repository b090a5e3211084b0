"""Detections in COCO's annotation format."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from detectron2.structures import Instances

from ..levels import LEVEL_FIELDS


def annotations_of(detections: Instances, category_ids: Sequence[int]) -> Iterable[dict[str, Any]]:
    """Detections in COCO's annotation format, with ``score``, without ``id`` and ``image_id``.

    ``bbox`` is XYWH in pixels of the image. ``proposal_level`` and ``pooled_level``, the levels k
    that proposed the box and that it was pooled from, are included if the model keeps them.

    Of a model with masks, ``segmentation`` is the mask as COCO's compressed run lengths in a
    string, and ``area`` that of the mask. Of one with keypoints, ``keypoints`` has x, y and score
    of each in one list: x and y are numbers of pixels, as in COCO's files, where the middle of the
    first pixel is 0.

    Args:
        detections: of one image, from :func:`fpn_ext.inference.predictor.detections_of`, on CPU.
        category_ids: by class index.
    """
    levels = levels_of(detections)
    for i, (x0, y0, x1, y1) in enumerate(detections.pred_boxes.tensor.tolist()):
        yield {
            "category_id": category_ids[int(detections.pred_classes[i])],
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "area": (x1 - x0) * (y1 - y0),
            "iscrowd": 0,
            "score": float(detections.scores[i]),
            **levels[i],
            **_mask(detections, i),
            **_keypoints(detections, i),
        }


def _mask(detections: Instances, i: int) -> dict[str, Any]:
    if not detections.has("pred_masks"):
        return {}
    mask = detections.pred_masks[i].numpy().astype(np.uint8)
    run_lengths = mask_util.encode(np.asfortranarray(mask))
    counts = run_lengths["counts"].decode("ascii")
    return {
        "segmentation": {"size": [int(side) for side in run_lengths["size"]], "counts": counts},
        "area": float(mask.sum()),
    }


def _keypoints(detections: Instances, i: int) -> dict[str, Any]:
    if not detections.has("pred_keypoints"):
        return {}
    points = detections.pred_keypoints[i].clone()
    points[:, :2] -= 0.5  # from coordinates, where the first pixel's middle is 0.5
    return {"keypoints": points.flatten().tolist(), "num_keypoints": len(points)}


def levels_of(detections: Instances) -> list[dict[str, int]]:
    """``proposal_level`` and ``pooled_level`` of each detection, if the model keeps them.

    ``MODEL.FPN_EXT.KEEP_LEVELS`` enables this. COCO tools ignore them.
    """
    columns = {f: detections.get(f).tolist() for f in LEVEL_FIELDS if detections.has(f)}
    return [{field: levels[i] for field, levels in columns.items()} for i in range(len(detections))]
