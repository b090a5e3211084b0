"""Detections as COCO writes annotations."""

from collections.abc import Iterable, Sequence
from typing import Any

from detectron2.structures import Instances

from ..levels import LEVEL_FIELDS


def annotations_of(detections: Instances, category_ids: Sequence[int]) -> Iterable[dict[str, Any]]:
    """Detections as COCO writes annotations, with ``score``, less ``id`` and ``image_id``.

    ``bbox`` is XYWH in pixels of the image. ``proposal_level`` and ``pooled_level``, the levels k
    that proposed the box and that it was pooled from, are there if the model keeps them.

    Args:
        detections: of one image, on CPU, as :func:`fpn_ext.inference.pictures.detections_of` gives
        them. category_ids: of the class numbers.
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
        }


def levels_of(detections: Instances) -> list[dict[str, int]]:
    """``proposal_level`` and ``pooled_level`` of each detection, those that the model keeps.

    It keeps them if ``MODEL.FPN_EXT.KEEP_LEVELS`` says so. COCO's tools pass over them.
    """
    columns = {f: detections.get(f).tolist() for f in LEVEL_FIELDS if detections.has(f)}
    return [{field: levels[i] for field, levels in columns.items()} for i in range(len(detections))]
