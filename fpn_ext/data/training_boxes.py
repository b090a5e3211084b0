"""The ground-truth boxes of datasets in pixels of the network input during training.

As by Detectron2's DatasetMapper: ResizeShortestEdge with ``INPUT.MIN_SIZE_TRAIN`` and
``MAX_SIZE_TRAIN``, boxes clipped to the image, crowd regions and boxes without area dropped. Flips
and crops (``INPUT.CROP``) are ignored. Reads annotations, no images.
"""

import inspect
import logging
import os
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from ..names import did_you_mean
from .coco_file import check_coco_file, coco_lists
from .collector import paused_collector

logger = logging.getLogger(__name__)

# Module and name of the function that Detectron2's register_coco_instances registers.
COCO_LOADER = ("detectron2.data.datasets.coco", "register_coco_instances.<locals>.<lambda>")
ROWS_AT_ONCE = 10_000  # boxes; with 3 anchors each on a level, they stay in the cache
SIDES_OF_A_RANGE = 9  # with MIN_SIZE_TRAIN_SAMPLING "range": evenly spaced samples
SMALLEST_SIDE = 1e-5  # pixels; Detectron2's filter_empty_instances drops boxes up to it
# COCO's area ranges, applied to the box in the original image.
AREAS = {"small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, float("inf"))}


@dataclass(frozen=True)
class TrainingBoxes:
    """The N boxes of I images, in pixels of the original images.

    Attributes:
        corners: (N, 4) float64, XYXY.
        classes: (N,) int64, indices into ``class_names``.
        images: (N,) int64, index of each box's image in ``image_ids``.
        image_ids: of all images, as in the datasets' records.
        image_sizes: (I, 2) int64, height and width.
        class_names: of all classes.
        crowds: number of crowd regions, which are excluded from the boxes.
    """

    corners: np.ndarray
    classes: np.ndarray
    images: np.ndarray
    image_ids: list[Any]
    image_sizes: np.ndarray
    class_names: list[str]
    crowds: int

    def groups(self) -> dict[str, np.ndarray]:
        """(N,) masks: ``"all"``, COCO's sizes, then the classes as ``"class NAME"``."""
        area = np.prod(self.corners[:, 2:] - self.corners[:, :2], axis=1)
        groups = {"all": np.ones(len(area), dtype=bool)}
        for name, (low, high) in AREAS.items():
            groups[name] = (area <= high) & ((area > low) | (low == 0))
        for number, name in enumerate(self.class_names):
            groups[f"class {name}"] = self.classes == number
        return groups


@dataclass(frozen=True)
class ResizedBoxes:
    """M boxes in pixels of the network input.

    Attributes:
        boxes: (M, 4) float64, XYXY, clipped to the image.
        index: (M,) integers, index of the box in the :class:`TrainingBoxes`.
        image_sizes: (M, 2) int64, height and width of its resized image, before padding.
        weights: (M,) float64, how often training draws this size.
    """

    boxes: np.ndarray
    index: np.ndarray
    image_sizes: np.ndarray
    weights: np.ndarray

    def __len__(self) -> int:
        return len(self.index)

    def rows(self, chosen: np.ndarray | slice) -> "ResizedBoxes":
        """A subset of the rows, by mask or indices."""
        return ResizedBoxes(
            self.boxes[chosen], self.index[chosen], self.image_sizes[chosen], self.weights[chosen]
        )


@dataclass(frozen=True)
class BoxesAtSides:
    """Every box once per training size, but where it has no area and Detectron2 drops it.

    M rows, which are resized when they are taken: all at once would need a hundred bytes each.

    Attributes:
        corners: (N, 4) float64, XYXY in pixels of the original images, corners in order.
        images: (N,) int64, index of each box's image.
        original_sizes: (I, 2) int64, height and width.
        resized_sizes: (S, I, 2) int64, the same at each training size, before padding.
        shares: (S,) float64, how often training draws each size; they sum to 1.
        index: (M,) int32, index of the box, ascending within a size.
        side: (M,) uint16, index of the size, ascending.
    """

    corners: np.ndarray
    images: np.ndarray
    original_sizes: np.ndarray
    resized_sizes: np.ndarray
    shares: np.ndarray
    index: np.ndarray
    side: np.ndarray

    def __len__(self) -> int:
        return len(self.index)

    @property
    def weights(self) -> np.ndarray:
        """(M,) float64, how often training draws the size of each row."""
        return self.shares[self.side]

    def number(self) -> int:
        """How many boxes there are, each counted once."""
        there = np.zeros(len(self.corners), dtype=bool)
        there[self.index] = True
        return int(np.count_nonzero(there))

    def without_area(self) -> int:
        """How many boxes have no area at any size."""
        return len(self.corners) - self.number()

    def rows(self, chosen: np.ndarray | slice) -> ResizedBoxes:
        """Rows by mask or indices, resized."""
        index, side = self.index[chosen], self.side[chosen]
        images = self.images[index]
        sizes = self.resized_sizes[side, images]
        scale = (sizes / self.original_sizes[images])[:, [1, 0, 1, 0]]
        boxes = np.minimum((self.corners[index] * scale).clip(min=0), sizes[:, [1, 0, 1, 0]])
        return ResizedBoxes(boxes, index, sizes, self.shares[side])


def portions(count: int) -> Iterator[slice]:
    """Slices of some rows each, all of ``count`` together, for work that stays in the cache."""
    for start in range(0, count, ROWS_AT_ONCE):
        yield slice(start, start + ROWS_AT_ONCE)


@paused_collector()
def read_boxes(names: Sequence[str]) -> TrainingBoxes:
    """The boxes of registered datasets, concatenated.

    A COCO file that was registered with Detectron2's ``register_coco_instances`` is checked, then
    read box by box; of any other dataset, the records are.

    Raises:
        ValueError: no name or an unknown one; datasets with different classes; a record without
            height and width; a non-finite box; no boxes at all; a fault in a COCO file.
        FileNotFoundError: the annotations are missing.
    """
    if not names:
        raise ValueError("DATASETS.TRAIN names no dataset; name one there or with --dataset")
    for name in names:
        if name not in DatasetCatalog:
            known = did_you_mean(name, DatasetCatalog.keys())
            raise ValueError(f"{name!r} is not a registered dataset; {known}")
    parts = [_read_one(name) for name in names]
    for part in parts:
        if part.class_names != parts[0].class_names:
            classes = {name: part.class_names for name, part in zip(names, parts, strict=True)}
            raise ValueError(f"the datasets {list(names)} have different classes: {classes}")
    result = parts[0] if len(parts) == 1 else _joined(parts)
    if not len(result.corners):
        raise ValueError(f"{list(names)} has no boxes on {len(result.image_ids)} images")
    wrong = ~np.isfinite(result.corners).all(axis=1)
    if wrong.any():
        where = result.image_ids[result.images[wrong][0]]
        raise ValueError(
            f"{wrong.sum()} boxes have a coordinate that is NaN or infinite (image {where!r}, "
            "...); fpn-ext data names them all"
        )
    return result


def _read_one(name: str) -> TrainingBoxes:
    file, image_root = registered_coco_file(name)
    if file:
        return _of_coco_file(name, file, image_root)
    return _of_records(name, DatasetCatalog.get(name))


def _joined(parts: Sequence[TrainingBoxes]) -> TrainingBoxes:
    before = np.cumsum([0, *(len(part.image_ids) for part in parts)])
    return TrainingBoxes(
        corners=np.concatenate([part.corners for part in parts]),
        classes=np.concatenate([part.classes for part in parts]),
        images=np.concatenate([p.images + n for n, p in zip(before, parts, strict=False)]),
        image_ids=[image_id for part in parts for image_id in part.image_ids],
        image_sizes=np.concatenate([part.image_sizes for part in parts]),
        class_names=parts[0].class_names,
        crowds=sum(part.crowds for part in parts),
    )


def _of_records(name: str, records: Sequence[dict[str, Any]]) -> TrainingBoxes:
    unsized = [r.get("image_id") for r in records if not (r.get("height") and r.get("width"))]
    if unsized:
        raise ValueError(
            f"{len(unsized)} images have no height and width in the records of {[name]} "
            f"(image_id {unsized[0]!r}, ...): Detectron2's format of datasets has both"
        )
    images, objects, crowds = array("q"), [], 0
    for number, record in enumerate(records):
        for annotation in record.get("annotations", ()):
            if annotation.get("iscrowd", 0):
                crowds += 1
            else:
                images.append(number)
                objects.append(annotation)
    return TrainingBoxes(
        corners=_corners(objects),
        classes=np.array([a["category_id"] for a in objects], dtype=np.int64),
        images=np.array(images),
        image_ids=[record.get("image_id", record["file_name"]) for record in records],
        image_sizes=_sizes((r["height"], r["width"]) for r in records),
        class_names=list(MetadataCatalog.get(name).get("thing_classes", ())),
        crowds=crowds,
    )


def _corners(annotations: Sequence[dict[str, Any]]) -> np.ndarray:
    """(N, 4) float64, XYXY: the boxes of each mode at once."""
    written = np.array([a["bbox"] for a in annotations], dtype=np.float64).reshape(-1, 4)
    modes = np.array([a["bbox_mode"] for a in annotations])
    for mode in np.unique(modes).tolist():
        rows = modes == mode
        written[rows] = BoxMode.convert(written[rows], BoxMode(mode), BoxMode.XYXY_ABS)
    return written


def _sizes(heights_and_widths: Iterable[tuple[int, int]]) -> np.ndarray:
    return np.array(list(heights_and_widths), dtype=np.int64).reshape(-1, 2)


def registered_coco_file(name: str) -> tuple[str, str]:
    """JSON and folder of images of a dataset that ``register_coco_instances`` registered.

    ("", "") for any other: its function may give less than the file, or something else.
    """
    function = DatasetCatalog[name]
    if (function.__module__, function.__qualname__) != COCO_LOADER:
        return "", ""
    given = inspect.getclosurevars(function).nonlocals
    file = PathManager.get_local_path(os.fspath(given["json_file"]))
    return (file, os.fspath(given["image_root"])) if os.path.isfile(file) else ("", "")


def _of_coco_file(name: str, file: str, image_root: str) -> TrainingBoxes:
    """The boxes of the records that Detectron2's ``load_coco_json`` makes, without the records.

    Images are in the order of their ids, boxes of an image in that of the file, classes in that of
    their ids; an object whose polygons are all of fewer than 3 points is left out. As there, the
    dataset's metadata are given its classes.
    """
    for note in check_coco_file(file, image_root):
        logger.warning(note)
    data = coco_lists(file)
    categories = {category["id"]: category["name"] for category in data["categories"]}
    class_of = {category: number for number, category in enumerate(sorted(categories))}
    class_names = [categories[category] for category in class_of]
    MetadataCatalog.get(name).set(
        thing_classes=class_names, thing_dataset_id_to_contiguous_id=class_of
    )
    size_of = {image["id"]: (image["height"], image["width"]) for image in data["images"]}
    image_ids = sorted(size_of)
    image_of = {image_id: number for number, image_id in enumerate(image_ids)}
    boxes, classes, images, crowds, unusable = array("d"), array("q"), array("q"), 0, 0
    for annotation in data.get("annotations", ()):
        image = image_of.get(annotation["image_id"])
        if image is None:
            continue
        polygons = annotation.get("segmentation")
        has_polygons = isinstance(polygons, list) and polygons
        if has_polygons and not any(len(p) >= 6 and len(p) % 2 == 0 for p in polygons):
            unusable += 1
            continue
        if annotation.get("iscrowd", 0):
            crowds += 1
            continue
        boxes.extend(annotation["bbox"])
        classes.append(class_of[annotation["category_id"]])
        images.append(image)
    if unusable:
        logger.warning(
            "%s: %d object(s) without a polygon of 3 points or more: left out", file, unusable
        )
    corners = np.array(boxes).reshape(-1, 4)
    corners[:, 2:] += corners[:, :2]
    by_image = np.argsort(images, kind="stable")
    return TrainingBoxes(
        corners=corners[by_image],
        classes=np.array(classes)[by_image],
        images=np.array(images)[by_image],
        image_ids=image_ids,
        image_sizes=_sizes(size_of[image_id] for image_id in image_ids),
        class_names=class_names,
        crowds=crowds,
    )


def training_sides(cfg: CfgNode) -> dict[int, float]:
    """The shorter sides that training resizes to, with the probability of each.

    With ``MIN_SIZE_TRAIN_SAMPLING`` "choice": all of ``MIN_SIZE_TRAIN``, duplicates counting twice;
    with "range": at most :data:`SIDES_OF_A_RANGE`, evenly spaced over the range, equally likely.
    0 means no resizing.

    >>> from detectron2.config import get_cfg
    >>> cfg = get_cfg()
    >>> cfg.INPUT.MIN_SIZE_TRAIN = (480, 640, 640, 800)
    >>> training_sides(cfg)
    {480: 0.25, 640: 0.5, 800: 0.25}
    """
    given, style = cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING
    sides = [given] if isinstance(given, int) else list(given)
    whole = all(isinstance(side, int) and side >= 0 for side in sides)
    if style not in ("choice", "range") or not sides or not whole:
        raise ValueError(
            "INPUT.MIN_SIZE_TRAIN needs whole numbers of pixels and MIN_SIZE_TRAIN_SAMPLING "
            f'"choice" or "range", got {given} and {style!r}'
        )
    if style == "range":
        low, high = (sides[0], sides[-1])
        if len(sides) > 2 or low > high:
            raise ValueError(
                'INPUT.MIN_SIZE_TRAIN needs (least, most) with MIN_SIZE_TRAIN_SAMPLING "range", '
                f"got {given}"
            )
        spread = np.linspace(low, high, min(SIDES_OF_A_RANGE, high - low + 1))
        sides = [round(float(side)) for side in spread]
    return {side: count / len(sides) for side, count in sorted(Counter(sides).items())}


def resize(found: TrainingBoxes, cfg: CfgNode) -> BoxesAtSides:
    """Every box at every side of :func:`training_sides`, as training resizes it."""
    first, second = found.corners[:, :2], found.corners[:, 2:]
    # Swapped corners are reordered, as in Detectron2's transforms.
    corners = np.concatenate([np.minimum(first, second), np.maximum(first, second)], axis=1)
    shares = training_sides(cfg)
    image_sizes = found.image_sizes.tolist()
    sizes = np.array(
        [
            [resized_size(h, w, side, cfg.INPUT.MAX_SIZE_TRAIN) for h, w in image_sizes]
            for side in shares
        ],
        dtype=np.int64,
    )
    every = BoxesAtSides(
        corners=corners,
        images=found.images,
        original_sizes=found.image_sizes,
        resized_sizes=sizes,
        shares=np.array(list(shares.values())),
        index=np.tile(np.arange(len(corners), dtype=np.int32), len(shares)),
        side=np.repeat(np.arange(len(shares), dtype=np.uint16), len(corners)),
    )
    kept = np.ones(len(every), dtype=bool)
    for portion in portions(len(every)):
        boxes = every.rows(portion).boxes
        kept[portion] = (boxes[:, 2:] - boxes[:, :2] > SMALLEST_SIDE).all(axis=1)
    return replace(every, index=every.index[kept], side=every.side[kept])


def resized_size(height: int, width: int, side: int, max_size: int) -> tuple[int, int]:
    """(height, width) of an image after Detectron2's ResizeShortestEdge.

    >>> resized_size(480, 640, 800, 1333)
    (800, 1067)
    """
    if side == 0:
        return height, width
    return ResizeShortestEdge.get_output_shape(height, width, side, max_size)
