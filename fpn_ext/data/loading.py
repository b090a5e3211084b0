"""Datasets as records, and everything that would fail on them later, said before anything is built.

What Detectron2 answers with an AssertionError, a KeyError or an AttributeError, some of them in the
middle of a training, is a ValueError here.
"""

import math
import numbers
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import (
    MetadataCatalog,
    get_detection_dataset_dicts,
    print_instances_class_histogram,
)
from detectron2.structures import BoxMode

from ..registries.architectures import reads_node
from .coco_file import Faults, check_coco_file
from .dataset_contents import short, size_of
from .mask_area import mask_area

Records = list[dict[str, Any]]


def load_records(names: Sequence[str]) -> Records:
    """The records of registered datasets, one after the other.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: a dataset cannot be read, or has no images.
    """
    for name in names:
        json_file = coco_file_of(name)
        if json_file:
            check_coco_file(json_file, MetadataCatalog.get(name).get("image_root", ""))
    try:
        return get_detection_dataset_dicts(list(names), filter_empty=False, check_consistency=False)
    except (ValueError, OSError):
        raise
    except Exception as error:  # whatever a registered function raises
        which = " + ".join(map(repr, names))
        if "is empty" in str(error):
            raise ValueError(f"dataset {which} has no images") from error
        raise ValueError(
            f"dataset {which} cannot be read: {type(error).__name__}: {error}"
        ) from error


def say_classes(names: Sequence[str], records: Records) -> None:
    """Log how many objects each class has, as Detectron2 does, of checked records."""
    classes = MetadataCatalog.get(names[0]).get("thing_classes") or ()
    found = [a["category_id"] for r in records for a in r.get("annotations", ())]
    if found and "annotations" in records[0] and max(found) < len(classes):
        print_instances_class_histogram(records, classes)


def coco_file_of(dataset_name: str) -> str:
    """The COCO JSON of a registered dataset, if it has one and it is there; else ""."""
    json_file = MetadataCatalog.get(dataset_name).get("json_file")
    return str(json_file) if json_file and os.path.isfile(json_file) else ""


def check_records(names: Sequence[str], records: Records, evaluated: bool = False) -> None:
    """Check records as any model reads them.

    Args:
        evaluated: they are evaluated on, and need an ``image_id`` and a size.

    Raises:
        ValueError: lists every kind of fault.
    """
    faults = Faults()
    image_ids = set()
    for number, record in enumerate(records):
        where = f"record {number}, {short(record.get('file_name'))}"
        if not isinstance(record.get("file_name"), str | os.PathLike):
            faults.add("each record needs a 'file_name'", where)
        if evaluated:
            key = record.get("image_id")
            if not isinstance(key, int | str) or key in image_ids:
                faults.add(
                    "each record needs an 'image_id' of its own, a whole number or text",
                    f"{where}: {short(key)}",
                )
            else:
                image_ids.add(key)
            if size_of(record.get("width"), record.get("height")) is None:
                faults.add(
                    "the evaluation needs 'width' and 'height' in whole pixels in each record",
                    f"{where}: {short(record.get('width'))} x {short(record.get('height'))}",
                )
        for place, annotation in enumerate(record.get("annotations", ())):
            _check_annotation(annotation, f"{where}, object {place}", faults)
    faults.check(f"dataset {' + '.join(map(repr, names))}")


def _check_annotation(annotation: dict[str, Any], where: str, faults: Faults) -> None:
    mode = annotation.get("bbox_mode")
    if mode not in (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS, BoxMode.XYWHA_ABS):
        faults.add(
            "'bbox_mode' must be BoxMode.XYXY_ABS or BoxMode.XYWH_ABS", f"{where}: {short(mode)}"
        )
    box = annotation.get("bbox")
    if (
        not isinstance(box, list | tuple | np.ndarray)
        or len(box) != (5 if mode == BoxMode.XYWHA_ABS else 4)
        or not all(isinstance(value, numbers.Real) and math.isfinite(value) for value in box)
    ):
        faults.add("'bbox' must be four finite numbers", f"{where}: {short(box)}")
    category = annotation.get("category_id")
    if not isinstance(category, int | np.integer) or isinstance(category, bool) or category < 0:
        faults.add("'category_id' must be a class's number, from 0", f"{where}: {short(category)}")


def check_training_targets(cfg: CfgNode, names: Sequence[str], records: Records) -> None:
    """Check the masks, keypoints and labels of pixels of records, for a model that learns them.

    Raises:
        ValueError: lists every kind of fault.
    """
    model = cfg.MODEL
    faults = Faults()
    points = 3 * model.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
    learns_pixels = reads_node(cfg, "SEM_SEG_HEAD")
    for record in records:
        if learns_pixels and not record.get("sem_seg_file_name"):
            faults.add(
                f"MODEL.META_ARCHITECTURE {model.META_ARCHITECTURE} needs 'sem_seg_file_name', an "
                "image of the class of each pixel, in every record; annotations in COCO's, VOC's "
                "and YOLO's formats have none",
                record["file_name"],
            )
        objects = [a for a in record.get("annotations", ()) if not a.get("iscrowd", 0)]
        for annotation in objects:
            where = f"{record['file_name']}, box {short(annotation.get('bbox'))}"
            if model.MASK_ON:
                _check_mask(cfg, annotation.get("segmentation"), record, where, faults)
            if model.KEYPOINT_ON:
                written = annotation.get("keypoints")
                count = len(written) if isinstance(written, list | tuple | np.ndarray) else None
                if count != points:
                    faults.add(
                        f"MODEL.KEYPOINT_ON needs 'keypoints' of {points} numbers "
                        "(MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS x (x, y, visibility)) for every "
                        "object; write zeros for one without",
                        f"{where}: {'none' if count is None else count}",
                    )
    if model.KEYPOINT_ON:
        _check_keypoint_names(cfg, names, faults)
    faults.check(f"dataset {' + '.join(map(repr, names))}")


def _check_mask(
    cfg: CfgNode, segmentation: Any, record: dict[str, Any], where: str, faults: Faults
) -> None:
    if isinstance(segmentation, dict):
        if cfg.INPUT.MASK_FORMAT == "polygon":
            faults.add("run-length masks need INPUT.MASK_FORMAT bitmask; it is polygon", where)
            return
        size = size_of(record.get("width"), record.get("height"))
        try:
            if size is not None:
                mask_area(segmentation, size[1], size[0])
        except ValueError as error:
            faults.add("a run-length mask must be one of its picture", f"{where}: {error}")
    elif isinstance(segmentation, np.ndarray) and cfg.INPUT.MASK_FORMAT == "polygon":
        faults.add("masks as arrays need INPUT.MASK_FORMAT bitmask; it is polygon", where)
    elif segmentation is None or len(segmentation) == 0:
        faults.add(
            "MODEL.MASK_ON needs a 'segmentation' for every object; write it, or set MODEL.MASK_ON "
            "False",
            where,
        )


def _check_keypoint_names(cfg: CfgNode, names: Sequence[str], faults: Faults) -> None:
    count = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
    for name in names:
        metadata = MetadataCatalog.get(name)
        keypoints = metadata.get("keypoint_names")
        if not keypoints or len(keypoints) != count:
            faults.add(
                f"MODEL.KEYPOINT_ON needs the names of the {count} keypoints "
                "(MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS): "
                f"MetadataCatalog.get({name!r}).keypoint_names",
                f"{len(keypoints)} names" if keypoints else "no names",
            )
        flips = metadata.get("keypoint_flip_map")
        if flips is None:
            faults.add(
                "MODEL.KEYPOINT_ON needs the pairs of left and right: "
                f"MetadataCatalog.get({name!r}).keypoint_flip_map, () if there are none",
                "no flip map",
            )
        unknown = {point for pair in flips or () for point in pair} - set(keypoints or ())
        if unknown and keypoints:
            faults.add(
                f"MetadataCatalog.get({name!r}).keypoint_flip_map may name keypoint_names only",
                f"flip map: {', '.join(sorted(unknown))}",
            )
