"""The evaluation of a config, rehearsed before there is a model: nothing found, everything found.

Every test loader and evaluator that the run will use is built, and each evaluator gets two sets of
detections: none at all, and the ground truth itself with score 1. The first must not end in an
error, the second must score 100. What stands between is found now and not after the training.
"""

import contextlib
import io
import logging
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.structures import Boxes, BoxMode, Instances
from pycocotools import mask

from ..data.loading import Records
from ..keys import own_keys
from ..names import did_you_mean
from ..proposals.loader import build_validation_loader, test_loader_and_records
from .coco import settings_of
from .evaluators import build_evaluators

MOST_IMAGES = 50  # with objects, and one for each class beside them
MOST_MASK_PIXELS = 2 * 10**8  # of all masks of an image: they are made one image at a time
PERFECT = 99.9  # AP in percent; the evaluators count in hundredths of recall

# Results of a perfect set: for each task the score that must be 100.
SCORES = {
    "bbox": "AP",
    "segm": "AP",
    "keypoints": "AP",
    "box_proposals": "AR@1000",
    "mask_proposals": "AR@1000",
}


class Rehearsed(NamedTuple):
    """What a rehearsal on one dataset has shown.

    Attributes:
        dataset: its name.
        images: how many it has.
        summary: what was scored.
        notes: what there is to say, a sentence each.
        scores: names of all that was scored, ``"bbox/AP"`` and so on.
        error: what is wrong, "" if nothing is.
        stage: ``"test data"`` or ``"evaluation"``, where it is wrong.
    """

    dataset: str
    images: int = 0
    summary: str = ""
    notes: tuple[str, ...] = ()
    scores: tuple[str, ...] = ()
    error: str = ""
    stage: str = "evaluation"


def rehearse(cfg: CfgNode, training: bool = False) -> Iterator[Rehearsed]:
    """A rehearsal on each dataset of ``DATASETS.TEST``; nothing is written, no picture is opened.

    Args:
        cfg: a checked config.
        training: also that TEST.FPN_EXT.BEST_METRIC is one of the scores.
    """
    metric = own_keys(cfg, "TEST").BEST_METRIC if training else ""
    scores: list[str] = []
    for name in cfg.DATASETS.TEST:
        try:
            with _quiet():
                loader, records = test_loader_and_records(cfg, name)
                images = len(loader.dataset)
                if own_keys(cfg, "TEST").VALIDATION_LOSS:
                    build_validation_loader(cfg, name)
        except Exception as error:
            yield Rehearsed(name, error=_said(name, "the test loader", error), stage="test data")
            continue
        try:
            with _quiet():
                summary, notes, of_this = _rehearsed(cfg, name, records)
        except Exception as error:
            yield Rehearsed(name, images, error=_said(name, "the evaluation", error))
            continue
        if not of_this:  # not all are known
            metric = ""
        if len(cfg.DATASETS.TEST) > 1:
            of_this = [f"{name}/{score}" for score in of_this]
        scores += of_this
        wrong = _metric_error(metric, scores) if name == cfg.DATASETS.TEST[-1] else ""
        yield Rehearsed(name, images, summary, tuple(notes), tuple(of_this), wrong)


def _metric_error(metric: str, scores: Sequence[str]) -> str:
    """What is wrong with TEST.FPN_EXT.BEST_METRIC, "" if it is a score or none."""
    if not metric or metric in scores or metric.startswith("validation_loss/"):
        return ""
    return (
        f"TEST.FPN_EXT.BEST_METRIC: no score of the evaluation will be named {metric!r}; "
        f"{did_you_mean(metric, scores)}"
    )


def check_evaluation(cfg: CfgNode, training: bool = False) -> list[str]:
    """The notes of :func:`rehearse`, with its arguments.

    Raises:
        ValueError: all that is wrong.
    """
    found = list(rehearse(cfg, training))
    errors = [one.error for one in found if one.error]
    if errors:
        raise ValueError(
            f"the evaluation on DATASETS.TEST would fail, or score wrong; {len(errors)} "
            "problem(s):\n" + "\n".join(f"  - {error}" for error in errors)
        )
    return [note for one in found for note in one.notes]


def _said(name: str, what: str, error: Exception) -> str:
    if isinstance(error, ValueError | OSError):
        return str(error)
    where = type(error).__name__
    return (
        f"{what} of dataset {name!r} (DATASETS.TEST) ends in {where}: {error}. Check the data with "
        f"fpn-ext data --dataset {name}"
    )


def _rehearsed(cfg: CfgNode, name: str, records: Records) -> tuple[str, list[str], list[str]]:
    """A summary, notes, and the names of all scores."""
    notes: list[str] = []
    names: list[str] = []
    if not isinstance(records, list):
        return "a dataset of torch's: not rehearsed", notes, names
    is_coco = MetadataCatalog.get(name).get("evaluator_type", "coco") == "coco"
    evaluators = build_evaluators(cfg, name, None)  # what it scores with is checked first
    sample = _sample(cfg, name, records, notes)
    scored = []
    for evaluator in evaluators:
        notes += getattr(evaluator, "notes", [])
        nothing = sample or records[:1]
        _score(evaluator, nothing, (_detections(cfg, record, []) for record in nothing))
        everything = (_detections(cfg, record, _objects(record)) for record in sample)
        results = _score(evaluator, sample, everything) if sample else {}
        if sample and not results:
            notes.append(f"dataset {name!r} has no annotations to score with")
        names += flatten_results_dict(results)
        for task, scores in results.items():
            key = SCORES.get(task, "AP")
            # Pascal VOC's evaluation rounds corners to whole pixels.
            key = "AP50" if key == "AP" and not is_coco else key
            if not is_coco and math.isnan(scores[key]):
                notes.append(f"dataset {name!r} has no object to find that is not difficult")
                continue
            scored.append(f"{task}/{key} {scores[key]:.1f}")
            _check_perfect(name, task, key, scores, sample)
    if not any(_objects(record) for record in records):
        notes.append(
            f"dataset {name!r} has no object to find (crowd regions are none): its AP will be nan"
        )
    count = sum(len(_objects(record)) for record in sample)
    whose = "its" if len(sample) == len(records) else "of a sample, the"
    scores_of_all = ", ".join(scored) or "-"
    return f"{whose} {count} objects of {len(sample)} images score {scores_of_all}", notes, names


def _sample(cfg: CfgNode, name: str, records: Records, notes: list[str]) -> Records:
    """The first images whose objects can all be found, and for each class the first with it."""
    most = cfg.TEST.DETECTIONS_PER_IMAGE
    crowded = [record for record in records if len(_objects(record)) > most]
    if crowded:
        notes.append(
            f"{len(crowded)} image(s) of dataset {name!r} have more objects than "
            f"TEST.DETECTIONS_PER_IMAGE {most}, so that not all can be found"
        )
    # As many detections of a class and image are counted, and 20 of keypoints.
    most = min(20 if cfg.MODEL.KEYPOINT_ON else most, *settings_of(cfg).limits[-1:])
    chosen: Records = []
    classes: set[int] = set()
    empty = 0
    for record in records:
        objects = _objects(record)
        its_classes = {a["category_id"] for a in objects}
        if not 0 < len(objects) <= most:
            continue
        if len(chosen) >= MOST_IMAGES and its_classes <= classes:
            continue
        if cfg.MODEL.MASK_ON:
            if record["height"] * record["width"] * len(objects) > MOST_MASK_PIXELS:
                continue
            without_pixels = sum(not mask.area(_run_lengths(record, a)) for a in objects)
            empty += without_pixels
            if without_pixels:
                continue
        classes |= its_classes
        chosen.append(record)
    if empty:
        notes.append(
            f"{empty} object(s) of dataset {name!r}, of those tried, have a mask without a pixel: "
            "no mask can ever find them"
        )
    return chosen


def _objects(record: dict[str, Any]) -> list[dict[str, Any]]:
    """What there is to find: no crowd regions, no boxes without width or height."""
    return [
        annotation
        for annotation in record.get("annotations", ())
        if not annotation.get("iscrowd", 0) and min(_sides(annotation)) > 0
    ]


def _has_keypoints(annotation: dict[str, Any]) -> bool:
    return any(visible > 0 for visible in (annotation.get("keypoints") or [])[2::3])


def _sides(annotation: dict[str, Any]) -> tuple[float, float]:
    x, y, a, b = annotation["bbox"][:4]
    return (a - x, b - y) if annotation["bbox_mode"] == BoxMode.XYXY_ABS else (a, b)


def _detections(
    cfg: CfgNode, record: dict[str, Any], objects: list[dict[str, Any]]
) -> dict[str, Any]:
    """What a model returns for an image that finds these objects, with score 1 each."""
    size = record["height"], record["width"]
    corners = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in objects]
    boxes = Boxes(torch.tensor([list(box) for box in corners]).reshape(-1, 4))
    scores = torch.ones(len(objects))
    found, proposals = Instances(size), Instances(size)
    found.pred_boxes, found.scores = boxes, scores
    found.pred_classes = torch.tensor([int(a["category_id"]) for a in objects], dtype=torch.int64)
    if cfg.MODEL.MASK_ON:
        masks = [mask.decode(_run_lengths(record, a)) for a in objects]
        stacked = np.stack(masks) if masks else np.zeros((0, *size), dtype=np.uint8)
        found.pred_masks = torch.from_numpy(stacked)
    if cfg.MODEL.KEYPOINT_ON:
        number = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
        points = [_keypoints(a, box, number) for a, box in zip(objects, boxes.tensor, strict=True)]
        found.pred_keypoints = torch.stack(points) if points else torch.zeros(0, number, 3)
    proposals.proposal_boxes, proposals.objectness_logits = boxes, scores
    return {"instances": found, "proposals": proposals}


def _run_lengths(record: dict[str, Any], annotation: dict[str, Any]) -> dict[str, Any]:
    """An object's mask, checked before, as pycocotools encodes it."""
    height, width = record["height"], record["width"]
    written = annotation["segmentation"]
    if isinstance(written, np.ndarray):
        return mask.encode(np.asfortranarray(written.astype(np.uint8)))
    if isinstance(written, dict):
        compressed = not isinstance(written["counts"], list)
        return written if compressed else mask.frPyObjects(written, height, width)
    polygons = [[float(value) for value in polygon] for polygon in written]
    return mask.merge(mask.frPyObjects(polygons, height, width))


def _keypoints(annotation: dict[str, Any], box: torch.Tensor, number: int) -> torch.Tensor:
    """(number, 3): the keypoints of an object; the middle of its box where none is visible."""
    points = torch.tensor(annotation.get("keypoints") or [0.0] * 3 * number).reshape(-1, 3).clone()
    if not (points[:, 2] > 0).any():
        points[:, :2] = (box[:2] + box[2:]) / 2
    points[:, 2] = 1
    return points.float()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Within, no log but errors, and nothing printed."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _check_perfect(
    name: str, task: str, key: str, scores: dict[str, float], sample: Records
) -> None:
    if scores[key] >= PERFECT:
        return
    if task == "keypoints" and not any(_has_keypoints(a) for r in sample for a in _objects(r)):
        raise ValueError(
            f"dataset {name!r} (DATASETS.TEST): no object of {len(sample)} images has an annotated "
            "keypoint, which MODEL.KEYPOINT_ON needs to be scored; annotate 'keypoints', or set "
            "MODEL.KEYPOINT_ON False"
        )
    low = [
        f"{metric.removeprefix(key + '-')} {value:.1f}"
        for metric, value in scores.items()
        if metric.startswith(f"{key}-") and not math.isnan(value) and value < PERFECT
    ]
    classes = f" ({', '.join(low[:5])}{', ...' if len(low) > 5 else ''})" if low else ""
    metadata = MetadataCatalog.get(name)
    source = metadata.get("json_file") or "its registered function"
    raise ValueError(
        f"dataset {name!r} (DATASETS.TEST): its own objects as detections, {len(sample)} images, "
        f"score {task}/{key} {scores[key]:.1f}{classes}; 100 is due. What is trained on and what "
        f"is scored ({source}) differ in classes, boxes or images: compare 'category_id' and "
        f"'image_id' of the records with it, and MetadataCatalog.get({name!r}).thing_classes"
    )


def _score(
    evaluator: DatasetEvaluator, records: Records, outputs: Iterable[dict[str, Any]]
) -> dict[str, Any]:
    evaluator.reset()
    for record, output in zip(records, outputs, strict=True):
        evaluator.process([record], [output])
    results = evaluator.evaluate(img_ids=[record["image_id"] for record in records])
    evaluator.reset()
    return dict(results or {})
