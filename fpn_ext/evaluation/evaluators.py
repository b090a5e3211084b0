"""Selects the evaluator of a dataset, and extends Detectron2's evaluators."""

import itertools
import json
import logging
import math
import os
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    COCOEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    PascalVOCDetectionEvaluator,
)
from detectron2.evaluation.pascal_voc_evaluation import parse_rec, voc_eval
from detectron2.utils import comm

from ..data.class_numbers import trained_classes
from ..data.voc_files import box_fault, read_voc_annotation, voc_box
from ..files.atomic import replacing, write_text
from ..keys import own_keys
from ..registries.architectures import is_architecture
from ..reporting.coco_json import levels_of
from ..reporting.json_files import write_json
from .coco import CocoScores, CocoSettings, evaluate_coco, settings_of
from .ground_truth import GroundTruth
from .mask_recall import MaskProposalRecallEvaluator
from .recall import ProposalRecallEvaluator

logger = logging.getLogger(__name__)

COCO_ONLY = ("AREA_RANGES", "AP_AT", "MAX_DETECTIONS")  # keys of TEST.FPN_EXT


def build_evaluator(cfg: CfgNode, dataset_name: str, output_dir: str | None) -> DatasetEvaluator:
    """The evaluator of a model on a dataset: :func:`build_evaluators` as one."""
    evaluators = build_evaluators(cfg, dataset_name, output_dir)
    return evaluators[0] if len(evaluators) == 1 else DatasetEvaluators(evaluators)


def build_evaluators(
    cfg: CfgNode, dataset_name: str, output_dir: str | None
) -> list[DatasetEvaluator]:
    """The evaluators of a model on a dataset; their ``evaluate`` takes ``img_ids``.

    Detections are scored by the metadata's ``evaluator_type`` (as COCO's if there is none),
    proposals by average recall: those of a standalone RPN (ProposalNetwork), the masks of
    PyramidMaskProposals and, with ``TEST.FPN_EXT.EVALUATE_PROPOSALS``, those inside a two-stage
    model, in addition to its detections. Classes are the model's
    (:func:`fpn_ext.data.class_numbers.trained_classes`).

    Args:
        output_dir: folder for what they write; None to write nothing.

    Raises:
        ValueError: the metadata names an evaluator that this project does not support; the ground
            truth cannot be scored; or a key of the evaluation is invalid.
    """
    evaluator_type = MetadataCatalog.get(dataset_name).get("evaluator_type", "coco")
    if evaluator_type not in ("coco", "pascal_voc"):
        # Not NotImplementedError: DefaultTrainer.test would catch that and skip the evaluation.
        raise ValueError(
            f"dataset {dataset_name!r} asks for evaluator_type {evaluator_type!r}; this project "
            "evaluates 'coco' and 'pascal_voc' (set it in MetadataCatalog, or change DATASETS.TEST)"
        )
    if is_architecture(cfg, "ProposalNetwork"):
        return [ProposalRecallEvaluator(dataset_name, output_dir)]
    if is_architecture(cfg, "PyramidMaskProposals"):
        return [MaskProposalRecallEvaluator(dataset_name)]
    order = trained_classes(cfg)
    if evaluator_type == "coco":
        model = cfg.MODEL
        evaluator = DetectionCOCOEvaluator(
            dataset_name,
            GroundTruth(
                dataset_name,
                order,
                masks=model.MASK_ON,
                keypoints=model.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS if model.KEYPOINT_ON else 0,
            ),
            output_dir=output_dir,
            settings=settings_of(cfg),
            sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS,
        )
    else:
        evaluator = VOCEvaluator(dataset_name, order)
        keys = own_keys(cfg, "TEST")
        if ignored := [key for key in COCO_ONLY if keys[key]]:
            logger.warning(
                "dataset %r is scored as Pascal VOC's: TEST.FPN_EXT.%s, for those scored as "
                "COCO's, has no effect here",
                dataset_name,
                ", TEST.FPN_EXT.".join(ignored),
            )
    if own_keys(cfg, "TEST").EVALUATE_PROPOSALS:
        return [evaluator, ProposalRecallEvaluator(dataset_name, output_dir)]
    return [evaluator]


class DetectionCOCOEvaluator(COCOEvaluator):
    """Detectron2's COCO evaluator for detections, counted by :func:`evaluate_coco`.

    Proposals are evaluated separately. In addition to Detectron2's scores: ``AP50-<class>`` where
    there are several classes, and what ``AREA_RANGES``, ``AP_AT`` and ``MAX_DETECTIONS`` of
    ``TEST.FPN_EXT`` ask for.
    With ``MODEL.FPN_EXT.KEEP_LEVELS``, ``coco_instances_results.json`` also has each detection's
    ``proposal_level`` and ``pooled_level``, which COCO tools ignore.

    Args:
        dataset_name: a registered dataset.
        truth: its ground truth; None to read it.
        output_dir: folder for the detections; None for no files.
        settings: how detections are counted; as COCO does if None.
        sigmas: of the keypoints; COCO's if empty.

    Attributes:
        output_dir: as given.
        notes: what was mended in the ground truth, a sentence each.
    """

    def __init__(
        self,
        dataset_name: str,
        truth: GroundTruth | None = None,
        output_dir: str | None = None,
        settings: CocoSettings | None = None,
        sigmas: Sequence[float] = (),
    ):
        self.settings = settings or CocoSettings()
        limit = max(self.settings.limits)
        truth = truth or GroundTruth(dataset_name)
        truth.say()
        dataset = truth.dataset
        dataset.setdefault("info", {})  # pycocotools 2.0.9 and 2.0.10 ask for it
        # The parent reads a file, and writes one where there is none; it gets an empty one.
        name = f"{dataset_name} as it is scored"
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "empty.json")
            keys = ["images", "categories", *(["annotations"] if "annotations" in dataset else [])]
            write_json(file, {key: [] for key in keys})
            metadata = MetadataCatalog.get(name).set(json_file=str(file))
            try:
                super().__init__(
                    name,
                    max_dets_per_image=None if limit == 100 else limit,
                    kpt_oks_sigmas=sigmas,
                )
            finally:
                MetadataCatalog.remove(name)
        if truth.classes:
            metadata.set(thing_classes=truth.classes)
        if truth.number_of:
            metadata.set(thing_dataset_id_to_contiguous_id=truth.number_of)
        self._metadata, self._truth = metadata, truth.dataset
        self.output_dir = output_dir  # not the parent's, which would write its files in place
        self.notes = truth.notes

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """As the parent's, less ``proposals``, which the parent would score by its own routine."""
        detections = [{k: v for k, v in out.items() if k != "proposals"} for out in outputs]
        done = len(self._predictions)
        super().process(inputs, detections)
        for prediction, output in zip(self._predictions[done:], detections, strict=True):
            levels = levels_of(output["instances"])
            for detection, its_levels in zip(prediction["instances"], levels, strict=True):
                detection.update(its_levels)

    def _eval_predictions(
        self, predictions: list[dict[str, Any]], img_ids: Sequence[int] | None = None
    ) -> None:
        """As the parent's, counted by :func:`evaluate_coco`."""
        if self.output_dir:
            with replacing(Path(self.output_dir, "instances_predictions.pth")) as stream:
                torch.save(predictions, stream)
        detections = list(itertools.chain(*(p["instances"] for p in predictions)))
        self._name_categories(detections)
        if self.output_dir:
            write_text(Path(self.output_dir, "coco_instances_results.json"), json.dumps(detections))
        if not self._do_evaluation:
            logger.info("the annotation file has no annotations: nothing is scored")
            return
        for task in sorted(self._tasks or self._tasks_from_predictions(detections)):
            if task == "keypoints":
                self._check_keypoints(detections)
            scores = (
                evaluate_coco(
                    self._truth, detections, task, self.settings, img_ids, self._kpt_oks_sigmas
                )
                if detections
                else None
            )
            names = self._metadata.get("thing_classes")
            evaluation = scores and scores.as_coco_eval()
            self._results[task] = self._derive_coco_results(evaluation, task, class_names=names)
            if scores:
                self._results[task] |= self._further_scores(scores, names or [])

    def _name_categories(self, detections: list[dict[str, Any]]) -> None:
        """Put the dataset's category ids in place of the class indices."""
        to_index = self._metadata.get("thing_dataset_id_to_contiguous_id")
        if to_index is None:
            return
        ids = {index: category_id for category_id, index in to_index.items()}
        for detection in detections:
            if detection["category_id"] not in ids:
                raise ValueError(
                    f"a detection has class index {detection['category_id']}, and the dataset has "
                    f"{len(ids)} classes; set the number of classes of the model (for Faster R-CNN "
                    f"MODEL.ROI_HEADS.NUM_CLASSES) to {len(ids)}"
                )
            detection["category_id"] = ids[detection["category_id"]]

    def _check_keypoints(self, detections: list[dict[str, Any]]) -> None:
        first = next((a for a in self._truth["annotations"] if "keypoints" in a), None)
        predicted = len(detections[0]["keypoints"]) // 3 if detections else None
        annotated = len(first["keypoints"]) // 3 if first else predicted
        sigmas = len(self._kpt_oks_sigmas) or 17
        if detections and not predicted == annotated == sigmas:
            raise ValueError(
                f"the model finds {predicted} keypoints of an object, the annotations have "
                f"{annotated}, and TEST.KEYPOINT_OKS_SIGMAS has {sigmas} (COCO's 17 if empty): "
                "the three must agree"
            )

    def _further_scores(self, scores: CocoScores, names: Sequence[str]) -> dict[str, float]:
        """The scores that Detectron2 does not name, in percent."""
        further: dict[str, float] = {}
        if len(names) > 1:
            further |= {f"AP50-{name}": scores.ap(0.5, category=c) for c, name in enumerate(names)}
        for size in self.settings.sizes or ():
            further |= {f"AP{size}": scores.ap(size=size), f"AR{size}": scores.ar(size=size)}
        further |= {f"AP{percent}": ap for percent, ap in scores.further.items()}
        if self.settings.ar_by_limit:
            further |= {f"AR@{limit}": scores.ar(limit) for limit in scores.limits}
        return {name: 100 * value for name, value in further.items()}


class VOCEvaluator(PascalVOCDetectionEvaluator):
    """Detectron2's Pascal VOC evaluator, with AP and AP50 per class and without degenerate boxes.

    Matching and AP are Detectron2's ``voc_eval``. AP is the mean over IoU 0.50:0.05:0.95. Boxes
    without width or height, which :func:`fpn_ext.data.datasets.load_voc_layout` drops from
    training, are dropped from the ground truth too: no detection could match them.

    Args:
        dataset_name: a registered dataset in Pascal VOC's layout.
        class_names: by their numbers in the model; () for the dataset's own.
    """

    def __init__(self, dataset_name: str, class_names: Sequence[str] = ()):
        super().__init__(dataset_name)
        if class_names:
            self._class_names = list(class_names)

    def evaluate(self, img_ids: Sequence[str] | None = None) -> OrderedDict | None:
        """``{"bbox": {"AP", "AP50", "AP75", "AP-<class>", "AP50-<class>", ...}}`` in percent.

        A class without ground truth is NaN and excluded from the means.

        Args:
            img_ids: the images to score, as in COCOEvaluator; None for the whole dataset.
        """
        gathered = comm.gather(self._predictions, dst=0)
        if not comm.is_main_process():
            return None
        predictions: dict[int, list[str]] = defaultdict(list)
        for of_one_process in gathered:
            for class_number, lines in of_one_process.items():
                predictions[class_number].extend(lines)

        thresholds = range(50, 100, 5)
        ap = np.full((len(self._class_names), len(thresholds)), math.nan)
        if img_ids is None:
            img_ids = Path(self._image_set_path).read_text().split()
        with tempfile.TemporaryDirectory() as folder:
            image_list = Path(folder, "images")  # class files have a suffix, so no clash
            image_list.write_text("\n".join(img_ids))
            classes_with_boxes = self._copy_ground_truth(img_ids, Path(folder))
            for c, name in enumerate(self._class_names):
                if name not in classes_with_boxes:
                    continue
                Path(folder, f"{name}.txt").write_text("\n".join(predictions[c]))
                for t, threshold in enumerate(thresholds):
                    _, _, class_ap = voc_eval(
                        os.path.join(folder, "{}.txt"),
                        os.path.join(folder, "{}.xml"),
                        str(image_list),
                        name,
                        ovthresh=threshold / 100,
                        use_07_metric=self._is_2007,
                    )
                    ap[c, t] = class_ap * 100
            parse_rec.cache_clear()  # it caches by file, and these files are gone

        box = {"AP": _mean(ap), "AP50": _mean(ap[:, 0]), "AP75": _mean(ap[:, 5])}
        for c, name in enumerate(self._class_names):
            box[f"AP-{name}"] = _mean(ap[c])
            box[f"AP50-{name}"] = _mean(ap[c, :1])
        return OrderedDict(bbox=box)

    def _copy_ground_truth(self, img_ids: Sequence[str], folder: Path) -> set[str]:
        """Write the annotations for ``voc_eval``, less the degenerate boxes.

        ``voc_eval`` requires fields that some files lack, and integer coordinates.
        Returns the classes that have ground-truth boxes.
        """
        classes = set()
        for image_id in img_ids:
            file = Path(self._anno_file_template.format(image_id))
            copy = ElementTree.Element("annotation")
            for element in read_voc_annotation(file).findall("object"):
                box = voc_box(element, file)
                if box_fault(box):
                    continue
                name = element.findtext("name", "")
                difficult = element.findtext("difficult", "0").strip()
                if difficult != "1":
                    classes.add(name)
                item = ElementTree.SubElement(copy, "object")
                fields = {"name": name, "pose": "", "truncated": "0", "difficult": difficult}
                for field, text in fields.items():
                    ElementTree.SubElement(item, field).text = text or "0"
                corners = ElementTree.SubElement(item, "bndbox")
                for corner, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True):
                    ElementTree.SubElement(corners, corner).text = str(round(value))
            (folder / f"{image_id}.xml").write_bytes(ElementTree.tostring(copy))
        return classes


def _mean(values: np.ndarray) -> float:
    """Mean of the values that are not NaN; NaN if there are none."""
    return math.nan if np.isnan(values).all() else float(np.nanmean(values))
