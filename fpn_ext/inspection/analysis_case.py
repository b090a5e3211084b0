"""Ground truth and detections of one task, as ``fpn-ext analyze`` counts them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pycocotools.mask as mask_util

from ..data.dataset_contents import printable
from ..data.mask_area import mask_area
from ..evaluation.coco import has_hotcoco
from ..evaluation.columns import counted_differently

# Task -> field of an annotation and of a detection.
FIELDS = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}
COCO_KEYPOINTS = 17  # whose sigmas are known


@dataclass(frozen=True)
class Evaluated:
    """A dataset and its detections, in COCO's formats, numbered so that every library agrees.

    Attributes:
        dataset: ``images``, ``categories`` and ``annotations``, the ids of images and annotations
            counted from 1.
        detections: in COCO's annotation format, with ``id`` counted from 1 and ``score``; with
            ``pooled_level`` if the model kept it.
        task: ``"bbox"``, ``"segm"`` or ``"keypoints"``.
        sigmas: of the keypoints; COCO's if empty.
    """

    dataset: dict[str, Any]
    detections: list[dict[str, Any]]
    task: str = "bbox"
    sigmas: Sequence[float] = ()

    @property
    def class_names(self) -> list[str]:
        """In the order of the category ids, which is that of the classes in all results.

        Of equal names, each has its id added.
        """
        categories = sorted(self.dataset["categories"], key=lambda c: c["id"])
        names = [str(category.get("name", category["id"])) for category in categories]
        return [
            f"{name} ({category['id']})" if names.count(name) > 1 else name
            for name, category in zip(names, categories, strict=True)
        ]

    def is_object(self, annotation: dict[str, Any]) -> bool:
        """Whether it can be found or missed."""
        without_keypoints = self.task == "keypoints" and not annotation["num_keypoints"]
        return not annotation["iscrowd"] and not without_keypoints


def require_hotcoco() -> None:
    """Raise ValueError unless hotcoco is installed; says how to get it."""
    if not has_hotcoco():
        raise ValueError(
            "fpn-ext analyze counts with hotcoco, which is not installed: pip install hotcoco"
        )


def renumbered(
    dataset: dict[str, Any],
    detections: Sequence[dict[str, Any]],
    task: str = "bbox",
    sigmas: Sequence[float] = (),
) -> Evaluated:
    """The same objects and detections with ids of images and annotations from 1.

    A detection's area is, as in COCO, that of its box, of its mask, or of the box around its
    keypoints. One without ``bbox`` gets the box around its mask or keypoints.

    Args:
        dataset: in COCO's annotation format.
        detections: in COCO's result format.
        task: ``"bbox"``, ``"segm"`` or ``"keypoints"``.
        sigmas: of the keypoints; COCO's if empty.

    Raises:
        ValueError: a detection of an unknown image or category, no annotations, an annotation
            without a field that COCO's evaluation needs, a mask of another image's size, or another
            number of keypoints than of sigmas; or hotcoco is not installed.
    """
    require_hotcoco()
    if "annotations" not in dataset:
        raise ValueError("the annotations are those of a test set without ground truth")
    # In the order of the ids, in which COCO counts detections of equal scores.
    ids = sorted(
        (image["id"] for image in dataset["images"]), key=lambda i: (isinstance(i, str), i)
    )
    numbers = {id_: number for number, id_ in enumerate(ids, start=1)}
    categories = {category["id"] for category in dataset["categories"]}
    for what, items in (("annotation", dataset["annotations"]), ("detection", detections)):
        for item in items:
            if item["image_id"] not in numbers or item["category_id"] not in categories:
                raise ValueError(
                    f"{what} of image {item['image_id']!r} and category {item['category_id']!r}, "
                    "of which the annotation file has not both: are the detections those of "
                    "another dataset?"
                )
    _check_shapes(dataset, detections, task, len(sigmas) or COCO_KEYPOINTS)
    truth = {
        # hotcoco takes text in UTF-8 alone, which the name of a file need not be.
        "images": [
            {
                **image,
                "id": numbers[image["id"]],
                "file_name": printable(str(image.get("file_name", ""))),
            }
            for image in dataset["images"]
        ],
        "categories": list(dataset["categories"]),
        "annotations": [
            {**o, "id": i, "image_id": numbers[o["image_id"]]}
            for i, o in enumerate(dataset["annotations"], start=1)
        ],
    }
    found = [
        {**d, "id": i, "image_id": numbers[d["image_id"]], "iscrowd": 0, **_box_and_area(d, task)}
        for i, d in enumerate(detections, start=1)
    ]
    for checked in ("bbox", task):
        if reason := counted_differently(truth, found, checked):
            raise ValueError(f"{reason}: correct the annotations; fpn-ext data names what is wrong")
    return Evaluated(truth, found, task, tuple(sigmas))


def _check_shapes(
    dataset: dict[str, Any], detections: Sequence[dict[str, Any]], task: str, keypoints: int
) -> None:
    """Raise ValueError unless every object and detection has a mask or the keypoints of its own."""
    if task == "bbox":
        return
    sizes = {image["id"]: (image.get("height"), image.get("width")) for image in dataset["images"]}
    for what, items in (("annotation", dataset["annotations"]), ("detection", detections)):
        for number, item in enumerate(items, start=1):
            shape = item.get(FIELDS[task])
            if task == "segm":
                fault = _mask_fault(shape, sizes[item["image_id"]])
            else:
                fault = _keypoint_fault(shape, keypoints)
            if fault:
                raise ValueError(
                    f"{what} {number}, of image {item['image_id']!r}: {fault}. --task bbox "
                    "analyses the boxes alone"
                )


def _mask_fault(mask: Any, size: tuple[Any, Any]) -> str:
    if isinstance(mask, dict):
        try:
            mask_area(mask, *size)
        except ValueError as error:
            return f"no mask of its image: {error}"
    elif not (isinstance(mask, list) and mask and all(map(_is_polygon, mask))):
        return "needs a 'segmentation': run lengths, or polygons of at least 3 points"
    return ""


def _is_polygon(points: Any) -> bool:
    return isinstance(points, list) and len(points) >= 6 and len(points) % 2 == 0


def _keypoint_fault(points: Any, number: int) -> str:
    if isinstance(points, list) and len(points) == 3 * number and np.isfinite(points).all():
        return ""
    got = f"{len(points) / 3:g}" if isinstance(points, list) else "none"
    return (
        f"needs 'keypoints', three numbers for each of {number}, as many as there are sigmas, and "
        f"has {got} (for other than COCO's {COCO_KEYPOINTS}, name the --run or --config-file whose "
        "TEST.KEYPOINT_OKS_SIGMAS has as many)"
    )


def _box_and_area(detection: dict[str, Any], task: str) -> dict[str, Any]:
    """``area`` as COCO counts it, in pixels; and ``bbox`` if there is none."""
    shape: Any = detection.get(FIELDS[task])
    if task == "segm":
        area = float(mask_area(shape, *shape["size"]))
        box = detection.get("bbox") or mask_util.toBbox(_compressed(shape)).tolist()
    elif task == "keypoints":
        xs, ys = shape[0::3], shape[1::3]
        around = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
        area, box = around[2] * around[3], detection.get("bbox") or around
    else:
        box = shape
        area = box[2] * box[3]
    return {"bbox": box, "area": area}


def _compressed(mask: dict[str, Any]) -> dict[str, Any]:
    return mask_util.frPyObjects(mask, *mask["size"]) if isinstance(mask["counts"], list) else mask
