"""What ``fpn-ext analyze`` counts, with hotcoco's matching, confusion matrix and error types.

Everything but AP is at an IoU of 0.5. Crowd regions, and detections in them, count nowhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..evaluation.coco import ALL, SIZES, CocoScores, has_hotcoco
from ..evaluation.columns import counted_differently

IOU = 0.5
LIMIT = 100  # best detections of a class in an image, as COCO counts them
TINY = 16.0  # pixels
# By name of the report: (min, max) sides of a square, in pixels of the image.
SIZE_RANGES = {
    "all": ALL,
    "below 16 px": (0.0, TINY),
    "small": SIZES["s"],
    "medium": SIZES["m"],
    "large": SIZES["l"],
}
# hotcoco's names of TIDE's error types.
ERRORS = {
    "Cls": "classification",
    "Loc": "localisation",
    "Both": "both",
    "Dupe": "duplicate",
    "Bkg": "background",
    "Miss": "missed",
}


@dataclass(frozen=True)
class Evaluated:
    """A dataset and its detections, in COCO's formats, numbered so that every library agrees.

    Attributes:
        dataset: ``images``, ``categories`` and ``annotations``, the ids of images and annotations
            counted from 1.
        detections: in COCO's annotation format, with ``id`` counted from 1 and ``score``; with
            ``pooled_level`` if the model kept it.
    """

    dataset: dict[str, Any]
    detections: list[dict[str, Any]]

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


def require_hotcoco() -> None:
    """Raise ValueError unless hotcoco is installed; says how to get it."""
    if not has_hotcoco():
        raise ValueError(
            "fpn-ext analyze counts with hotcoco, which is not installed: pip install hotcoco"
        )


def renumbered(dataset: dict[str, Any], detections: Sequence[dict[str, Any]]) -> Evaluated:
    """The same objects and detections with ids of images and annotations from 1.

    Args:
        dataset: in COCO's annotation format.
        detections: in COCO's result format.

    Raises:
        ValueError: a detection of an unknown image or category, no annotations, or an annotation
            without a field that COCO's evaluation needs; or hotcoco is not installed.
    """
    require_hotcoco()
    if "annotations" not in dataset:
        raise ValueError("the annotations are those of a test set without ground truth")
    numbers = {image["id"]: i for i, image in enumerate(dataset["images"], start=1)}
    categories = {category["id"] for category in dataset["categories"]}
    for what, items in (("annotation", dataset["annotations"]), ("detection", detections)):
        for item in items:
            if item["image_id"] not in numbers or item["category_id"] not in categories:
                raise ValueError(
                    f"{what} of image {item['image_id']!r} and category {item['category_id']!r}, "
                    "of which the annotation file has not both: are the detections those of "
                    "another dataset?"
                )
    truth = {
        "images": [{**image, "id": numbers[image["id"]]} for image in dataset["images"]],
        "categories": list(dataset["categories"]),
        "annotations": [
            {**o, "id": i, "image_id": numbers[o["image_id"]]}
            for i, o in enumerate(dataset["annotations"], start=1)
        ],
    }
    found = [
        {
            **d,
            "id": i,
            "image_id": numbers[d["image_id"]],
            "area": d["bbox"][2] * d["bbox"][3],
            "iscrowd": 0,
        }
        for i, d in enumerate(detections, start=1)
    ]
    if reason := counted_differently(truth, found, "bbox"):
        raise ValueError(f"{reason}: correct the annotations; fpn-ext data names what is wrong")
    return Evaluated(truth, found)


Ranges = dict[str, tuple[float, float]]  # of areas, by name, both ends included
EVERYTHING: Ranges = {"all": (0.0, ALL[1] ** 2)}


def matched(case: Evaluated, areas: Ranges, iou: float | None = None) -> Any:
    """hotcoco's evaluation of boxes, matched and accumulated.

    Args:
        areas: for AP and AR of each.
        iou: one threshold; None for COCO's ten.
    """
    import hotcoco

    truth = hotcoco.COCO(case.dataset)
    found = hotcoco.COCO({**case.dataset, "annotations": case.detections})
    evaluation = hotcoco.COCOeval(truth, found, "bbox")
    params = evaluation.params
    params.area_rng = [list(area) for area in areas.values()]
    params.area_rng_lbl = list(areas)
    params.max_dets = [LIMIT]
    if iou is not None:
        params.iou_thrs = [iou]
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation


def scores_by_area(case: Evaluated, areas: Ranges) -> CocoScores:
    """AP and AR by range of ``area``."""
    evaluation = matched(case, areas)
    return CocoScores(
        precision=np.asarray(evaluation.eval["precision"]),
        recall=np.asarray(evaluation.eval["recall"]),
        thresholds=np.asarray(evaluation.params.iou_thrs),
        sizes=list(areas),
        limits=[LIMIT],
    )


def scores_by_size(case: Evaluated) -> CocoScores:
    """AP and AR by size, ``sizes`` being those of :data:`SIZE_RANGES`."""
    return scores_by_area(case, {k: (a**2, b**2) for k, (a, b) in SIZE_RANGES.items()})


@dataclass(frozen=True)
class Matches:
    """Detections and objects of one class or of several, matched.

    Attributes:
        scores: (D,) float64, descending; detections in crowd regions are left out.
        correct: (D,) bool: matched with an object.
        objects: their number, without crowd regions.
    """

    scores: np.ndarray
    correct: np.ndarray
    objects: int

    def best(self) -> dict[str, float] | None:
        """The score from which detections give the best F1, and F1, precision and recall there.

        F1 = 2 TP / (detections + objects), over the detections that score at least as much. Of
        several such scores, the highest. None if no object is detected.
        """
        if not self.correct.any():
            return None
        ends = np.flatnonzero(np.append(np.diff(self.scores) != 0, True))  # of equal scores
        true = np.cumsum(self.correct)[ends]
        f1 = 2 * true / (ends + 1 + self.objects)
        i = int(np.argmax(f1))
        return {"score": float(self.scores[ends[i]]), **self.at(float(self.scores[ends[i]]))}

    def at(self, score: float) -> dict[str, float]:
        """F1, precision and recall of the detections that score at least ``score``; NaN if none."""
        kept = int(np.count_nonzero(self.scores >= score))
        true = int(np.count_nonzero(self.correct[:kept]))
        nan = float("nan")
        return {
            "f1": 2 * true / (kept + self.objects) if kept + self.objects else nan,
            "precision": true / kept if kept else nan,
            "recall": true / self.objects if self.objects else nan,
        }


def matches_by_class(case: Evaluated) -> tuple[dict[str, Matches], Matches, set[int]]:
    """Matches at an IoU of 0.5: by name of a class, of all, and ids of ignored detections."""
    evaluation = matched(case, EVERYTHING, IOU)
    ids = [c["id"] for c in sorted(case.dataset["categories"], key=lambda c: c["id"])]
    parts: dict[int, list[tuple[float, bool]]] = {category: [] for category in ids}
    objects = dict.fromkeys(ids, 0)
    ignored: set[int] = set()
    for of_image in evaluation.eval_imgs:
        if of_image is None:
            continue
        category = of_image["category_id"]
        objects[category] += sum(not ignore for ignore in of_image["gtIgnore"])
        for number, score, correct, ignore in zip(
            of_image["dtIds"],
            of_image["dtScores"],
            of_image["dtMatched"][0],
            of_image["dtIgnore"][0],
            strict=True,
        ):
            if ignore:
                ignored.add(number)
            else:
                parts[category].append((score, correct))
    names = dict(zip(ids, case.class_names, strict=True))
    by_class = {names[c]: _matches(parts[c], objects[c]) for c in ids}
    together = [pair for pairs in parts.values() for pair in pairs]
    return by_class, _matches(together, sum(objects.values())), ignored


def _matches(pairs: Sequence[tuple[float, bool]], objects: int) -> Matches:
    scores = np.array([score for score, _ in pairs], dtype=np.float64)
    correct = np.array([correct for _, correct in pairs], dtype=bool)
    order = np.argsort(-scores, kind="stable")
    return Matches(scores[order], correct[order], objects)


def confusion_matrix(case: Evaluated, ignored: set[int], min_score: float) -> np.ndarray:
    """(K + 1, K + 1) int64: row the class of an object, column that of the detection.

    Objects and detections are matched whatever their classes, the best scores first, at an IoU of
    0.5. Last row: detections of no object; last column: objects without a detection.

    Args:
        ignored: ids of detections to leave out, those in crowd regions.
        min_score: of the detections that count.
    """
    kept = [d for d in case.detections if d["id"] not in ignored]
    evaluation = matched(Evaluated(case.dataset, kept), EVERYTHING, IOU)
    result = evaluation.confusion_matrix(iou_thr=IOU, max_det=LIMIT, min_score=min_score)
    return np.asarray(result["matrix"]).astype(np.int64)


def error_types(case: Evaluated) -> dict[str, dict[str, float]]:
    """Errors as TIDE defines them (Bolya et al. 2020): their number, and the AP50 they cost.

    A false positive is, by its best IoU with the objects of its image: *classification* (at least
    0.5 with one of another class), *localisation* (0.1 to 0.5 with one of its class), *both* (0.1
    to 0.5 with one of another class), *duplicate* (at least 0.5 with one of its class that a better
    detection has), *background* (under 0.1). *missed*: an object without a detection that one of
    the other errors would explain. The cost is what AP50 gains if all errors of one type are
    mended, from 0 to 1.
    """
    result = matched(case, EVERYTHING).tide_errors(pos_thr=IOU, bg_thr=0.1)
    return {
        name: {"count": result["counts"][short], "cost": result["delta_ap"][short]}
        for short, name in ERRORS.items()
    }


def false_positives_without_objects(
    case: Evaluated, thresholds: Sequence[float]
) -> tuple[int, list[float]]:
    """The number of images without objects, and detections per such image from each score on."""
    with_objects = {o["image_id"] for o in case.dataset["annotations"]}
    images = {image["id"] for image in case.dataset["images"]} - with_objects
    scores = np.array([d["score"] for d in case.detections if d["image_id"] in images])
    nan = float("nan")
    return len(images), [
        float(np.count_nonzero(scores >= t)) / len(images) if images else nan for t in thresholds
    ]
