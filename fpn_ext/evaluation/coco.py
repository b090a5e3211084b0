"""COCO's average precision and recall, counted by hotcoco where it is installed.

hotcoco (https://github.com/derekallman/hotcoco, MIT) counts as pycocotools does, to the last bit,
in a small part of the time (docs/evidence/speed.md). Where the two define a case differently,
pycocotools counts (:func:`fpn_ext.evaluation.columns.counted_differently`). The means over its
arrays are taken here, once for both.
"""

import contextlib
import importlib.util
import io
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.evaluation.fast_eval_api import COCOeval_opt
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ..files.json_lists import ListInFile
from ..keys import declare, own_keys
from .columns import CountedDifferentlyError, read_columns

declare(
    "TEST.FPN_EXT.COCO_EVALUATOR",
    "auto",
    'What counts COCO\'s AP: "hotcoco", "pycocotools", or "auto" for hotcoco if it is installed. '
    "The scores are the same.",
    "evaluation",
)
declare(
    "TEST.FPN_EXT.AREA_RANGES",
    {},
    "More AP and AR by size: {NAME: [MIN, MAX]}, sides of a square in pixels of the image that the "
    "annotation's area is compared with, ends included. {tiny: [0, 16]} gives APtiny and ARtiny.",
    "evaluation",
)
declare(
    "TEST.FPN_EXT.AP_AT",
    [],
    "More IoU thresholds at which AP is given, in percent: [33] gives AP33, that of an overlap of "
    "0.33. The mean over 0.5 to 0.95 does not count them.",
    "evaluation",
)
declare(
    "TEST.FPN_EXT.MAX_DETECTIONS",
    [],
    "Numbers of best detections of a class in an image for which AR is given, as AR@N; AP is at "
    "the largest. [] for COCO's 1, 10 and 100, the last no lower than TEST.DETECTIONS_PER_IMAGE.",
    "evaluation",
)

logger = logging.getLogger(__name__)

EVALUATORS = ("auto", "hotcoco", "pycocotools")
LIMITS = (1, 10, 100)
KEYPOINT_LIMITS = (20,)
COUNTED = range(50, 100, 5)  # IoU thresholds of COCO's AP, in percent
ALL = (0.0, 1e5)
# COCO's, by the suffix in Detectron2's names of scores: APs, APm, APl. Sides in pixels.
SIZES = {"s": (0.0, 32.0), "m": (32.0, 96.0), "l": (96.0, 1e5)}


@dataclass(frozen=True)
class CocoSettings:
    """How detections are counted.

    Attributes:
        evaluator: one of :data:`EVALUATORS`.
        sizes: of objects, beyond COCO's, by name: (min, max) sides in pixels.
        limits: numbers of best detections of a class in an image, ascending.
        ar_by_limit: whether AR at each of ``limits`` is reported.
        ap_at: IoU thresholds in percent, beyond COCO's, at which AP is reported.
    """

    evaluator: str = "auto"
    sizes: Mapping[str, tuple[float, float]] | None = None
    limits: Sequence[int] = LIMITS
    ar_by_limit: bool = False
    ap_at: Sequence[int] = ()

    def sizes_of(self, task: str) -> dict[str, tuple[float, float]]:
        """Sizes by name, first "all"; keypoints have no small ones, as COCO annotates none."""
        sizes = {k: v for k, v in SIZES.items() if not (task == "keypoints" and k == "s")}
        return {"all": ALL, **sizes, **(self.sizes or {})}

    def limits_of(self, task: str) -> list[int]:
        return list(KEYPOINT_LIMITS if task == "keypoints" else self.limits)


def settings_of(cfg: CfgNode) -> CocoSettings:
    """The settings of ``TEST.FPN_EXT``.

    Raises:
        ValueError: a value is invalid (:func:`settings_problems`).
    """
    for problem in settings_problems(cfg):
        raise ValueError(problem)
    keys = own_keys(cfg, "TEST")
    limits = tuple(keys.MAX_DETECTIONS) or (1, 10, max(100, cfg.TEST.DETECTIONS_PER_IMAGE))
    return CocoSettings(
        evaluator=keys.COCO_EVALUATOR,
        sizes={name: (float(low), float(high)) for name, (low, high) in keys.AREA_RANGES.items()},
        limits=limits,
        ar_by_limit=bool(keys.MAX_DETECTIONS),
        ap_at=tuple(keys.AP_AT),
    )


def settings_problems(cfg: CfgNode) -> Iterable[str]:
    """What is wrong with the keys that :func:`settings_of` reads."""
    keys = own_keys(cfg, "TEST")
    if keys.COCO_EVALUATOR not in EVALUATORS:
        yield (
            f"TEST.FPN_EXT.COCO_EVALUATOR must be one of {EVALUATORS}, got {keys.COCO_EVALUATOR!r}"
        )
    elif keys.COCO_EVALUATOR == "hotcoco" and not has_hotcoco():
        yield (
            "TEST.FPN_EXT.COCO_EVALUATOR hotcoco is not installed: pip install hotcoco, or set the "
            "key to auto"
        )
    limits = keys.MAX_DETECTIONS
    whole = all(isinstance(limit, int) and limit > 0 for limit in limits)
    if not whole or sorted(set(limits)) != list(limits):
        yield (
            "TEST.FPN_EXT.MAX_DETECTIONS needs ascending whole numbers of detections, e.g. "
            f"[1, 10, 300], got {limits}"
        )
    for percent in keys.AP_AT:
        if type(percent) is not int or not 0 < percent < 100 or percent in COUNTED:
            yield (
                "TEST.FPN_EXT.AP_AT needs whole numbers of percent between 0 and 100, other than "
                f"COCO's 50, 55, ..., 95: e.g. [33] for AP33; got {percent!r}"
            )
    for name, sides in keys.AREA_RANGES.items():
        if not (name.isalpha() and name not in ("all", *SIZES)):
            yield (
                "TEST.FPN_EXT.AREA_RANGES: a name needs letters only, and is not one of COCO's "
                f"all, {', '.join(SIZES)}; got {name!r}"
            )
        pair = isinstance(sides, list | tuple) and len(sides) == 2
        numbers = pair and all(isinstance(side, int | float) for side in sides)
        if not (numbers and 0 <= sides[0] < sides[1]):
            yield (
                f"TEST.FPN_EXT.AREA_RANGES: {name} needs [MIN, MAX], sides in pixels, e.g. "
                f"[0, 16], got {sides}"
            )


def has_hotcoco() -> bool:
    return importlib.util.find_spec("hotcoco") is not None


@dataclass(frozen=True)
class CocoScores:
    """AP and AR of T IoU thresholds, R recalls, K classes, A sizes and M limits.

    The arrays are -1 where there are no objects, and the scores then NaN.

    Attributes:
        precision: (T, R, K, A, M) float64.
        recall: (T, K, A, M) float64.
        thresholds: (T,) float64: 0.5, 0.55, ..., 0.95.
        sizes: names of the A sizes: "all", "s", "m", "l", ...
        limits: M numbers of best detections of a class in an image.
        further: AP from 0 to 1 at each of ``CocoSettings.ap_at``.
    """

    precision: np.ndarray
    recall: np.ndarray
    thresholds: np.ndarray
    sizes: list[str]
    limits: list[int]
    further: Mapping[int, float] = field(default_factory=dict)

    def ap(self, iou: float | None = None, size: str = "all", category: int | None = None) -> float:
        """AP from 0 to 1 at the largest limit, NaN without objects.

        Args:
            iou: one of ``thresholds``; None for the mean over all.
            size: one of ``sizes``.
            category: index of a class; None for the mean over all.
        """
        chosen = self.precision[..., self.sizes.index(size), -1]
        if iou is not None:
            chosen = chosen[np.isclose(self.thresholds, iou)]
        return _mean(chosen if category is None else chosen[:, :, category])

    def ar(self, limit: int | None = None, size: str = "all", iou: float | None = None) -> float:
        """AR from 0 to 1, mean over the classes, NaN without objects.

        Args:
            limit: one of ``limits``; None for the largest.
            size: one of ``sizes``.
            iou: one of ``thresholds``; None for the mean over all.
        """
        m = -1 if limit is None else self.limits.index(limit)
        chosen = self.recall[:, :, self.sizes.index(size), m]
        return _mean(chosen if iou is None else chosen[np.isclose(self.thresholds, iou)])

    def as_coco_eval(self) -> SimpleNamespace:
        """``stats`` and ``eval`` as in pycocotools's ``COCOeval``, for Detectron2's tables."""
        arrays = {"precision": self.precision, "recall": self.recall}
        return SimpleNamespace(stats=self.stats, eval=arrays)

    @property
    def stats(self) -> np.ndarray:
        """pycocotools's numbers, -1 where there are no objects: AP, AP50, AP75 and by size; AR at
        each limit and by size, for keypoints AR, AR50, AR75 and by size.
        """
        sizes = [size for size in SIZES if size in self.sizes]
        recalls = (
            [self.ar(limit) for limit in self.limits]
            if "s" in sizes
            else [self.ar(), self.ar(iou=0.5), self.ar(iou=0.75)]
        )
        values = [
            *(self.ap(), self.ap(0.5), self.ap(0.75)),
            *(self.ap(size=size) for size in sizes),
            *recalls,
            *(self.ar(size=size) for size in sizes),
        ]
        return np.nan_to_num(np.array(values), nan=-1.0)


def _mean(values: np.ndarray) -> float:
    counted = values[values > -1]
    return float(np.mean(counted)) if counted.size else float("nan")


def evaluate_coco(
    ground_truth: COCO | Mapping[str, Any],
    detections: Sequence[dict[str, Any]] | ListInFile,
    task: str,
    settings: CocoSettings | None = None,
    image_ids: Sequence[int] | None = None,
    sigmas: Sequence[float] = (),
) -> CocoScores:
    """Scores of detections, as pycocotools defines them.

    Args:
        ground_truth: of a dataset, as pycocotools' object or as what a COCO JSON holds.
        detections: at least one, in COCO's result format; ``bbox`` is XYWH in pixels of the image.
        task: ``"bbox"``, ``"segm"`` (sizes are those of the masks) or ``"keypoints"``.
        settings: COCO's if None.
        image_ids: the images to count; None for all of ``ground_truth``.
        sigmas: of the keypoints; COCO's if empty.

    With hotcoco, boxes that stay in files are counted in little memory: ``detections`` and the
    annotations may each be a :class:`fpn_ext.files.json_lists.ListInFile`.
    """
    settings = settings or CocoSettings()
    dataset = ground_truth.dataset if isinstance(ground_truth, COCO) else ground_truth
    if task == "segm":
        # With a box, its area would be taken for the mask's.
        detections = [{k: v for k, v in d.items() if k != "bbox"} for d in detections]
    reason, columns = _not_hotcoco(settings), None
    if not reason:
        try:
            columns = read_columns(dataset, detections, task)
        except CountedDifferentlyError as error:
            reason = str(error)

    def counted(evaluation: Any) -> tuple[np.ndarray, np.ndarray]:
        return _counted(evaluation, task, settings, image_ids, sigmas)

    name = f"hotcoco {version('hotcoco')}" if columns else _pycocotools_name(settings)
    if columns is None:
        truth = ground_truth if isinstance(ground_truth, COCO) else as_coco(dataset)
        parts = [counted(_pycocotools(truth, detections, task, settings))]
    elif task == "bbox":
        # Of each category, every number depends on its own objects and detections alone.
        portions = columns.portions()
        parts = [counted(_hotcoco(*columns.in_hotcoco(portion), task)) for portion in portions]
    else:
        parts = [counted(_hotcoco(*_in_hotcoco(dataset, detections), task))]
    logger.info("%s counted by %s%s", task, name, f" ({reason})" if reason else "")
    precision = np.concatenate([of_part for of_part, _ in parts], axis=2)
    recall = np.concatenate([of_part for _, of_part in parts], axis=1)
    at_all_sizes = precision[len(COUNTED) :, ..., 0, -1]
    return CocoScores(
        precision=precision[: len(COUNTED)],
        recall=recall[: len(COUNTED)],
        thresholds=np.linspace(0.5, 0.95, len(COUNTED)),
        sizes=list(settings.sizes_of(task)),
        limits=settings.limits_of(task),
        further={p: _mean(at) for p, at in zip(settings.ap_at, at_all_sizes, strict=True)},
    )


def _counted(
    evaluation: Any,
    task: str,
    settings: CocoSettings,
    image_ids: Sequence[int] | None,
    sigmas: Sequence[float],
) -> tuple[np.ndarray, np.ndarray]:
    """Precision and recall of an evaluation of either library.

    Each range of areas is counted once, whatever number of names it has: of equal ones hotcoco 1.3
    fills the last alone.
    """
    params, of_name = evaluation.params, settings.sizes_of(task)
    ranges = list(dict.fromkeys(of_name.values()))
    params.areaRng = [[a**2, b**2] for a, b in ranges]
    params.areaRngLbl = [str(of_range) for of_range in ranges]
    params.maxDets = settings.limits_of(task)
    params.iouThrs = np.append(params.iouThrs, [percent / 100 for percent in settings.ap_at])
    if image_ids is not None:
        params.imgIds = list(image_ids)
    if sigmas:
        params.kpt_oks_sigmas = np.array(sigmas, dtype=np.float64)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
        evaluation.accumulate()
    rows = [ranges.index(of_range) for of_range in of_name.values()]
    precision, recall = (np.array(evaluation.eval[name]) for name in ("precision", "recall"))
    return precision[..., rows, :], recall[..., rows, :]


def as_coco(dataset: Mapping[str, Any]) -> COCO:
    """pycocotools' object of what a COCO JSON holds."""
    coco = COCO()
    annotations = dataset.get("annotations")
    in_memory = {"annotations": list(annotations)} if isinstance(annotations, ListInFile) else {}
    coco.dataset = {**dataset, **in_memory} if in_memory else dataset
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def _not_hotcoco(settings: CocoSettings) -> str:
    """Why hotcoco does not count; "" if it does."""
    if settings.evaluator == "pycocotools":
        return "TEST.FPN_EXT.COCO_EVALUATOR"
    return "" if has_hotcoco() else "pip install hotcoco for a faster evaluation"


def _compiled(settings: CocoSettings) -> bool:
    return settings.evaluator == "auto" and COCOeval_opt is not COCOeval


def _pycocotools_name(settings: CocoSettings) -> str:
    return (
        "Detectron2's COCOeval_opt"
        if _compiled(settings)
        else f"pycocotools {version('pycocotools')}"
    )


def _pycocotools(
    ground_truth: COCO, detections: Iterable[dict[str, Any]], task: str, settings: CocoSettings
) -> Any:
    """Its evaluation, or Detectron2's compiled one, a subclass."""
    with contextlib.redirect_stdout(io.StringIO()):
        found = ground_truth.loadRes(list(detections))
    return (COCOeval_opt if _compiled(settings) else COCOeval)(ground_truth, found, task)


def _in_hotcoco(
    dataset: Mapping[str, Any], detections: Iterable[dict[str, Any]]
) -> tuple[Any, Any]:
    import hotcoco

    truth = hotcoco.COCO({**dataset, "annotations": list(dataset.get("annotations", []))})
    return truth, truth.load_res(list(detections))


def _hotcoco(truth: Any, found: Any, task: str) -> Any:
    import hotcoco

    return hotcoco.COCOeval(truth, found, task)
