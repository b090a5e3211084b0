"""A digest of the records that a model was trained on: it changes when they do."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple


class DataSummary(NamedTuple):
    """Of the records that a model is trained on: how many images and objects, and their digest.

    Crowd regions do not count as objects; ``sha256`` is that of :func:`data_digest`.
    """

    images: int
    boxes: int
    sha256: str


def summary_of(records: Any) -> DataSummary:
    """Of a list of records in Detectron2's format; of what is no list, the number alone.

    >>> crowd = {"category_id": 0, "bbox": [0, 0, 2, 2], "iscrowd": 1}
    >>> summary_of([{"file_name": "1.jpg", "annotations": [crowd, {**crowd, "iscrowd": 0}]}])[:2]
    (1, 1)
    """
    if not isinstance(records, list):  # a torch dataset, which would have to be loaded
        return DataSummary(len(records) if hasattr(records, "__len__") else 0, 0, "")
    objects = (a for record in records for a in record.get("annotations", ()))
    boxes = sum(not a.get("iscrowd", 0) for a in objects)
    return DataSummary(len(records), boxes, data_digest(records))


def data_digest(records: Iterable[Mapping[str, Any]]) -> str:
    """SHA-256, in hexadecimal digits, over images and objects in their order.

    Of each image the name of its file without the folder, so that a dataset may be moved, and its
    size; of each object its class number, its box to a thousandth, and whether it is a crowd
    region.

    Args:
        records: in Detectron2's format.

    >>> cat = {"file_name": "a/1.jpg", "height": 4, "width": 6, "annotations": []}
    >>> data_digest([cat]) == data_digest([{**cat, "file_name": "b/1.jpg"}])
    True
    >>> data_digest([cat]) == data_digest([{**cat, "width": 7}])
    False
    """
    digest = hashlib.sha256()
    for record in records:
        objects = [
            [
                annotation.get("category_id"),
                [round(float(v), 3) for v in annotation.get("bbox", ())],
                int(annotation.get("bbox_mode", 0)),
                int(annotation.get("iscrowd", 0)),
            ]
            for annotation in record.get("annotations", ())
        ]
        name = os.path.basename(str(record.get("file_name", "")))
        content = [name, record.get("height"), record.get("width"), objects]
        digest.update(json.dumps(content).encode())
    return digest.hexdigest()
