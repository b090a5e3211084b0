"""The ground-truth boxes of datasets in pixels of the network input during training.

As by Detectron2's DatasetMapper: ResizeShortestEdge with ``INPUT.MIN_SIZE_TRAIN`` and
``MAX_SIZE_TRAIN``, boxes clipped to the image, crowd regions and boxes without area dropped. Flips
and crops (``INPUT.CROP``) are ignored. Reads annotations, no images.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.structures import BoxMode

from ..names import did_you_mean
from .collector import paused_collector

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
    """Boxes in pixels of the network input: every box once per training size.

    Attributes:
        boxes: (M, 4) float64, XYXY, clipped to the image.
        index: (M,) int64, index of the box in the :class:`TrainingBoxes`.
        image_sizes: (M, 2) int64, height and width of its resized image, before padding.
        weights: (M,) float64, how often training draws this size; they sum to 1 over all sizes.
        without_area: number of boxes without area, which Detectron2 drops at every size.
    """

    boxes: np.ndarray
    index: np.ndarray
    image_sizes: np.ndarray
    weights: np.ndarray
    without_area: int

    def number(self) -> int:
        """How many boxes there are, each counted once."""
        return int(np.count_nonzero(np.bincount(self.index)))

    def rows(self, chosen: np.ndarray | slice) -> "ResizedBoxes":
        """A subset of the rows, by mask or indices."""
        return ResizedBoxes(
            self.boxes[chosen],
            self.index[chosen],
            self.image_sizes[chosen],
            self.weights[chosen],
            self.without_area,
        )


@paused_collector()
def read_boxes(names: Sequence[str]) -> TrainingBoxes:
    """The boxes of registered datasets, concatenated.

    Raises:
        ValueError: no name or an unknown one; datasets with different classes; a record without
            height and width; a non-finite box; no boxes at all.
        FileNotFoundError: the annotations are missing.
    """
    if not names:
        raise ValueError("DATASETS.TRAIN names no dataset; name one there or with --dataset")
    for name in names:
        if name not in DatasetCatalog:
            known = did_you_mean(name, DatasetCatalog.keys())
            raise ValueError(f"{name!r} is not a registered dataset; {known}")
    records = [record for name in names for record in DatasetCatalog.get(name)]
    classes = {name: list(MetadataCatalog.get(name).get("thing_classes", ())) for name in names}
    if any(own != classes[names[0]] for own in classes.values()):
        raise ValueError(f"the datasets {list(names)} have different classes: {classes}")
    unsized = [r.get("image_id") for r in records if not (r.get("height") and r.get("width"))]
    if unsized:
        raise ValueError(
            f"{len(unsized)} images have no height and width in the records of {list(names)} "
            f"(image_id {unsized[0]!r}, ...): Detectron2's format of datasets has both"
        )
    annotations = [
        (number, annotation)
        for number, record in enumerate(records)
        for annotation in record.get("annotations", ())
    ]
    objects = [(number, a) for number, a in annotations if not a.get("iscrowd", 0)]
    if not objects:
        raise ValueError(f"{list(names)} has no boxes on {len(records)} images")
    result = TrainingBoxes(
        corners=_corners([a for _, a in objects]),
        classes=np.array([a["category_id"] for _, a in objects], dtype=np.int64),
        images=np.array([number for number, _ in objects], dtype=np.int64),
        image_ids=[record.get("image_id", record["file_name"]) for record in records],
        image_sizes=np.array([(r["height"], r["width"]) for r in records], dtype=np.int64),
        class_names=classes[names[0]],
        crowds=len(annotations) - len(objects),
    )
    wrong = ~np.isfinite(result.corners).all(axis=1)
    if wrong.any():
        where = result.image_ids[result.images[wrong][0]]
        raise ValueError(
            f"{wrong.sum()} boxes have a coordinate that is NaN or infinite (image {where!r}, "
            "...); fpn-ext data names them all"
        )
    return result


def _corners(annotations: Sequence[dict[str, Any]]) -> np.ndarray:
    """(N, 4) float64, XYXY: the boxes of each mode at once."""
    written = np.array([a["bbox"] for a in annotations], dtype=np.float64).reshape(-1, 4)
    modes = np.array([a["bbox_mode"] for a in annotations])
    for mode in np.unique(modes).tolist():
        rows = modes == mode
        written[rows] = BoxMode.convert(written[rows], BoxMode(mode), BoxMode.XYXY_ABS)
    return written


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


def resize(found: TrainingBoxes, cfg: CfgNode) -> ResizedBoxes:
    """Every box at every side of :func:`training_sides`, as training resizes it."""
    first, second = found.corners[:, :2], found.corners[:, 2:]
    # Swapped corners are reordered, as in Detectron2's transforms.
    corners = np.concatenate([np.minimum(first, second), np.maximum(first, second)], axis=1)
    image_sizes = found.image_sizes.tolist()
    parts = []
    for side, share in training_sides(cfg).items():
        sizes = np.array(
            [resized_size(h, w, side, cfg.INPUT.MAX_SIZE_TRAIN) for h, w in image_sizes],
            dtype=np.int64,
        )
        scale = (sizes / found.image_sizes)[:, [1, 0, 1, 0]]
        most = sizes[:, [1, 0, 1, 0]]
        boxes = np.minimum((corners * scale[found.images]).clip(min=0), most[found.images])
        kept = np.flatnonzero((boxes[:, 2:] - boxes[:, :2] > SMALLEST_SIDE).all(axis=1))
        own_sizes = sizes[found.images[kept]]
        parts.append((boxes[kept], kept, own_sizes, np.full(len(kept), share)))
    boxes, index, own_sizes, weights = (np.concatenate(c) for c in zip(*parts, strict=True))
    left_out = len(corners) - np.count_nonzero(np.bincount(index))
    return ResizedBoxes(boxes, index, own_sizes, weights, int(left_out))


def resized_size(height: int, width: int, side: int, max_size: int) -> tuple[int, int]:
    """(height, width) of an image after Detectron2's ResizeShortestEdge.

    >>> resized_size(480, 640, 800, 1333)
    (800, 1067)
    """
    if side == 0:
        return height, width
    return ResizeShortestEdge.get_output_shape(height, width, side, max_size)


# Shared by the commands that report on boxes.
