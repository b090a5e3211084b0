"""Detections in COCO's annotation format."""

from collections.abc import Iterable, Sequence
from typing import Any

from detectron2.structures import Instances

from ..levels import LEVEL_FIELDS


def annotations_of(detections: Instances, category_ids: Sequence[int]) -> Iterable[dict[str, Any]]:
    """Detections in COCO's annotation format, with ``score``, without ``id`` and ``image_id``.

    ``bbox`` is XYWH in pixels of the image. ``proposal_level`` and ``pooled_level``, the levels k
    that proposed the box and that it was pooled from, are included if the model keeps them.

    Args:
        detections: of one image, from :func:`fpn_ext.inference.pictures.detections_of`, on CPU.
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
        }


def levels_of(detections: Instances) -> list[dict[str, int]]:
    """``proposal_level`` and ``pooled_level`` of each detection, if the model keeps them.

    ``MODEL.FPN_EXT.KEEP_LEVELS`` enables this. COCO tools ignore them.
    """
    columns = {f: detections.get(f).tolist() for f in LEVEL_FIELDS if detections.has(f)}
    return [{field: levels[i] for field, levels in columns.items()} for i in range(len(detections))]
