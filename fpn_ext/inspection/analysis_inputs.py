"""The ground truth and the detections that ``fpn-ext analyze`` is asked about."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset

from ..config.prepare import Weights, prepare
from ..data.datasets import first_test_dataset
from ..engine.testing import changed
from ..engine.trained_on import check_test_classes
from ..engine.trainer import Trainer
from ..evaluation.ground_truth import GroundTruth
from ..files.checkpoint import CompleteCheckpointer, described
from ..names import did_you_mean
from ..reporting.coco_json import annotations_of
from ..speed.optimize import model_for_inference
from .analysis import Analysis, analyze
from .analysis_case import COCO_KEYPOINTS, FIELDS, require_hotcoco


def analyses_of(args: argparse.Namespace) -> dict[str, Analysis]:
    """By task, the analyses that the arguments of ``fpn-ext analyze`` name.

    Raises:
        FileNotFoundError, TypeError, ValueError: invalid arguments, files or config.
    """
    _check(args)
    cfg = None
    if args.config_file:
        weights: Weights = "unread" if args.detections else "required"
        cfg = prepare(args.config_file, args.opts, weights=weights).cfg
    require_hotcoco()  # before a model is run
    by = ""
    sigmas = cfg.TEST.KEYPOINT_OKS_SIGMAS if cfg is not None else ()
    if args.detections:
        detections = _read_detections(args.detections)
        has = [task for task in FIELDS if _has(detections, task)]
        tasks = _tasks(args, has or args.task or ["bbox"])
        _check_fields(args.detections, detections, tasks)
    if args.annotations:
        title, dataset = str(args.annotations), _read_annotations(args.annotations)
    else:
        assert cfg is not None, "_check"
        title = args.dataset or first_test_dataset(cfg, "--dataset")
        if not args.detections:
            tasks = _tasks(args, _tasks_of_model(cfg))
        dataset = _ground_truth(title, tasks, len(sigmas) or COCO_KEYPOINTS)
    if not args.detections:
        assert cfg is not None, "_check"
        detections, by = _detect(cfg, title)
    reports = {
        task: analyze(dataset, detections, title, cfg, args.min_score, task, sigmas)
        for task in tasks
    }
    return {task: replace(report, weights=by) for task, report in reports.items()}


def _tasks(args: argparse.Namespace, there: Sequence[str]) -> list[str]:
    """Those of ``--task``, else all that there are, in the order of :data:`FIELDS`."""
    for task in args.task:
        if task not in there:
            raise ValueError(
                f"--task {task}: the detections have no {FIELDS[task]!r}; there "
                f"{'is' if len(there) == 1 else 'are'} {', '.join(there)}"
            )
    return [task for task in FIELDS if task in (args.task or there)]


def _tasks_of_model(cfg: CfgNode) -> list[str]:
    has = {"bbox": True, "segm": cfg.MODEL.MASK_ON, "keypoints": cfg.MODEL.KEYPOINT_ON}
    return [task for task in FIELDS if has[task]]


def _has(detections: Sequence[dict[str, Any]], task: str) -> bool:
    return any(FIELDS[task] in detection for detection in detections)


def _ground_truth(dataset: str, tasks: Sequence[str], keypoints: int) -> dict[str, Any]:
    truth = GroundTruth(
        dataset,
        masks="segm" in tasks,
        keypoints=keypoints if "keypoints" in tasks else 0,
    )
    truth.say()
    return truth.coco.dataset


def _check(args: argparse.Namespace) -> None:
    if args.annotations and not args.detections:
        raise ValueError("--annotations needs --detections, COCO results of the same images")
    if not args.config_file and not args.annotations:
        raise ValueError(
            "name what to analyse: --run, --config-file with MODEL.WEIGHTS, or --detections with "
            "--annotations"
        )
    if args.annotations and args.dataset:
        raise ValueError("--dataset and --annotations both name the ground truth: leave one out")


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no JSON file: {error}") from None


def _read_annotations(file: Path) -> dict[str, Any]:
    dataset = _read_json(file)
    needed = ("images", "categories", "annotations")
    if not isinstance(dataset, dict) or any(name not in dataset for name in needed):
        raise ValueError(
            f"--annotations {file} is no COCO annotation file: it needs {', '.join(needed)}"
        )
    for number, annotation in enumerate(dataset["annotations"], start=1):
        fault = _fault(annotation, ("image_id", "category_id", "bbox")) or _box_fault(annotation)
        if fault:
            raise ValueError(f"--annotations {file}: annotation {number} {fault}")
    return dataset


def _fault(item: Any, fields: Sequence[str]) -> str:
    """What an annotation or detection lacks; "" if nothing."""
    missing = [field for field in fields if not isinstance(item, dict) or field not in item]
    if missing:
        return f"has no {missing[0]!r}"
    return ""


def _box_fault(item: dict[str, Any]) -> str:
    box = item["bbox"]
    if not (isinstance(box, list) and len(box) == 4 and all(map(_is_number, box))):
        return f"needs a bbox of four numbers, got {box!r}"
    return ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _read_detections(file: Path) -> list[dict[str, Any]]:
    found = _read_json(file)
    if not isinstance(found, list):
        raise ValueError(
            f"--detections {file} must be a list of detections in COCO's result format, such as "
            "the coco_instances_results.json of an evaluation"
        )
    for number, detection in enumerate(found, start=1):
        if fault := _fault(detection, ("image_id", "category_id", "score")):
            raise ValueError(f"--detections {file}: detection {number} {fault}")
        if not _is_number(detection["score"]):
            raise ValueError(
                f"--detections {file}: detection {number} needs a score that is a number, got "
                f"{detection['score']!r}"
            )
    return found


def _check_fields(file: Path, found: Sequence[dict[str, Any]], tasks: Sequence[str]) -> None:
    for number, detection in enumerate(found, start=1):
        fault = _fault(detection, [FIELDS[task] for task in tasks])
        if not fault and "bbox" in detection:
            fault = _box_fault(detection)
        if fault:
            raise ValueError(f"--detections {file}: detection {number} {fault}")


def _detect(cfg: CfgNode, dataset: str) -> tuple[list[dict[str, Any]], str]:
    """What a config's model detects on a registered dataset, in COCO's format; and its weights."""
    if cfg.MODEL.META_ARCHITECTURE == "ProposalNetwork":
        raise ValueError(
            "an RPN alone has no classes to analyse; fpn-ext eval gives its average recall"
        )
    if dataset not in DatasetCatalog:
        raise ValueError(
            f"{dataset!r} is not a registered dataset; "
            + did_you_mean(dataset, DatasetCatalog.keys())
        )
    DatasetCatalog.get(dataset)  # COCO-format datasets learn their category ids from their file
    model = Trainer.build_model(cfg)
    checkpoint = CompleteCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    tested = changed(cfg, "DATASETS.TEST", (dataset,))
    check_test_classes(tested, cfg.MODEL.WEIGHTS, checkpoint)
    collected = CollectedDetections(dataset)
    loader = Trainer.build_test_loader(cfg, dataset)
    inference_on_dataset(model_for_inference(cfg, model), loader, collected)
    return collected.detections, described(cfg.MODEL.WEIGHTS, checkpoint)


class CollectedDetections(DatasetEvaluator):
    """Keeps a model's detections, in COCO's result format, without scoring them.

    Attributes:
        detections: so far; ``bbox`` XYWH in pixels of the image.
    """

    def __init__(self, dataset: str):
        to_index = MetadataCatalog.get(dataset).get("thing_dataset_id_to_contiguous_id")
        count = len(MetadataCatalog.get(dataset).thing_classes)
        by_index = {i: c for c, i in to_index.items()} if to_index else {}
        # As in Detectron2's conversion to COCO's format, which ground_truth_of uses.
        self.category_ids = [by_index.get(i, i) for i in range(count)]
        self.detections: list[dict[str, Any]] = []

    def reset(self) -> None:
        self.detections = []

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        for record, output in zip(inputs, outputs, strict=True):
            found = output["instances"].to("cpu")
            classes = int(found.pred_classes.max()) + 1 if len(found) else 0
            if classes > len(self.category_ids):
                raise ValueError(
                    f"the model detects class index {classes - 1}, and the dataset has "
                    f"{len(self.category_ids)} classes: is it the dataset that it was trained on?"
                )
            self.detections += [
                {"image_id": record["image_id"], **annotation}
                for annotation in annotations_of(found, self.category_ids)
            ]

    def evaluate(self) -> dict[str, Any]:
        return {}
