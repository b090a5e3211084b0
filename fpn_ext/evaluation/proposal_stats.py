"""Statistics of a proposal file: average recall, boxes per image."""

import os
from collections.abc import Mapping

import numpy as np

from ..proposals.detectron2_pickle import open_proposals
from .ground_truth import ground_truth_of
from .recall import LIMITS, as_table, average_recall


def proposal_stats(file: str | os.PathLike, dataset_name: str) -> dict[str, float]:
    """Average recall and number of the proposals in a file, for a dataset with ground truth.

    Returns:
        Average recall in percent (:func:`fpn_ext.evaluation.recall.average_recall`), of all, small,
        medium and large objects, NaN if there are none: ``"AR@10"``, ``"ARs@10"``, ...,
        ``"ARl@1000"``. Then, over the images of the dataset, ``"boxes per image"`` (mean), ``"min
        boxes"`` and ``"max boxes"``, and ``"images with boxes"`` in percent.

    Raises:
        FileNotFoundError, ValueError: the file cannot be read, or has non-finite values.
    """
    proposals = open_proposals(file)
    ground_truth = ground_truth_of(dataset_name)
    best = {
        image_id: [array[: max(LIMITS)] for array in proposals[image_id]]
        for image_id in ground_truth.imgs
        if image_id in proposals
    }
    boxes = {image_id: of_image for image_id, (of_image, _) in best.items()}
    scores = {image_id: of_image for image_id, (_, of_image) in best.items()}
    counts = [len(proposals[i][1]) if i in proposals else 0 for i in ground_truth.imgs]
    return average_recall(ground_truth, boxes, scores) | {
        "boxes per image": float(np.mean(counts)),
        "min boxes": min(counts),
        "max boxes": max(counts),
        "images with boxes": 100 * float(np.count_nonzero(counts)) / len(counts),
    }


def as_text(stats: Mapping[str, float]) -> str:
    """The result of :func:`proposal_stats` as a table."""
    return (
        f"{as_table(stats)}\n\n{stats['boxes per image']:.1f} boxes per image "
        f"({stats['min boxes']} to {stats['max boxes']}); "
        f"{stats['images with boxes']:.1f}% of the images have boxes"
    )
