"""A digest of the records that a model was trained on: it changes when they do."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from detectron2.structures import BoxMode

from .dataset import DECIMALS


def data_digest(records: Iterable[Mapping[str, Any]], classes: Sequence[str] = ()) -> str:
    """SHA-256, in 64 hexadecimal digits, over images and objects.

    Of each image the name of its file relative to the folder that all have in common, so that a
    dataset may be moved, and its size; of each object its class, its box to a hundredth of a pixel,
    and whether it is a crowd region. Images count in the order of their names; their ids and pixels
    do not.

    Args:
        records: in Detectron2's format.
        classes: names by number; without them the numbers count.

    >>> cat = {"file_name": "a/1.jpg", "height": 4, "width": 6, "annotations": []}
    >>> data_digest([cat]) == data_digest([{**cat, "file_name": "b/1.jpg"}])
    True
    >>> data_digest([cat]) == data_digest([{**cat, "width": 7}])
    False
    """
    records = list(records)
    files = [os.path.abspath(str(record.get("file_name", ""))) for record in records]
    folder = os.path.commonpath([os.path.dirname(file) for file in files]) if files else ""
    lines: list[list[Any]] = []
    for file, record in zip(files, records, strict=True):
        objects = [
            [
                classes[a["category_id"]] if classes else a.get("category_id"),
                _corners(a),
                int(a.get("iscrowd", 0)),
            ]
            for a in record.get("annotations", ())
        ]
        name = os.path.relpath(file, folder).replace(os.sep, "/")
        lines.append([name, record.get("height"), record.get("width"), objects])
    content = [list(classes), sorted(lines, key=lambda line: str(line[0]))]
    return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()


def _corners(annotation: Mapping[str, Any]) -> list[float]:
    """XYXY where the box is one of pixels; any other as it is."""
    box = [float(value) for value in annotation.get("bbox", ())]
    if annotation.get("bbox_mode") == BoxMode.XYWH_ABS:
        x, y, width, height = box
        box = [x, y, x + width, y + height]
    return [round(value, DECIMALS) + 0.0 for value in box]
