"""Objects and detections in COCO's format as arrays, and what only pycocotools counts rightly.

A Python object for each of millions of boxes takes some 500 bytes, a row of the arrays 60.
"""

import math
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

BOXES_AT_ONCE = 1_000_000  # objects and detections that are counted together
FIELDS = ("area", "iscrowd", "num_keypoints")  # of an object; the last for keypoints alone
UNKNOWN = "an annotation or detection of an unknown image or category"


class CountedDifferentlyError(ValueError):
    """hotcoco and pycocotools define the case differently, or one of them not at all."""


@dataclass(frozen=True)
class Columns:
    """N objects and D detections of a dataset.

    Attributes:
        image_ids, categories: of the dataset; categories by their ids, ascending.
        ids, images, classes: (N,) int64, ids of each object, its image and its category.
        area: (N,) float64.
        iscrowd: (N,) bool.
        boxes: (N, 4) float64, XYWH in pixels of the image; (0, 4) if boxes are not scored.
        detections: (D, 7) float64: image id, XYWH, score, category id; (0, 7) likewise.
    """

    image_ids: list[int]
    categories: list[int]
    ids: np.ndarray
    images: np.ndarray
    classes: np.ndarray
    area: np.ndarray
    iscrowd: np.ndarray
    boxes: np.ndarray
    detections: np.ndarray

    def portions(self) -> Iterator[list[int]]:
        """Categories to be counted together: one, or several of few boxes; in their order."""
        ids = np.concatenate([self.classes, self.detections[:, 6].astype(np.int64)])
        found, counts = np.unique(ids, return_counts=True)
        count_of = dict(zip(found.tolist(), counts.tolist(), strict=True))
        portion: list[int] = []
        total = 0
        for category in self.categories:
            count = count_of.get(category, 0)
            if portion and total + count > BOXES_AT_ONCE:
                yield portion
                portion, total = [], 0
            portion.append(category)
            total += count
        yield portion

    def in_hotcoco(self, categories: list[int]) -> tuple[Any, Any]:
        """Objects and detections of some categories, as hotcoco holds them."""
        import hotcoco

        own = np.isin(self.classes, categories)
        truth = hotcoco.COCO.from_arrays(
            [{"id": image_id} for image_id in self.image_ids],
            [{"id": category, "name": str(category)} for category in categories],
            self.images[own],
            self.classes[own],
            self.boxes[own],
            ids=self.ids[own],
            area=self.area[own],
            iscrowd=self.iscrowd[own],
        )
        found = self.detections[np.isin(self.detections[:, 6], categories)]
        return truth, truth.load_res(found)


def read_columns(
    dataset: Mapping[str, Any], detections: Iterable[Mapping[str, Any]], task: str
) -> Columns:
    """A dataset in COCO's format and detections in its result format, each read once.

    Raises:
        CountedDifferentlyError: with what hotcoco and pycocotools define differently.
    """
    image_ids = {image["id"] for image in dataset["images"]}
    categories = {category["id"] for category in dataset.get("categories", [])}
    if not all(map(_is_plain_id, [*image_ids, *categories])):
        raise CountedDifferentlyError("an id is no whole number from 0")
    fields = set(FIELDS if task == "keypoints" else FIELDS[:2])
    ids, images, classes, crowds = array("q"), array("q"), array("q"), array("b")
    area, boxes = array("d"), array("d")
    for item in dataset.get("annotations", []):
        if not fields <= item.keys():
            name = next(name for name in FIELDS if name in fields - item.keys())
            raise CountedDifferentlyError(f"an annotation has no {name}")
        number, image, category, crowd = map(item.get, ("id", "image_id", "category_id", "iscrowd"))
        if not _is_plain_id(number):
            raise CountedDifferentlyError("an id is no whole number from 0")
        if number == 0:
            raise CountedDifferentlyError("the id of an annotation is 0")
        if crowd not in (0, 1):
            raise CountedDifferentlyError("an iscrowd is neither 0 nor 1")
        if image not in image_ids or category not in categories:
            raise CountedDifferentlyError(UNKNOWN)
        ids.append(number)
        images.append(int(image))
        classes.append(int(category))
        crowds.append(bool(crowd))
        if task == "bbox":
            area.append(item["area"])
            boxes.extend(item["bbox"])
    rows = array("d")
    for item in detections:
        image, score = item["image_id"], item["score"]
        if image not in image_ids:
            raise CountedDifferentlyError(UNKNOWN)
        if not math.isfinite(score):
            raise CountedDifferentlyError("a score is not finite")
        if task == "bbox":
            rows.extend((image, *item["bbox"], score, item["category_id"]))
    if len(np.unique(ids)) < len(ids):
        raise CountedDifferentlyError("the id of an annotation repeats")
    columns = Columns(
        image_ids=sorted(image_ids),
        categories=sorted(categories),
        ids=np.array(ids),
        images=np.array(images),
        classes=np.array(classes),
        area=np.array(area),
        iscrowd=np.array(crowds, dtype=bool),
        boxes=np.array(boxes).reshape(-1, 4),
        detections=np.array(rows).reshape(-1, 7),
    )
    if not (np.isfinite(columns.boxes).all() and np.isfinite(columns.detections).all()):
        raise CountedDifferentlyError("a box is not finite")
    return columns


def counted_differently(
    dataset: Mapping[str, Any], detections: Iterable[Mapping[str, Any]], task: str
) -> str:
    """What hotcoco and pycocotools define differently, or one of them not at all; "" if nothing.

    >>> objects = [{"id": 0, "image_id": 1, "category_id": 1, "area": 4, "iscrowd": 0}]
    >>> data = {"images": [{"id": 1}], "categories": [{"id": 1}], "annotations": objects}
    >>> counted_differently(data, [], "bbox")
    'the id of an annotation is 0'
    """
    try:
        read_columns(dataset, detections, task)
    except CountedDifferentlyError as error:
        return str(error)
    return ""


def _is_plain_id(number: Any) -> bool:
    return type(number) is int and 0 <= number < 2**53
