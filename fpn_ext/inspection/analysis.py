"""What a detector gets right and wrong on a dataset: the report of ``fpn-ext analyze``."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from detectron2.config import CfgNode

from ..names import aligned
from .analysis_case import renumbered
from .analysis_counts import (
    SIZE_RANGES,
    Matches,
    confusion_matrix,
    error_types,
    false_positives_without_objects,
    matches_by_class,
    scores_by_size,
)
from .analysis_levels import LevelScores, scores_by_level

BACKGROUND = "background"
MISSED = "missed"  # the column of the background
# Task -> what is analysed, and what two of them have in common.
WHAT = {"bbox": "boxes", "segm": "masks", "keypoints": "keypoints"}
OVERLAP = {"bbox": "an IoU", "segm": "a mask IoU", "keypoints": "an OKS"}
MOST_NAMED = 3  # classes in a note
THRESHOLDS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
RECALLS = np.linspace(0, 1, 101)
WIDEST_MATRIX = 12  # classes, printed as text


@dataclass(frozen=True)
class ClassReport:
    """One class, or all together. Scores are from 0 to 1, NaN where there are no objects.

    Attributes:
        name: of the class; "all".
        objects: their number, without crowd regions.
        detections: their number, without those in crowd regions.
        ap, ap50: COCO's; of "all", means over the classes.
        best: the score with the best F1 at an overlap of 0.5: ``score``, ``f1``, ``precision`` and
            ``recall``; of "all", one score for all classes. None if no object is detected.
        precision: (101,) at the recalls 0, 0.01, ..., 1 at an overlap of 0.5, whose mean is
            ``ap50``.
    """

    name: str
    objects: int
    detections: int
    ap: float
    ap50: float
    best: dict[str, float] | None
    precision: list[float]


@dataclass(frozen=True)
class Analysis:
    """The report.

    Attributes:
        title: the dataset.
        task: ``"bbox"``, ``"segm"`` or ``"keypoints"``: which overlap counts.
        images: number of images.
        crowds: number of crowd regions, which count nowhere.
        unmarked: number of objects without keypoints, which count nowhere where these are analysed.
        everything: all classes together.
        classes: in the order of their category ids.
        by_score: F1, precision and recall of all classes together from each of 101 scores on.
        min_score: of the detections in ``confusion``.
        confusion: (K + 1, K + 1): row the class of an object, column that of its detection, the
            last of both the background.
        errors: by type: ``count``, and ``cost`` in AP50; None for keypoints of several classes.
        sizes: by COCO's sizes and "below 16 px": ``ap`` and ``ar``.
        levels: by pyramid level; None if they are not known.
        empty_images: number of images without objects.
        false_positives: detections per such image from each score on: ``[(score, number), ...]``.
        weights: the checkpoint whose detections they are, and how far its training was; "" for
            those of a file.
    """

    title: str
    task: str
    images: int
    crowds: int
    unmarked: int
    everything: ClassReport
    classes: list[ClassReport]
    by_score: list[dict[str, float]]
    min_score: float
    confusion: list[list[int]]
    errors: dict[str, dict[str, float]] | None
    sizes: dict[str, dict[str, float]]
    levels: list[LevelScores] | None
    empty_images: int
    false_positives: list[tuple[float, float]]
    weights: str = ""

    @property
    def names(self) -> list[str]:
        """Of the rows and columns of ``confusion``."""
        return [*(report.name for report in self.classes), BACKGROUND]

    @property
    def columns(self) -> list[str]:
        """What the columns of ``confusion`` are called where they are shown."""
        return [*(report.name for report in self.classes), MISSED]

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "names": self.names}

    def tables(self) -> dict[str, list[list[str]]]:
        """Headed tables by title, cells as text; scores in percent."""
        header = ["class", "objects", "detections", "AP", "AP50"]
        tables = {
            "classes": [
                [*header, "best F1", "from score", "precision", "recall"],
                *(_class_row(report) for report in (self.everything, *self.classes)),
            ],
            "sizes (sides in pixels of the image: small up to 32, medium up to 96)": [
                ["size", "AP", "AR"],
                *([name, _percent(s["ap"]), _percent(s["ar"])] for name, s in self.sizes.items()),
            ],
        }
        if self.levels is not None:
            tables["pyramid levels (of the objects' boxes)"] = [
                ["level", "objects", "detections", "AP", "AP50", "AR"],
                *(
                    [
                        *(level.level, str(level.objects), str(level.detections)),
                        *map(_percent, (level.ap, level.ap50, level.ar)),
                    ]
                    for level in self.levels
                ),
            ]
        if self.errors is not None:
            tables[f"errors (TIDE, at {OVERLAP[self.task]} of 0.5)"] = [
                ["type", "number", "cost in AP50"],
                *(
                    [name, f"{error['count']:.0f}", _percent(error["cost"])]
                    for name, error in self.errors.items()
                ),
            ]
        tables[f"confusion, detections from score {self.min_score:.3f} (row: object)"] = [
            ["", *self.columns],
            *([name, *map(str, row)] for name, row in zip(self.names, self.confusion, strict=True)),
        ]
        if self.empty_images:
            tables[f"false positives per image, of {self.empty_images} without objects"] = [
                ["from score", "per image"],
                *([f"{score:.3g}", f"{count:.3g}"] for score, count in self.false_positives),
            ]
        return tables

    def notes(self) -> list[str]:
        """What to know about the tables, in sentences."""
        notes = [f"Detections of {self.weights}."] if self.weights else []
        if not self.everything.objects:
            notes.append("There are no objects, so there is no AP, only false positives.")
        if note := self._one_threshold():
            notes.append(note)
        if self.levels is None:
            notes.append(
                "AP by pyramid level needs a config whose RoI heads pool each box from one level."
            )
        if self.errors is None:
            notes.append(
                "Error types are left out: for keypoints of several classes hotcoco compares those "
                "of different classes by their boxes, not by OKS."
            )
        if self.crowds:
            notes.append(f"{self.crowds} crowd regions, and detections in them, count nowhere.")
        if self.unmarked:
            notes.append(
                f"{self.unmarked} objects without keypoints, and detections of them, count nowhere."
            )
        return notes

    def _one_threshold(self) -> str:
        """Which classes the score of the confusion matrix is too high for; ``""`` if for none."""
        missed = [
            f"{report.name} ({report.best['score']:.3f}; {row[-1]} of {report.objects} missed)"
            for report, row in zip(self.classes, self.confusion, strict=False)
            if report.best and report.best["score"] < self.min_score and row[-1]
        ]
        if not missed:
            return ""
        others = f" and {len(missed) - MOST_NAMED} more" if len(missed) > MOST_NAMED else ""
        return (
            f"The confusion matrix counts detections of all classes from the one score "
            f"{self.min_score:.3f} on. The best score of its own is lower for "
            f"{', '.join(missed[:MOST_NAMED])}{others}: objects found below it count as missed "
            "there. --min-score sets another."
        )

    def __str__(self) -> str:
        all_ = self.everything
        parts = [
            f"{self.title}, {WHAT[self.task]}: {self.images} images, {all_.objects} objects, "
            f"{all_.detections} detections"
        ]
        for title, rows in self.tables().items():
            if title.startswith("confusion") and len(self.classes) > WIDEST_MATRIX:
                parts.append(f"{title}: of {len(self.classes)} classes, see --json or --output")
            else:
                parts.append(f"{title}\n{aligned(rows)}")
        return "\n\n".join([*parts, *self.notes()])


def _class_row(report: ClassReport) -> list[str]:
    best = report.best
    cells = ["-"] * 4
    if best:
        f1, precision, recall = (_percent(best[name]) for name in ("f1", "precision", "recall"))
        cells = [f1, f"{best['score']:.3f}", precision, recall]
    counts = [str(report.objects), str(report.detections)]
    return [report.name, *counts, _percent(report.ap), _percent(report.ap50), *cells]


def _percent(value: float) -> str:
    return "-" if np.isnan(value) else f"{100 * value:.1f}"


def analyze(
    dataset: dict[str, Any],
    detections: Sequence[dict[str, Any]],
    title: str = "detections",
    cfg: CfgNode | None = None,
    min_score: float | None = None,
    task: str = "bbox",
    sigmas: Sequence[float] = (),
) -> Analysis:
    """Analyse the boxes, masks or keypoints that a detector has found.

    Args:
        dataset: in COCO's annotation format; not modified.
        detections: in COCO's result format, ``bbox`` XYWH in pixels of the image; not modified.
        title: the dataset's name.
        cfg: of the model, for AP by pyramid level.
        min_score: of the detections in the confusion matrix; None for the score with the best F1
            over all classes, 0.5 if there is none.
        task: what overlaps: ``"bbox"``, ``"segm"`` (by the IoU of masks) or ``"keypoints"`` (by
            COCO's object keypoint similarity).
        sigmas: of the keypoints; COCO's if empty.

    Raises:
        ValueError: the annotations or detections cannot be evaluated; or hotcoco is not installed.
    """
    case = renumbered(dataset, detections, task, sigmas)
    by_class, together, ignored = matches_by_class(case)
    scores = scores_by_size(case)
    best = together.best()
    if min_score is None:
        min_score = best["score"] if best else 0.5
    thresholds = sorted({*THRESHOLDS, *([best["score"]] if best else [])})
    crowds = sum(bool(o["iscrowd"]) for o in case.dataset["annotations"])
    empty_images, rates = false_positives_without_objects(case, thresholds)
    precision = scores.precision[0, :, :, 0, -1]  # (101, K), -1 without objects
    precision = np.where(precision < 0, np.nan, precision)
    reports = [
        _class_report(name, matches, precision[:, k], scores.ap(category=k))
        for k, (name, matches) in enumerate(by_class.items())
    ]
    with_objects = precision[:, [report.objects > 0 for report in reports]]
    mean = with_objects.mean(axis=1) if with_objects.size else np.full(len(RECALLS), np.nan)
    return Analysis(
        title=title,
        task=task,
        images=len(case.dataset["images"]),
        crowds=crowds,
        unmarked=len(case.dataset["annotations"]) - crowds - together.objects,
        everything=_class_report("all", together, mean, scores.ap()),
        classes=reports,
        by_score=[{"score": t, **together.at(t)} for t in RECALLS.tolist()],
        min_score=min_score,
        confusion=confusion_matrix(case, ignored, min_score).tolist(),
        errors=error_types(case),
        sizes={
            name: {"ap": scores.ap(size=name), "ar": scores.ar(size=name)} for name in SIZE_RANGES
        },
        levels=scores_by_level(case, cfg) if cfg is not None else None,
        empty_images=empty_images,
        false_positives=list(zip(thresholds, rates, strict=True)),
    )


def _class_report(name: str, matches: Matches, precision: np.ndarray, ap: float) -> ClassReport:
    return ClassReport(
        name=name,
        objects=matches.objects,
        detections=len(matches.scores),
        ap=ap,
        ap50=float(precision.mean()),
        best=matches.best(),
        precision=precision.tolist(),
    )
