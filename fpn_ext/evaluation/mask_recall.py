"""Average recall (AR) of masks, as COCO defines it and Table 6 of the FPN paper reports it.

As :mod:`.recall`, with the IoU of masks instead of boxes.
"""

import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.logger import create_small_table
from pycocotools import mask
from pycocotools.coco import COCO

from .ground_truth import GroundTruth
from .recall import by_limit, check_areas, numbered_from_one, of_images, recall_by_area

logger = logging.getLogger(__name__)

LIMITS = (10, 100, 1000)
LOWEST_IOU = 0.5  # of COCO's thresholds


class Mask(NamedTuple):
    """One of the proposals of an image.

    Attributes:
        rank: how many proposals of the image are better.
        score: the higher the better.
        run_lengths: pycocotools' ``{"size": [height, width], "counts": bytes}``.
    """

    rank: int
    score: float
    run_lengths: dict[str, Any]


def mask_average_recall(
    ground_truth: COCO,
    masks: Mapping[Any, Sequence[Mask]],
    limits: Sequence[int] = LIMITS,
) -> dict[str, float]:
    """AR of class-agnostic masks over all images of ``ground_truth``, in percent.

    Args:
        ground_truth: with a mask of each object, and of images with ``height`` and ``width``; not
            modified. Crowd regions are ignored.
        masks: by image id, in any order; those that overlap no object may be left out. If an image
            is omitted, all its objects count as missed.
        limits: numbers of top-scoring masks per image to count.

    Returns:
        ``{"AR@10", "ARs@10", ..., "ARl@1000"}``, as :func:`.recall.average_recall`.

    Raises:
        ValueError: a limit is below 1, masks are of an image that ``ground_truth`` lacks, or an
            annotation has no ``area``.
    """
    if not limits or min(limits) < 1:
        raise ValueError(f"limits must be numbers of masks, each at least 1, got {limits}")
    unknown = sorted(set(masks) - set(ground_truth.imgs), key=str)
    if unknown:
        raise ValueError(f"no image of the ground truth has the id {unknown[0]!r}")
    check_areas(ground_truth)
    annotations = ground_truth.dataset.get("annotations", [])
    truth = numbered_from_one(ground_truth, annotations, masks=True)
    return by_limit(
        {
            limit: recall_by_area(truth, _results(truth, masks, limit), limit, "segm")
            for limit in sorted(limits)
        }
    )


def best_masks(
    found: np.ndarray, scores: np.ndarray, objects: Sequence[dict[str, Any]], limit: int
) -> list[Mask]:
    """The best masks of an image, less those that match no object at any threshold of COCO's.

    Leaving these out changes no recall, and saves most of the memory and time.

    Args:
        found: (R, H, W) bool.
        scores: (R,).
        objects: the image's, with ``segmentation``, pycocotools' run lengths, and ``iscrowd``.
        limit: how many of the masks count.
    """
    best = np.argsort(-scores, kind="stable")[:limit]  # as COCOeval sorts them
    if not len(best) or not objects:
        return []
    encoded = [mask.encode(np.asfortranarray(found[row].astype(np.uint8))) for row in best]
    overlaps = mask.iou(
        encoded, [o["segmentation"] for o in objects], [o["iscrowd"] for o in objects]
    )
    return [
        Mask(rank, float(scores[best[rank]]), encoded[rank])
        for rank in np.flatnonzero(overlaps.max(axis=1) >= LOWEST_IOU).tolist()
    ]


class MaskProposalRecallEvaluator(DatasetEvaluator):
    """AR of a model's masks of any class, over a dataset and all processes.

    Args:
        dataset_name: a registered dataset, each object with a mask.

    Raises:
        ValueError: no such dataset, or an object without a mask.
        FileNotFoundError: its files are not there.
    """

    def __init__(self, dataset_name: str):
        truth = GroundTruth(dataset_name, masks=True)
        truth.say()
        self.notes = truth.notes
        self.ground_truth = truth.coco
        annotations = self.ground_truth.dataset.get("annotations", [])
        self._truth = numbered_from_one(self.ground_truth, annotations, masks=True)
        self.reset()

    def reset(self) -> None:
        self._masks: dict[Any, list[Mask]] = {}

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Collect ``instances`` of each output: ``pred_masks`` (R, H, W) and ``scores`` (R,).

        Masks have the size of the image file.

        Raises:
            ValueError: an output has no masks.
        """
        for image, output in zip(inputs, outputs, strict=True):
            found = output.get("instances")
            if found is None or not found.has("pred_masks"):
                raise ValueError(
                    f"the model's outputs hold {list(output)}, no 'instances' with 'pred_masks'"
                )
            self._masks[image["image_id"]] = best_masks(
                found.pred_masks.cpu().numpy(),
                found.scores.float().cpu().numpy(),
                self._truth.imgToAnns[image["image_id"]],
                max(LIMITS),
            )

    def evaluate(self, img_ids: Sequence[Any] | None = None) -> OrderedDict | None:
        """``{"mask_proposals": {"AR@10", ..., "ARl@1000"}}`` in percent.

        None in all processes but the main one; empty for a dataset without annotations.

        Args:
            img_ids: the images to be scored, as COCOEvaluator's; None for all of the dataset.
        """
        comm.synchronize()
        gathered = comm.gather(self._masks, dst=0)
        if not comm.is_main_process():
            return None
        masks = {i: m for of_one_process in gathered for i, m in of_one_process.items()}
        if "annotations" not in self.ground_truth.dataset:
            logger.info("No annotations to score the masks with.")
            return OrderedDict()
        truth = self.ground_truth
        if img_ids is not None:
            truth = of_images(truth, img_ids)
            masks = {i: masks[i] for i in masks if i in truth.imgs}
        recall = mask_average_recall(truth, masks)
        logger.info("Average recall of masks:\n%s", create_small_table(recall))
        return OrderedDict(mask_proposals=recall)


def _results(truth: COCO, masks: Mapping[Any, Sequence[Mask]], limit: int) -> list[dict[str, Any]]:
    """The masks among the ``limit`` best of their image, as COCO's results."""
    category = min(truth.cats, default=0)  # COCOeval requires one and ignores it
    counted = [(i, m) for i, of_image in masks.items() for m in of_image if m.rank < limit]
    return [
        {
            "id": number,
            "image_id": image_id,
            "category_id": category,
            "segmentation": one.run_lengths,
            "area": float(mask.area(one.run_lengths)),
            "score": one.score,
        }
        for number, (image_id, one) in enumerate(counted, start=1)
    ]
