"""Average recall (AR) of proposals, as COCO defines it and Table 1 of the FPN paper reports it.

At each IoU threshold 0.50, 0.55, ..., 0.95: the fraction of objects, of any class, matched by the
``limit`` best boxes of their image. AR@limit is the mean over the thresholds. Matching is done by
pycocotools; docs/evidence/average_recall.md explains how Detectron2's own routine differs.
"""

import contextlib
import io
import logging
import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import GeneralizedRCNN, ProposalNetwork
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Instances
from detectron2.utils import comm
from pycocotools import mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

from ..keys import declare, own_keys
from ..proposals.file import write_proposals
from ..unwrap import unwrapped
from .coco import as_coco
from .ground_truth import ground_truth_of

declare(
    "TEST.FPN_EXT.EVALUATE_PROPOSALS",
    False,
    "Evaluations also score the proposals of a two-stage model's RPN, by their average "
    "recall. An RPN alone (ProposalNetwork) is always scored.",
    "evaluation",
)

logger = logging.getLogger(__name__)

LIMITS = (10, 100, 1000)
AREA_SUFFIXES = ("", "s", "m", "l")  # of pycocotools' ranges: all, small, medium, large


def average_recall(
    ground_truth: COCO,
    boxes: Mapping[Any, np.ndarray],
    scores: Mapping[Any, np.ndarray],
    limits: Sequence[int] = LIMITS,
) -> dict[str, float]:
    """AR of class-agnostic boxes over all images of ``ground_truth``, in percent.

    Args:
        ground_truth: not modified. Crowd regions are ignored.
        boxes: by image id, (R, 4) XYXY in pixels of the image file. If an image is omitted, all its
            objects count as missed.
        scores: by image id, (R,): the higher the better.
        limits: numbers of top-scoring boxes per image to count.

    Returns:
        At each limit, ``{"AR@1000", "ARs@1000", "ARm@1000", "ARl@1000"}``: over all objects, and
        over small, medium and large ones (by the annotation's ``area``: up to 32², up to 96²,
        above). NaN if there are no objects.

    Raises:
        ValueError: boxes and scores do not match, are not finite, or belong to an image that is not
            in ``ground_truth``; an annotation has no ``area``; a limit is below 1.
    """
    if not limits or min(limits) < 1:
        raise ValueError(f"limits must be numbers of boxes, each at least 1, got {limits}")
    found = _checked(ground_truth, boxes, scores)
    truth = numbered_from_one(ground_truth, ground_truth.dataset.get("annotations", []))
    return by_limit(
        {
            limit: recall_by_area(truth, _results(truth, found, limit), limit, "bbox")
            for limit in sorted(limits)
        }
    )


def average_recall_by_class(
    ground_truth: COCO,
    boxes: Mapping[Any, np.ndarray],
    scores: Mapping[Any, np.ndarray],
    limit: int = LIMITS[-1],
) -> dict[str, float]:
    """``{"AR@1000-<class>": ...}``: :func:`average_recall` over the objects of one class.

    Proposals are class-agnostic: all of them count towards ``limit``.
    """
    found = _checked(ground_truth, boxes, scores)
    annotations = ground_truth.dataset.get("annotations", [])
    result = {}
    for category in ground_truth.dataset.get("categories", []):
        of_class = [a for a in annotations if a["category_id"] == category["id"]]
        truth = numbered_from_one(ground_truth, of_class)
        results = _results(truth, found, limit)
        by_area = recall_by_area(truth, results, limit, "bbox")
        result[f"AR@{limit}-{category['name']}"] = by_area[0]
    return result


class ProposalRecallEvaluator(DatasetEvaluator):
    """AR of the proposals in a model's outputs, over a dataset and all processes.

    It scores the outputs of a standalone RPN (ProposalNetwork), and the proposals that
    :func:`model_with_proposals` adds to the outputs of a two-stage model.

    Args:
        dataset_name: a registered dataset.
        output_dir: folder for ``box_proposals.safetensors``, a proposal file
            (:mod:`fpn_ext.proposals.file`); None to write none.
    """

    def __init__(self, dataset_name: str, output_dir: str | os.PathLike | None = None):
        self.dataset_name = dataset_name
        self.ground_truth = ground_truth_of(dataset_name)
        self.output_dir = output_dir
        self.reset()

    def reset(self) -> None:
        self._boxes: dict[Any, np.ndarray] = {}
        self._scores: dict[Any, np.ndarray] = {}

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Collect the ``proposals`` of each output: Instances in pixels of the image file.

        Raises:
            ValueError: an output has none.
        """
        for image, output in zip(inputs, outputs, strict=True):
            if "proposals" not in output:
                raise ValueError(
                    f"the model's outputs hold {list(output)}, no 'proposals': give the evaluation "
                    "what fpn_ext.evaluation.recall.model_with_proposals makes of the model"
                )
            proposals = output["proposals"]
            self._boxes[image["image_id"]] = proposals.proposal_boxes.tensor.float().cpu().numpy()
            self._scores[image["image_id"]] = proposals.objectness_logits.float().cpu().numpy()

    def evaluate(self, img_ids: Sequence[Any] | None = None) -> OrderedDict | None:
        """``{"box_proposals": {"AR@10", "ARs@10", ..., "AR@1000-<class>", ...}}`` in percent.

        None in all processes but the main one; empty for a dataset without annotations.

        Args:
            img_ids: the images to be scored, as COCOEvaluator's; None for all of the dataset.
        """
        comm.synchronize()
        gathered = comm.gather((self._boxes, self._scores), dst=0)
        if not comm.is_main_process():
            return None
        boxes = {i: b for of_one_process, _ in gathered for i, b in of_one_process.items()}
        scores = {i: s for _, of_one_process in gathered for i, s in of_one_process.items()}
        if self.output_dir is not None:
            write_proposals(
                Path(self.output_dir, "box_proposals.safetensors"),
                boxes,
                [(boxes[image_id], scores[image_id]) for image_id in boxes],
                dataset=self.dataset_name,
                source="the RPN of an evaluated model",
            )
        if "annotations" not in self.ground_truth.dataset:
            logger.info("No annotations to score the proposals with.")
            return OrderedDict()
        truth = self.ground_truth
        if img_ids is not None:
            truth = of_images(truth, img_ids)
            boxes, scores = ({i: a[i] for i in a if i in truth.imgs} for a in (boxes, scores))
        recall = average_recall(truth, boxes, scores)
        by_class = average_recall_by_class(truth, boxes, scores)
        logger.info("Average recall of box proposals:\n%s", as_table(recall))
        logger.info(
            "Average recall of box proposals by class:\n%s",
            "\n".join(f"{key}: {value:.3f}" for key, value in by_class.items()),
        )
        return OrderedDict(box_proposals={**recall, **by_class})


def of_images(ground_truth: COCO, img_ids: Sequence[Any]) -> COCO:
    """Some of the images, with their objects."""
    images = [ground_truth.imgs[image_id] for image_id in img_ids]
    annotations = [a for image_id in img_ids for a in ground_truth.imgToAnns[image_id]]
    return as_coco({**ground_truth.dataset, "images": images, "annotations": annotations})


def model_with_proposals(cfg: CfgNode, model: Any) -> nn.Module:
    """The model, wrapped if ``TEST.FPN_EXT.EVALUATE_PROPOSALS`` is set.

    The wrapper adds ``proposals`` to each output: those of the model's RPN, in the form that a
    standalone RPN (ProposalNetwork) returns. A ProposalNetwork is not wrapped.

    Args:
        cfg: the config the model was built from.
        model: a Detectron2 model, the result of ``optimize_for_inference``, or a model wrapped in
            DistributedDataParallel.

    Raises:
        TypeError: the key is set but the model makes no proposals.
    """
    inner = unwrapped(model)
    if not own_keys(cfg, "TEST").EVALUATE_PROPOSALS or isinstance(inner, ProposalNetwork):
        return model
    if not isinstance(inner, GeneralizedRCNN) or inner.proposal_generator is None:
        raise TypeError(
            "TEST.FPN_EXT.EVALUATE_PROPOSALS needs a model with an RPN (a GeneralizedRCNN without "
            f"precomputed proposals, or a ProposalNetwork), got {type(inner).__name__}"
        )
    return _ProposalKeepingModel(inner)


class _ProposalKeepingModel(nn.Module):
    def __init__(self, model: GeneralizedRCNN):
        super().__init__()
        self.model = model
        self.training = model.training  # evaluation restores this mode, also in the model

    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        proposals: list[Instances] = []

        def keep(module: nn.Module, inputs: Any, outputs: tuple[list[Instances], Any]) -> None:
            proposals.extend(outputs[0])

        hook = self.model.proposal_generator.register_forward_hook(keep)
        try:
            results = self.model(batched_inputs)
        finally:
            hook.remove()
        return [
            {**result, "proposals": _in_pixels_of_the_file(found, image)}
            for result, found, image in zip(results, proposals, batched_inputs, strict=True)
        ]


def _in_pixels_of_the_file(proposals: Instances, image: dict[str, Any]) -> Instances:
    height, width = proposals.image_size  # of the input; the boxes are scaled in place
    return detector_postprocess(proposals, image.get("height", height), image.get("width", width))


def _checked(
    ground_truth: COCO, boxes: Mapping[Any, np.ndarray], scores: Mapping[Any, np.ndarray]
) -> dict[Any, tuple[np.ndarray, np.ndarray]]:
    """(R, 4) boxes in COCO's XYWH and (R,) scores of each image, float64."""
    different = set(boxes) ^ set(scores)
    if different:
        raise ValueError(f"boxes and scores are not of the same images: {_some(different)}")
    unknown = set(boxes) - set(ground_truth.imgs)
    if unknown:
        raise ValueError(f"no image of the ground truth has the id {_some(unknown)}")
    check_areas(ground_truth)
    found = {}
    for image_id in boxes:
        corners = np.asarray(boxes[image_id], dtype=np.float64)
        image_scores = np.asarray(scores[image_id], dtype=np.float64)
        if corners.shape != (len(image_scores), 4) or image_scores.ndim != 1:
            raise ValueError(
                f"image {image_id!r} needs (R, 4) boxes and (R,) scores, got {corners.shape} and "
                f"{image_scores.shape}"
            )
        if not (np.isfinite(corners).all() and np.isfinite(image_scores).all()):
            raise ValueError(f"image {image_id!r} has boxes or scores that are NaN or infinite")
        sides = corners[:, 2:] - corners[:, :2]
        found[image_id] = (np.concatenate([corners[:, :2], sides], axis=1), image_scores)
    return found


def check_areas(ground_truth: COCO) -> None:
    """Raise ValueError if an annotation has no ``area``."""
    no_area = [a["id"] for a in ground_truth.dataset.get("annotations", []) if "area" not in a]
    if no_area:
        raise ValueError(
            f"{len(no_area)} annotation(s) without 'area', which COCO's format asks for (width "
            f"times height of the box, if there is no mask), id {_some(no_area)}"
        )


def _some(values: Iterable[Any], most: int = 5) -> str:
    first, *others = sorted(values, key=str)
    shown = ", ".join(repr(v) for v in (first, *others[: most - 1]))
    return shown + (", ..." if len(others) >= most else "")


def numbered_from_one(
    ground_truth: COCO, annotations: Iterable[dict[str, Any]], masks: bool = False
) -> COCO:
    """The same images with the given annotations, renumbered from 1 in order.

    COCOeval uses annotation ids as match flags: id 0 would never count as matched, and duplicate
    ids (some older minival files have them) collide. It also modifies the annotations.

    Args:
        masks: keep the objects' masks, as pycocotools' run lengths.
    """
    copies = [
        {
            "id": number,
            "image_id": annotation["image_id"],
            "category_id": annotation["category_id"],
            "bbox": annotation["bbox"],
            "area": annotation["area"],
            "iscrowd": annotation.get("iscrowd", 0),
            **({"segmentation": ground_truth.annToRLE(annotation)} if masks else {}),
        }
        for number, annotation in enumerate(annotations, start=1)
    ]
    categories = [{"id": c} for c in sorted({copy["category_id"] for copy in copies})]
    images = ground_truth.dataset["images"]
    return as_coco({"images": images, "categories": categories, "annotations": copies})


def _results(
    truth: COCO, found: Mapping[Any, tuple[np.ndarray, np.ndarray]], limit: int
) -> list[dict[str, Any]]:
    """The best boxes of each image, as COCO's results.

    Most proposals overlap no object enough to match at any threshold. Dropping them does not change
    recall, and saves most of the memory and time of COCOeval, a Python loop.
    """
    lowest = min(COCOeval(iouType="bbox").params.iouThrs)
    category = min(truth.cats, default=0)  # COCOeval requires one and ignores it
    results: list[dict[str, Any]] = []
    for image_id, (boxes, scores) in found.items():
        objects = truth.imgToAnns[image_id]
        best = np.argsort(-scores, kind="stable")[:limit]  # as COCOeval sorts them
        if not objects or not len(best):
            continue
        overlaps = mask.iou(
            boxes[best], [o["bbox"] for o in objects], [o["iscrowd"] for o in objects]
        )
        for row in best[overlaps.max(axis=1) >= lowest].tolist():
            results.append(
                {
                    "id": len(results) + 1,
                    "image_id": image_id,
                    "category_id": category,
                    "bbox": boxes[row].tolist(),
                    "area": float(boxes[row, 2] * boxes[row, 3]),
                    "score": float(scores[row]),
                }
            )
    return results


def recall_by_area(
    truth: COCO, results: list[dict[str, Any]], limit: int, iou_type: str
) -> list[float]:
    """AR in percent, NaN without ground truth, of all, small, medium and large objects.

    Args:
        truth: from :func:`numbered_from_one`.
        results: as in COCO's result files, with ids from 1 and ``area``; at most ``limit`` of an
            image.
        iou_type: ``"bbox"`` or ``"segm"``.
    """
    evaluation = COCOeval(truth, iouType=iou_type)
    evaluation.params.useCats = 0
    evaluation.params.maxDets = [limit]
    evaluation.cocoDt = as_coco({"images": truth.dataset["images"], "annotations": results})
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
        evaluation.accumulate()
    recall = evaluation.eval["recall"][:, 0, :, 0]  # (thresholds, areas), -1 without ground truth
    return np.where(recall < 0, np.nan, 100 * recall).mean(axis=0).tolist()


def by_limit(recall: Mapping[int, Sequence[float]]) -> dict[str, float]:
    """``{"AR@10", "ARs@10", ..., "ARl@1000"}`` from :func:`recall_by_area` at each limit."""
    return {
        f"AR{suffix}@{limit}": value
        for limit, by_area in recall.items()
        for suffix, value in zip(AREA_SUFFIXES, by_area, strict=True)
    }


def as_table(recall: Mapping[str, float], limits: Sequence[int] = LIMITS) -> str:
    """The result of :func:`average_recall`: a row a limit, a column a size."""
    lines = ["limit" + "".join(f"{area:>9}" for area in ("all", "small", "medium", "large"))]
    for limit in limits:
        values = [recall[f"AR{suffix}@{limit}"] for suffix in AREA_SUFFIXES]
        lines.append(f"{limit:5}" + "".join(f"{value:9.2f}" for value in values))
    return "\n".join(lines)
