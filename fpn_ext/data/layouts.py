"""Datasets registered by a name for good, in any layout that is read."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from .canonical import coco_json, complete
from .data_file import DataFile
from .dataset import common_folder
from .formats import read_dataset


def register_layout(
    name: str,
    root: str | os.PathLike,
    split: str,
    layout: str,
    classes: Sequence[str],
) -> None:
    """Register one split of a dataset for ``DATASETS.TRAIN`` and ``TEST``, scored as COCO's are.

    Its files are read when it is used, as those of ``--data`` are.

    Args:
        name: a second call with the same name is ignored.
        root: folder of the dataset.
        split: "train", "val" or "test", as the layout divides it.
        layout: a key of :data:`fpn_ext.data.formats.FORMATS`.
        classes: names in the order of their numbers.
    """
    if name in DatasetCatalog:
        return
    DatasetCatalog.register(name, lambda: load_layout(root, split, layout, classes))
    MetadataCatalog.get(name).set(thing_classes=list(classes), evaluator_type="coco")


def load_layout(
    root: str | os.PathLike, split: str, layout: str, classes: Sequence[str]
) -> list[dict[str, Any]]:
    """Detectron2 records of one split, images in the order of their names.

    Boxes are XYWH_ABS in pixels.

    Raises:
        FileNotFoundError: there is no such folder, or a file is missing.
        ValueError: as :func:`fpn_ext.data.canonical.complete`.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(
            f"no folder {root}. Datasets are looked for under $DETECTRON2_DATASETS; "
            "datasets/README.md shows the folders and where to get them."
        )
    dataset = read_dataset(DataFile(root, root, root.name, format=layout))
    dataset.splits = {split: dataset.splits[split]}
    content = coco_json(complete(dataset, classes), split)
    folder = common_folder([image.file for image in dataset.splits[split]])
    records = {
        image["id"]: {
            "file_name": str(folder / image["file_name"]),
            "image_id": image["id"],
            "height": image["height"],
            "width": image["width"],
            "annotations": [],
        }
        for image in content["images"]
    }
    for annotation in content["annotations"]:
        records[annotation["image_id"]]["annotations"].append(
            {
                "bbox": annotation["bbox"],
                "bbox_mode": BoxMode.XYWH_ABS,
                "category_id": annotation["category_id"] - 1,
                "iscrowd": annotation["iscrowd"],
            }
        )
    return list(records.values())
