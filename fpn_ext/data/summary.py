"""How much data a model was trained on, and which."""

import os
from typing import Any, NamedTuple

from .digest import data_digest


class DataSummary(NamedTuple):
    """Of the records that a model is trained on: how many images and objects, and their digest.

    Crowd regions do not count as objects; ``sha256`` is that of :func:`data_digest`; ``bytes`` are
    those of the image files together, whose pixels are in no digest.
    """

    images: int
    boxes: int
    sha256: str
    bytes: int = 0


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
    size = sum(_bytes(record.get("file_name", "")) for record in records)
    return DataSummary(len(records), boxes, data_digest(records), size)


def _bytes(file: Any) -> int:
    try:
        return os.stat(file).st_size
    except (OSError, TypeError, ValueError):  # not a file of this machine's
        return 0
