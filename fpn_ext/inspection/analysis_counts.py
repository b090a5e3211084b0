"""What ``fpn-ext analyze`` counts, with hotcoco's matching and error types.

A task is ``"bbox"``, ``"segm"`` or ``"keypoints"``: detections and objects overlap by the IoU of
their boxes, by that of their masks, or by COCO's object keypoint similarity (OKS). Everything but
AP is at an overlap of 0.5. Crowd regions and, for keypoints, objects without any count nowhere, nor
do detections of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..evaluation.coco import ALL, KEYPOINT_LIMITS, LIMITS, SIZES, CocoScores
from .analysis_case import Evaluated

IOU = 0.5  # of keypoints, OKS
# Task -> best detections of a class in an image, as COCO counts them.
LIMIT = {"bbox": max(LIMITS), "segm": max(LIMITS), "keypoints": max(KEYPOINT_LIMITS)}
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


Ranges = dict[str, tuple[float, float]]  # of areas, by name, both ends included
EVERYTHING: Ranges = {"all": (0.0, ALL[1] ** 2)}


def matched(case: Evaluated, areas: Ranges, iou: float | None = None, by_class: bool = True) -> Any:
    """hotcoco's evaluation, matched and accumulated.

    Args:
        areas: for AP and AR of each.
        iou: one threshold; None for COCO's ten.
        by_class: False to match whatever the classes.
    """
    import hotcoco

    truth = hotcoco.COCO(case.dataset)
    found = hotcoco.COCO({**case.dataset, "annotations": case.detections})
    evaluation = hotcoco.COCOeval(truth, found, case.task)
    params = evaluation.params
    params.area_rng = [list(area) for area in areas.values()]
    params.area_rng_lbl = list(areas)
    params.max_dets = [LIMIT[case.task]]
    params.use_cats = by_class
    if iou is not None:
        params.iou_thrs = [iou]
    if case.sigmas:
        params.kpt_oks_sigmas = list(case.sigmas)
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
        limits=[LIMIT[case.task]],
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
    """Matches at an overlap of 0.5: by name of a class, of all, and ids of ignored detections."""
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

    Objects and detections are matched whatever their classes, the best scores first, at an overlap
    of 0.5. Last row: detections of no object; last column: objects without a detection.

    Args:
        ignored: ids of detections to leave out, those in crowd regions.
        min_score: of the detections that count.
    """
    # Not hotcoco's confusion_matrix, the same for boxes and masks: for keypoints it takes boxes.
    objects = [o for o in case.dataset["annotations"] if case.is_object(o)]
    kept = [d for d in case.detections if d["id"] not in ignored and d["score"] >= min_score]
    dataset = {**case.dataset, "annotations": objects}
    evaluation = matched(
        Evaluated(dataset, kept, case.task, case.sigmas), EVERYTHING, IOU, by_class=False
    )
    index = {id_: i for i, id_ in enumerate(sorted(c["id"] for c in case.dataset["categories"]))}
    class_of_object = {o["id"]: index[o["category_id"]] for o in objects}
    class_of_detection = {d["id"]: index[d["category_id"]] for d in kept}
    nothing = len(index)
    result = np.zeros((nothing + 1, nothing + 1), dtype=np.int64)
    for of_image in filter(None, evaluation.eval_imgs):
        found = of_image["dtMatches"][0]
        for detection, object_ in zip(of_image["dtIds"], found, strict=True):
            row = class_of_object[object_] if object_ else nothing
            result[row, class_of_detection[detection]] += 1
        for object_ in set(of_image["gtIds"]) - set(found):
            result[class_of_object[object_], nothing] += 1
    return result


def error_types(case: Evaluated) -> dict[str, dict[str, float]] | None:
    """Errors as TIDE defines them (Bolya et al. 2020): their number, and the AP50 they cost.

    A false positive is, by its best overlap with the objects of its image: *classification* (at
    least 0.5 with one of another class), *localisation* (0.1 to 0.5 with one of its class), *both*
    (0.1 to 0.5 with one of another class), *duplicate* (at least 0.5 with one of its class that a
    better detection has), *background* (under 0.1). *missed*: an object without a detection that
    one of the other errors would explain. The cost is what AP50 gains if all errors of one type are
    mended, from 0 to 1.

    None for keypoints of several classes: hotcoco compares those of two classes by their boxes.
    """
    if case.task == "keypoints" and len(case.dataset["categories"]) > 1:
        return None
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
