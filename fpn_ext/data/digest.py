"""A fingerprint of a dataset's records: the same for the same images and boxes, wherever."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from detectron2.structures import BoxMode

from .dataset import rounded


def data_digest(records: Iterable[Mapping[str, Any]], classes: Sequence[str] = ()) -> str:
    """SHA-256 of Detectron2's standard records, as 64 hexadecimal digits.

    What counts: file names relative to the folder that all have in common, sizes, and each box
    with its class and ``iscrowd``, in the order of the records sorted by file name. Ids, pixels
    and where the folder lies do not.

    Args:
        records: as ``DatasetCatalog.get`` returns them; boxes XYXY_ABS or XYWH_ABS in pixels.
        classes: their names by number; without, the numbers count.
    """
    records = list(records)
    files = [os.path.abspath(record["file_name"]) for record in records]
    folder = os.path.commonpath([os.path.dirname(file) for file in files]) if files else ""
    lines = []
    for file, record in zip(files, records, strict=True):
        objects = [
            [
                classes[a["category_id"]] if classes else a["category_id"],
                *rounded(BoxMode.convert(list(a["bbox"]), a["bbox_mode"], BoxMode.XYXY_ABS)),
                int(a.get("iscrowd", 0)),
            ]
            for a in record.get("annotations", ())
        ]
        name = os.path.relpath(file, folder).replace(os.sep, "/")
        lines.append([name, record.get("width"), record.get("height"), objects])
    content = [list(classes), sorted(lines, key=lambda line: str(line[0]))]
    return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()
