"""Sources of proposals: an RPN, selective search, or the ground truth.

Each function writes one file (:mod:`fpn_ext.proposals.file`) for one dataset, with an entry for
every image, including those without annotations.
"""

import ctypes
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader, get_detection_dataset_dicts
from detectron2.data.detection_utils import check_image_size, read_image
from detectron2.evaluation.evaluator import inference_context
from detectron2.modeling import ProposalNetwork
from detectron2.structures import BoxMode
from detectron2.utils.logger import log_every_n_seconds
from torch.utils.data import SequentialSampler

from ..data.datasets import check_registered, register_datasets
from ..data.mapper import PictureMapper
from ..data.shared_memory import check_shared_memory
from ..unwrap import unwrapped
from .detectron2_pickle import summary
from .file import BoxesAndScores, write_proposals

logger = logging.getLogger(__name__)

# The paper's number for training, Sec. 5.2.
TOP_K = 2000
# As for the ground truth that Detectron2 adds to proposals: a probability just below 1.
GROUND_TRUTH_SCORE = math.log((1 - 1e-10) / 1e-10)


def generate_proposals(
    cfg: CfgNode, model: Any, dataset_name: str, file: str | os.PathLike, top_k: int = TOP_K
) -> None:
    """Write the proposals of a model's RPN for a training or test set, at test-time image size.

    Boxes are scaled to the original image, clipped to it, and dropped if empty, by Detectron2's
    ``detector_postprocess``.

    Args:
        cfg: the config the model was built from; ``INPUT`` sets the image size, and
            ``MODEL.WEIGHTS`` is recorded in the file as the model's origin.
        model: a trained ProposalNetwork or GeneralizedRCNN, in any mode.
        dataset_name: a registered dataset, not necessarily in ``cfg.DATASETS``.
        file: target, replaced if it exists.
        top_k: max proposals per image; also limited by ``MODEL.RPN.POST_NMS_TOPK_TEST``, with a log
            message if that is lower.

    Raises:
        TypeError: the model has no RPN.
        ValueError: ``top_k`` below 1.
    """
    check_top_k(top_k)
    rpn = _rpn_of(model)
    limit = cfg.MODEL.RPN.POST_NMS_TOPK_TEST
    if limit < top_k:
        logger.warning(
            "top_k is %d, but the RPN gives no more than MODEL.RPN.POST_NMS_TOPK_TEST %d proposals "
            "per image; raise it for more",
            top_k,
            limit,
        )
    check_shared_memory(cfg)
    records = _records(dataset_name)
    loader = build_detection_test_loader(
        records,
        mapper=PictureMapper(cfg, False),
        sampler=SequentialSampler(records),  # all images, even with several processes
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )
    write_proposals(
        file,
        (record["image_id"] for record in records),
        _infer(rpn, loader, top_k),
        dataset=dataset_name,
        source=_describe(cfg, top_k),
    )


def ground_truth_proposals(dataset_name: str, file: str | os.PathLike) -> None:
    """Write the ground truth as proposals, which give an upper bound of the box head's AP.

    Boxes are clipped to the image; crowd regions and boxes without area are dropped. All get the
    score of ground truth among Detectron2's proposals, ``GROUND_TRUTH_SCORE``.

    Raises:
        ValueError: the dataset has no annotations, or an image no width and height.
    """
    records = _records(dataset_name)
    if not any("annotations" in record for record in records):
        raise ValueError(f"dataset {dataset_name!r} has no annotations")
    write_proposals(
        file,
        (record["image_id"] for record in records),
        map(_ground_truth, records),
        dataset=dataset_name,
        source="ground truth without crowd regions",
    )


def selective_search_proposals(
    dataset_name: str, file: str | os.PathLike, top_k: int = TOP_K, quality: bool = False
) -> None:
    """Write the proposals of OpenCV's selective search (Uijlings et al., IJCV 2013).

    It ranks boxes without scores: the first box gets the score 0, the second -1, and so on. The
    ranking is partly random by design; here it is seeded, the same in every run.

    Args:
        top_k: max proposals per image.
        quality: use "quality" mode, with more segmentations than "fast": several times the boxes
            and the time.

    Raises:
        ImportError: OpenCV's contributed modules are not installed; says how to get them.
        ValueError: ``top_k`` below 1.
    """
    check_top_k(top_k)
    segmentation = _segmentation()
    records = _records(dataset_name)
    mode = "quality" if quality else "fast"
    write_proposals(
        file,
        (record["image_id"] for record in records),
        (
            _selective_search(segmentation, record, top_k, quality)
            for record in _with_progress(records, len(records))
        ),
        dataset=dataset_name,
        source=f"selective search, {mode} mode, top_k {top_k}",
    )


def check_top_k(top_k: int) -> None:
    """Raise ValueError for a number of proposals below 1."""
    if top_k < 1:
        raise ValueError(f"top_k (--top-k) must be at least 1, got {top_k}")


def _records(dataset_name: str) -> list[dict[str, Any]]:
    return get_detection_dataset_dicts(dataset_name, filter_empty=False)


def _with_progress(items: Iterable[Any], total: int) -> Iterator[Any]:
    for done, item in enumerate(items, start=1):
        yield item
        log_every_n_seconds(logging.INFO, f"proposals for {done} of {total} images", n=30)


# RPN


def _rpn_of(model: Any) -> ProposalNetwork:
    """The backbone and RPN of a model, sharing its weights."""
    model = unwrapped(model)
    if getattr(model, "proposal_generator", None) is None:
        raise TypeError(
            f"this {type(model).__name__} has no RPN; proposals come from a ProposalNetwork, or "
            "from a GeneralizedRCNN whose MODEL.PROPOSAL_GENERATOR.NAME is not PrecomputedProposals"
        )
    rpn = ProposalNetwork(
        backbone=model.backbone,
        proposal_generator=model.proposal_generator,
        pixel_mean=model.pixel_mean.flatten().tolist(),
        pixel_std=model.pixel_std.flatten().tolist(),
    )
    return rpn.to(model.pixel_mean.device)


def _infer(rpn: ProposalNetwork, loader: Any, top_k: int) -> Iterator[BoxesAndScores]:
    with inference_context(rpn):
        for batch in _with_progress(loader, len(loader)):
            with torch.no_grad():
                (output,) = rpn(batch)
            found = output["proposals"][:top_k].to("cpu")
            yield (
                found.proposal_boxes.tensor.float().numpy(),
                found.objectness_logits.float().numpy(),
            )


def _describe(cfg: CfgNode, top_k: int) -> str:
    model, sizes = cfg.MODEL, cfg.INPUT
    return (
        f"RPN of MODEL.WEIGHTS {model.WEIGHTS or '(none: random weights)'}: "
        f"{model.META_ARCHITECTURE}, {model.BACKBONE.NAME}, {model.PROPOSAL_GENERATOR.NAME}; "
        f"INPUT.MIN_SIZE_TEST {sizes.MIN_SIZE_TEST}, MAX_SIZE_TEST {sizes.MAX_SIZE_TEST}; "
        f"MODEL.RPN.PRE_NMS_TOPK_TEST {model.RPN.PRE_NMS_TOPK_TEST}, "
        f"POST_NMS_TOPK_TEST {model.RPN.POST_NMS_TOPK_TEST}, NMS_THRESH {model.RPN.NMS_THRESH}; "
        f"top_k {top_k}"
    )


# Ground truth


def _ground_truth(record: dict[str, Any]) -> BoxesAndScores:
    boxes = np.array(
        [
            BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
            for annotation in record.get("annotations", ())
            if not annotation.get("iscrowd", 0)
        ],
        dtype=np.float32,
    ).reshape(-1, 4)
    if "height" not in record or "width" not in record:
        raise ValueError(
            f"image id {record['image_id']!r}: the dataset does not tell its width and height"
        )
    height, width = record["height"], record["width"]
    boxes = boxes.clip(0, np.array([width, height, width, height], dtype=np.float32))
    has_area = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    if not has_area.all():
        logger.warning(
            "image id %r: %d ground truth boxes have no area in the image and are left out",
            record["image_id"],
            (~has_area).sum(),
        )
    boxes = boxes[has_area]
    return boxes, np.full(len(boxes), GROUND_TRUTH_SCORE, dtype=np.float32)


# Selective search


def _segmentation() -> Any:
    try:
        from cv2 import ximgproc

        return ximgproc.segmentation
    except (ImportError, AttributeError) as error:
        raise ImportError(
            "selective search needs OpenCV with its contributed modules (cv2.ximgproc): "
            "pip install -e '.[selective-search]' in this project's folder; take opencv-python or "
            f"opencv-python-headless out first, which would share its folder ({error})"
        ) from error


def _selective_search(
    segmentation: Any, record: dict[str, Any], top_k: int, quality: bool
) -> BoxesAndScores:
    image = read_image(record["file_name"], "BGR")
    check_image_size(dict(record), image)
    search = segmentation.createSelectiveSearchSegmentation()
    search.setBaseImage(image)
    if quality:
        search.switchToSelectiveSearchQuality()
    else:
        search.switchToSelectiveSearchFast()
    # It uses the C library's rand(), whose state carries over between images.
    ctypes.CDLL(None).srand(0)
    boxes = np.asarray(search.process(), dtype=np.float32).reshape(-1, 4)[:top_k]
    boxes[:, 2:] += boxes[:, :2]  # from XYWH
    return boxes, -np.arange(len(boxes), dtype=np.float32)


def write_for_each(
    datasets: Sequence[str], folder: Path, write: Callable[[str, Path], None]
) -> None:
    """Call ``write(name, folder/name.safetensors)`` for each dataset, and print each file.

    Raises:
        ValueError: a dataset is not registered.
    """
    register_datasets()
    check_registered(datasets)
    for name in datasets:
        file = folder / f"{name}.safetensors"
        write(name, file)
        print(summary(file))
