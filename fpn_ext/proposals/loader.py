"""Detectron2's data loaders, with precomputed proposals looked up per image.

Detectron2 stores the proposals of all images in the list of records, which it copies into every
worker process. Here workers share a memory-mapped file (:mod:`fpn_ext.proposals.file`).
"""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import (
    DatasetFromList,
    MapDataset,
    build_detection_test_loader,
)
from detectron2.structures import BoxMode
from torch.utils.data import Dataset

from ..data.class_numbers import in_trained_order, trained_classes
from ..data.datasets import check_classes, keep_trainable
from ..data.loading import check_records, check_training_targets, load_records, say_classes
from ..data.mapper import PictureMapper
from .detectron2_pickle import open_proposals
from .file import ImageId, ProposalFile, Proposals, first_ids

logger = logging.getLogger(__name__)


def training_data(cfg: CfgNode) -> dict[str, Any]:
    """The training ``records`` and, with ``MODEL.LOAD_PROPOSALS``, their ``mapper``.

    Raises:
        FileNotFoundError, ValueError: a file of ``DATASETS.PROPOSAL_FILES_TRAIN`` cannot be read,
            or lacks images of its dataset; no training images remain; records that a training
            could not read to its end.
    """
    names = cfg.DATASETS.TRAIN
    trained_classes(cfg)  # which are the same in all of them
    if not cfg.MODEL.LOAD_PROPOSALS:
        records = load_records(names)
        return {"records": _trainable(cfg, records)}
    proposals = _open_all(names, cfg.DATASETS.PROPOSAL_FILES_TRAIN, "TRAIN")
    records = _records(names, proposals)
    records = _trainable(cfg, records)
    return {"records": records, "mapper": ProposalMapper(cfg, True, proposals)}


def _trainable(cfg: CfgNode, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    names = cfg.DATASETS.TRAIN
    if isinstance(records, list):  # not a torch dataset, which would have to be loaded
        check_records(names, records)
    check_classes(cfg, names, records)
    records = keep_trainable(cfg, records)
    if isinstance(records, list):
        check_training_targets(cfg, names, records)
        say_classes(names, records)
    return records


def build_test_loader(cfg: CfgNode, dataset_name: str) -> Any:
    """Detectron2's test loader; with ``MODEL.LOAD_PROPOSALS``, images carry proposals.

    Raises:
        FileNotFoundError, ValueError: the file of ``DATASETS.PROPOSAL_FILES_TEST`` cannot be read,
            or lacks images of the dataset; or records that an evaluation could not read.
    """
    return test_loader_and_records(cfg, dataset_name)[0]


def test_loader_and_records(cfg: CfgNode, dataset_name: str) -> tuple[Any, list[dict[str, Any]]]:
    """:func:`build_test_loader`, and the records behind it in the class numbers of the model."""
    records, mapper = _test_data(cfg, dataset_name, is_train=False)
    return _one_by_one(cfg, records, mapper), records


def build_validation_loader(cfg: CfgNode, dataset_name: str) -> Any:
    """The images of :func:`build_test_loader`, at the same size, with ground truth.

    Raises:
        ValueError: the dataset has no ground truth; or what :func:`build_test_loader` raises.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.INPUT.MIN_SIZE_TRAIN = (cfg.INPUT.MIN_SIZE_TEST,)
    cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING = "choice"
    cfg.INPUT.MAX_SIZE_TRAIN = cfg.INPUT.MAX_SIZE_TEST
    cfg.INPUT.RANDOM_FLIP = "none"
    cfg.INPUT.CROP.ENABLED = False
    cfg.DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TRAIN = cfg.DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST
    records, mapper = _test_data(cfg, dataset_name, is_train=True)
    if not any(record.get("annotations") for record in records):
        raise ValueError(
            f"TEST.FPN_EXT.VALIDATION_LOSS needs ground truth: no image of dataset "
            f"{dataset_name!r} (DATASETS.TEST) has annotations"
        )
    return _one_by_one(cfg, records, mapper)


def _test_data(
    cfg: CfgNode, dataset_name: str, is_train: bool
) -> tuple[list[dict[str, Any]], PictureMapper]:
    if not is_train and cfg.MODEL.KEYPOINT_ON:
        # The mapper would look for the keypoints' names in DATASETS.TRAIN, to flip them.
        cfg = cfg.clone()
        cfg.defrost()
        cfg.MODEL.KEYPOINT_ON = False
    if cfg.MODEL.LOAD_PROPOSALS:
        file = cfg.DATASETS.PROPOSAL_FILES_TEST[list(cfg.DATASETS.TEST).index(dataset_name)]
        proposals = _open_all([dataset_name], [file], "TEST")
        records = _records([dataset_name], proposals)
        mapper: PictureMapper = ProposalMapper(cfg, is_train, proposals)
    else:
        records = load_records([dataset_name])
        mapper = PictureMapper(cfg, is_train)
    if isinstance(records, list):
        check_records([dataset_name], records, evaluated=True)
    records = in_trained_order(cfg, dataset_name, records)
    if is_train and isinstance(records, list):  # for the loss
        check_training_targets(cfg, [dataset_name], records)
    check_classes(cfg, [dataset_name], records, trained_classes(cfg))
    return records, mapper


def _one_by_one(cfg: CfgNode, records: list[dict[str, Any]], mapper: PictureMapper) -> Any:
    images = MappedImages(MapDataset(DatasetFromList(records, copy=False), mapper))
    return build_detection_test_loader(images, mapper=None, num_workers=cfg.DATALOADER.NUM_WORKERS)


class MappedImages(Dataset):
    """Mapped records, in a class of this package.

    To unpickle it, a worker that does not inherit this process's modules (spawn, forkserver)
    imports fpn_ext first, including what an old Detectron2 needs.

    Args:
        data: returns mapped records.
    """

    def __init__(self, data: MapDataset):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        return self.data[index]


class ProposalMapper(PictureMapper):
    """A mapper of pictures, which first looks up an image's proposals.

    Args:
        cfg, is_train: as in Detectron2; ``DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TRAIN`` or ``_TEST``
            limits the proposals per image.
        proposals: of each dataset; a record's ``proposal_file`` is an index into this list.
    """

    def __init__(self, cfg: CfgNode, is_train: bool, proposals: Sequence[Proposals]):
        super().__init__(cfg, is_train)
        self.proposals = proposals

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        """As Detectron2's.

        Raises:
            ValueError: proposals are NaN, infinite or not sorted by score.
        """
        record = dict(record)
        source = self.proposals[record.pop("proposal_file")]
        boxes, scores = source[record["image_id"]]
        if not (np.isfinite(boxes).all() and (scores[:-1] >= scores[1:]).all()):
            raise ValueError(
                f"{source.file}, image id {record['image_id']!r}: boxes that are not finite, or "
                "not in the order of their scores; see fpn-ext proposals validate"
            )
        record["proposal_boxes"] = boxes
        record["proposal_objectness_logits"] = scores
        record["proposal_bbox_mode"] = BoxMode.XYXY_ABS
        return super().__call__(record)


def _open_all(names: Sequence[str], files: Sequence[str], split: str) -> list[Proposals]:
    if len(names) != len(files):
        raise ValueError(
            f"DATASETS.PROPOSAL_FILES_{split} has {len(files)} files for the {len(names)} datasets "
            f"of DATASETS.{split}; it needs one for each, in their order"
        )
    opened = []
    for name, file in zip(names, files, strict=True):
        proposals = open_proposals(file)
        logger.info("%r: proposals of %s, made by: %s", name, file, proposals.source)
        if not isinstance(proposals, ProposalFile):
            logger.info(
                "%s is held in memory (%d boxes); fpn-ext proposals convert makes a file "
                "that need not be",
                file,
                proposals.num_boxes,
            )
        opened.append(proposals)
    return opened


def _records(names: Sequence[str], proposals: Sequence[Proposals]) -> list[dict[str, Any]]:
    """The records of all datasets, each with the index of its proposal file."""
    records = []
    for number, (name, own) in enumerate(zip(names, proposals, strict=True)):
        of_one = load_records([name])
        _check_match(name, [record["image_id"] for record in of_one], own)
        records += [{**record, "proposal_file": number} for record in of_one]
    return records


def _check_match(name: str, image_ids: Sequence[ImageId], proposals: Proposals) -> None:
    missing = [image_id for image_id in image_ids if image_id not in proposals]
    if missing:
        raise ValueError(
            f"{proposals.file} has no entry for {len(missing)} of the {len(image_ids)} images of "
            f"dataset {name!r}: {first_ids(missing)}"
            + (f". It was made for {proposals.dataset!r}" if proposals.dataset else "")
        )
    if len(proposals) > len(image_ids):
        known = set(map(str, image_ids))
        others = [image_id for image_id in proposals if str(image_id) not in known]
        logger.warning(
            "%s has entries for %d images that dataset %r has not: %s",
            proposals.file,
            len(others),
            name,
            first_ids(others),
        )
    if proposals.dataset not in ("", name):
        logger.warning(
            "%s was made for dataset %r and is used for %r",
            proposals.file,
            proposals.dataset,
            name,
        )
