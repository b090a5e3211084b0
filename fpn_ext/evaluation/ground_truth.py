"""The ground truth of a dataset as it is scored: pycocotools' object, made from a mended copy.

Files of many exporters are right to train on and would be scored wrong, or not at all, by
pycocotools. The copy in memory is mended, and what was mended is counted; the file stays as it is.
"""

import contextlib
import copy
import functools
import logging
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.coco import convert_to_coco_dict
from detectron2.utils.file_io import PathManager
from pycocotools.coco import COCO

from ..data.class_numbers import class_names, numbers_in, unknown_class
from ..data.coco_file import Faults, check_coco_file, read_coco_json
from ..data.dataset_contents import four_numbers, number_of, short
from ..data.loading import Records, check_records, load_records
from ..data.mask_area import mask_area
from ..names import did_you_mean
from .coco import as_coco

logger = logging.getLogger(__name__)

MOST_IN_MEMORY = 64 << 20  # bytes of a COCO JSON; the annotations of a larger one stay in it

_said: set[str] = set()


class GroundTruth:
    """What a dataset is scored against.

    Attributes:
        dataset: what its COCO JSON would hold; the annotations of a large file, of which nothing
            was to be mended, stay in it (:class:`fpn_ext.files.json_lists.ListInFile`).
        classes: class names in the order of the ids of its categories.
        number_of: {category id: the model's number of that class}.
        notes: what was mended, a sentence each.
    """

    def __init__(
        self,
        dataset_name: str,
        order: Sequence[str] = (),
        masks: bool = False,
        keypoints: int = 0,
    ):
        """
        Args:
            dataset_name: a registered dataset.
            order: the class names by their numbers in the model; () for the dataset's own.
            masks: masks are to be scored, too.
            keypoints: how many keypoints of an object are to be scored, too.

        Raises:
            ValueError: no such dataset, or its ground truth cannot be scored.
            FileNotFoundError: its files are not there.
        """
        dataset = _read(dataset_name)
        mended, counts = _mended(dataset, dataset_name, masks, keypoints)
        self.notes = [
            f"ground truth of {dataset_name!r}: {count} object(s) {what}"
            for what, count in counts.items()
        ]
        metadata = MetadataCatalog.get(dataset_name)
        own_order = class_names(dataset_name)
        own_numbers = metadata.get("thing_dataset_id_to_contiguous_id")
        self.number_of = dict(own_numbers or _by_name(mended.get("categories", []), own_order))
        numbers, said = numbers_in(order, own_order, dataset_name)
        if said:
            mended = _in_order(mended, dataset_name, order, own_order, numbers, self.number_of)
            self.number_of = {number + 1: number for number in range(len(order))}
            self.notes.append(said)
        self.dataset = mended
        categories = sorted(mended.get("categories", []), key=lambda c: c["id"])
        self.classes = [category["name"] for category in categories]

    @functools.cached_property
    def coco(self) -> COCO:
        """pycocotools' object of it, made when it is first asked for."""
        return as_coco(self.dataset)

    def say(self) -> None:
        """Log the notes, each once in a process."""
        if logger.isEnabledFor(logging.WARNING):
            for note in self.notes:
                if note not in _said:
                    logger.warning(note)
            _said.update(self.notes)


def ground_truth_of(dataset_name: str) -> COCO:
    """The objects of a registered dataset, as pycocotools holds them.

    Read from the metadata's ``json_file`` where there is one, else made from the dataset's records
    by Detectron2's own conversion: ``iscrowd`` is kept, and an object's area is that of its mask,
    or of its box where it has none. What :class:`GroundTruth` mends is mended.

    Raises:
        ValueError: no such dataset, or its ground truth cannot be scored.
        FileNotFoundError: its files are not there.
    """
    truth = GroundTruth(dataset_name)
    truth.say()
    return truth.coco


def _read(dataset_name: str) -> dict[str, Any]:
    metadata = MetadataCatalog.get(dataset_name)
    json_file = metadata.get("json_file")
    if not json_file and dataset_name not in DatasetCatalog:
        raise ValueError(
            f"{dataset_name!r} is not a registered dataset; "
            + did_you_mean(dataset_name, DatasetCatalog.keys())
        )
    if not json_file:
        return _from_records(dataset_name)
    local_file = PathManager.get_local_path(str(json_file))
    if dataset_name in DatasetCatalog and (
        # Some are generated when they are first read; reading tells how classes are numbered.
        not os.path.isfile(local_file) or not metadata.get("thing_dataset_id_to_contiguous_id")
    ):
        load_records([dataset_name])
    if dataset_name in DatasetCatalog:
        check_coco_file(local_file, metadata.get("image_root", ""))
    in_memory = os.path.getsize(local_file) <= MOST_IN_MEMORY
    return read_coco_json(local_file, [] if in_memory else ["annotations"])


def _from_records(dataset_name: str) -> dict[str, Any]:
    if not MetadataCatalog.get(dataset_name).get("thing_classes"):
        raise ValueError(
            f"dataset {dataset_name!r} has no class names, which its evaluation needs: "
            f"MetadataCatalog.get({dataset_name!r}).thing_classes = [...]"
        )
    # The conversion writes into records, which some functions give again.
    records = copy.deepcopy(load_records([dataset_name]))
    check_records([dataset_name], records, evaluated=True)
    _check_run_lengths(dataset_name, records)
    with _given(dataset_name, records):
        # It leaves "annotations" out where no image has any.
        return {"annotations": [], **convert_to_coco_dict(dataset_name)}


def _by_name(categories: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[Any, int]:
    """{category id: class number} where the two have the same names; else {}."""
    if {category["name"] for category in categories} != set(names):
        return {}
    return {category["id"]: list(names).index(category["name"]) for category in categories}


def _check_run_lengths(dataset_name: str, records: Records) -> None:
    faults = Faults()
    for record in records:
        for annotation in record.get("annotations", ()):
            if isinstance(annotation.get("segmentation"), dict):
                size = record["height"], record["width"]
                where = f"{record['file_name']}, box {short(annotation['bbox'])}"
                _check_mask(annotation["segmentation"], size, where, faults)
    faults.check(f"dataset {dataset_name!r} (DATASETS.TEST)")


@contextlib.contextmanager
def _given(dataset_name: str, records: Records) -> Iterator[None]:
    """Within, the dataset's function gives these records."""
    function = DatasetCatalog[dataset_name]
    DatasetCatalog.remove(dataset_name)
    DatasetCatalog.register(dataset_name, lambda: records)
    try:
        yield
    finally:
        DatasetCatalog.remove(dataset_name)
        DatasetCatalog.register(dataset_name, function)


def _mended(
    dataset: dict[str, Any], dataset_name: str, masks: bool, keypoints: int
) -> tuple[dict[str, Any], Counter]:
    """The same where nothing is to be mended, else a copy; and how many objects were, by what."""
    annotations = dataset.get("annotations")
    if not annotations:
        return dataset, Counter()
    sizes = {image["id"]: (image.get("height"), image.get("width")) for image in dataset["images"]}
    counts: Counter = Counter()
    faults = Faults()

    def mended() -> Iterator[dict[str, Any]]:
        for annotation in annotations:
            if annotation["image_id"] not in sizes:
                continue  # pycocotools passes over it
            size = sizes[annotation["image_id"]]
            found = _mended_object(annotation, size, masks, keypoints, counts, faults)
            if found is not None:
                yield found

    number, good = 0, set()
    for annotation in mended():
        number += 1
        i = annotation["id"]
        if isinstance(i, int) and not isinstance(i, bool) and i > 0:
            good.add(i)
    faults.check(f"dataset {dataset_name!r} (DATASETS.TEST)")
    if len(good) == number and not counts:
        return dataset, counts
    seen, counts = counts, Counter()
    kept = list(mended())
    if len(good) < number:
        # pycocotools takes an id for whether an object was found: 0 would never be.
        seen["with an id that cannot be scored (0, text, or twice): numbered anew"] = number - len(
            good
        )
        kept = [{**a, "id": i} for i, a in enumerate(kept, start=1)]
    return {**dataset, "annotations": kept}, seen


def _mended_object(
    annotation: dict[str, Any],
    size: tuple[int, int],
    masks: bool,
    keypoints: int,
    counts: Counter,
    faults: Faults,
) -> dict[str, Any] | None:
    """One annotation, with what pycocotools reads; None if it cannot be found by any detection."""
    where = f"annotation {short(annotation.get('id'))} of image {short(annotation['image_id'])}"
    box = four_numbers(annotation.get("bbox"))
    if box is None:
        faults.add("'bbox' must be four finite numbers [x, y, width, height]", where)
        return None
    changed: dict[str, Any] = {}
    if "iscrowd" not in annotation:
        changed["iscrowd"] = 0
        counts["without 'iscrowd': taken for 0"] += 1
    crowd = annotation.get("iscrowd", 0)
    if not crowd and min(box[2:]) <= 0:
        counts["without width or height: left out, as in training"] += 1
        return None
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, list) and segmentation:
        usable = [p for p in segmentation if len(p) >= 6 and len(p) % 2 == 0]
        if len(usable) < len(segmentation):
            changed["segmentation"] = segmentation = usable
            counts["with polygons of fewer than 3 points: these are left out"] += 1
        if not usable and not masks and not crowd:
            counts["without any other polygon, left out of training: ignored"] += 1
            changed["iscrowd"] = 1
    if masks:
        _check_mask(segmentation, size, where, faults)
    area = number_of(annotation.get("area"))
    if area is None or not 0 <= area < math.inf or (area == 0 and min(box[2:]) > 0):
        changed["area"] = _area(segmentation, box, size)
        counts["without 'area', or with one of 0: that of mask or box"] += 1
    if keypoints:
        changed |= _mended_keypoints(annotation, keypoints, where, counts, faults)
    return {**annotation, **changed} if changed else annotation


def _mended_keypoints(
    annotation: dict[str, Any], number: int, where: str, counts: Counter, faults: Faults
) -> dict[str, Any]:
    written = annotation.get("keypoints")
    if not written:
        counts["without 'keypoints': scored by the box alone"] += 1
        return {"keypoints": [0] * 3 * number, "num_keypoints": 0}
    if len(written) != 3 * number:
        faults.add(
            f"'keypoints' must be {3 * number} numbers, (x, y, visibility) for each of "
            f"MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS {number}",
            f"{where}: {len(written)}",
        )
    if "num_keypoints" in annotation:
        return {}
    counts["without 'num_keypoints': counted"] += 1
    return {"num_keypoints": sum(1 for visibility in written[2::3] if visibility > 0)}


def _check_mask(segmentation: Any, size: tuple[int, int], where: str, faults: Faults) -> None:
    if isinstance(segmentation, dict):
        try:
            mask_area(segmentation, *size)
        except ValueError as error:
            faults.add("a run-length mask must be one of its picture", f"{where}: {error}")
    elif not segmentation:
        faults.add(
            "MODEL.MASK_ON needs a 'segmentation' for every object that is scored; write it, or "
            "set MODEL.MASK_ON False",
            where,
        )


def _area(segmentation: Any, box: Sequence[float], size: tuple[int, int]) -> float:
    """In pixels: of the mask if there is one that can be read, else of the box."""
    area = 0.0
    if isinstance(segmentation, dict):
        with contextlib.suppress(ValueError):
            area = float(mask_area(segmentation, *size))
    elif segmentation:
        area = sum(_polygon_area(polygon) for polygon in segmentation)
    return area or box[2] * box[3]


def _polygon_area(polygon: Sequence[float]) -> float:
    """By the shoelace formula.

    >>> _polygon_area([0, 0, 4, 0, 4, 3])
    6.0
    """
    xs, ys = polygon[::2], polygon[1::2]
    return abs(sum(xs[i - 1] * ys[i] - xs[i] * ys[i - 1] for i in range(len(xs)))) / 2


def _in_order(
    dataset: dict[str, Any],
    dataset_name: str,
    order: Sequence[str],
    own_order: Sequence[str],
    numbers: dict[int, int],
    own_number_of: dict[Any, int],
) -> dict[str, Any]:
    """A copy whose categories are the model's classes, with the ids 1, 2, ... in their order."""
    categories = [{"id": number + 1, "name": name} for number, name in enumerate(order)]
    annotations = []
    for annotation in dataset.get("annotations", []):
        number = own_number_of.get(annotation["category_id"], annotation["category_id"])
        if number not in numbers:
            raise unknown_class(dataset_name, own_order, number, order)
        annotations.append({**annotation, "category_id": numbers[number] + 1})
    return {**dataset, "categories": categories, "annotations": annotations}
