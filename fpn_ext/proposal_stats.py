"""How good and how many the proposals in a file are: average recall, boxes per image."""

import os

import numpy as np

from .proposal_pickle import open_proposals
from .recall import LIMITS, average_recall, ground_truth_of


def proposal_stats(file: str | os.PathLike, dataset_name: str) -> dict[str, float]:
    """How good and how many the proposals in a file are, for a dataset with ground truth.

    Returns:
        Average recall in percent (:func:`fpn_ext.recall.average_recall`), of all, small, medium and
        large objects, NaN where there are none: ``"AR@10"``, ``"ARs@10"``, ..., ``"ARl@1000"``.
        Then, over the images of the dataset, ``"boxes per image"`` (mean), ``"fewest boxes"`` and
        ``"most boxes"``, and ``"images with boxes"``, in percent.

    Raises:
        FileNotFoundError, ValueError: the file cannot be read, or has values that are not finite.
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
    stats: dict[str, float] = {}
    for limit in LIMITS:
        stats |= average_recall(ground_truth, boxes, scores, limits=(limit,))
    counts = [len(proposals[i][1]) if i in proposals else 0 for i in ground_truth.imgs]
    stats |= {
        "boxes per image": float(np.mean(counts)),
        "fewest boxes": min(counts),
        "most boxes": max(counts),
        "images with boxes": 100 * float(np.count_nonzero(counts)) / len(counts),
    }
    return stats
