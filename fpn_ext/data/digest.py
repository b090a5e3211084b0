"""A digest of the records that a model was trained on: it changes when they do."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any


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
