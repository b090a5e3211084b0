"""What a training is on, for its checkpoints; whether a dataset's classes are a model's."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.utils import comm

from ..config.made_with import model_keys, other_than_trained
from ..data.class_names import RENAMING_KEY, renamed
from ..data.reading import value_range
from ..data.summary import DataSummary
from ..files.checkpoint import SafeCheckpointer
from ..files.trained_on import FILE, KEY, TrainedOn, check_class_names, trained_on_of
from ..registries.architectures import proposes_only
from ..reporting.json_files import write_json

logger = logging.getLogger(__name__)


def trained_on(cfg: CfgNode, loader: Any) -> TrainedOn:
    """What a config trains on.

    Args:
        loader: that of the training; one without a ``summary`` leaves images and boxes at 0.
    """
    summary = getattr(loader, "summary", None) or DataSummary(0, 0, "")
    names = list(cfg.DATASETS.TRAIN)
    metadata: Any = MetadataCatalog.get(names[0]) if names else Metadata()
    classes = [str(name) for name in metadata.get("thing_classes") or ()]
    number_of = metadata.get("thing_dataset_id_to_contiguous_id") or {}
    id_of = {number: int(category) for category, number in number_of.items()}
    keypoints: Any = metadata if cfg.MODEL.KEYPOINT_ON else Metadata()
    return TrainedOn(
        classes=classes,
        category_ids=[id_of[i] for i in range(len(classes))] if len(id_of) == len(classes) else [],
        datasets=names,
        images=summary.images,
        boxes=summary.boxes,
        data_sha256=summary.sha256,
        image_bytes=summary.bytes,
        pixel_format=cfg.INPUT.FORMAT,
        pixel_mean=[float(value) for value in cfg.MODEL.PIXEL_MEAN],
        pixel_std=[float(value) for value in cfg.MODEL.PIXEL_STD],
        value_range=list(value_range(cfg)),
        model_keys=model_keys(cfg),
        keypoint_names=list(keypoints.get("keypoint_names") or ()),
        keypoint_flip_map=[list(pair) for pair in keypoints.get("keypoint_flip_map") or ()],
    )


def record_in(checkpointer: SafeCheckpointer, cfg: CfgNode, loader: Any) -> TrainedOn:
    """Have every file of a checkpointer say what was trained on; returns it."""
    record = trained_on(cfg, loader)
    checkpointer.in_every_file[KEY] = record.as_dict()
    return record


def write_beside_config(record: TrainedOn, output: str) -> None:
    """Write ``trained_on.json`` into a run's folder; the main process does."""
    if comm.is_main_process():
        write_json(Path(output, FILE), record.as_dict())


def check_data_to_go_on_with(
    cfg: CfgNode, file: str, checkpoint: Mapping[str, Any], now: TrainedOn
) -> None:
    """Say in the log in what the data are not those that a checkpoint was trained on.

    Raises:
        ValueError: their classes are others, or in another order: numbers would change meaning.
    """
    before = trained_on_of(checkpoint)
    if before is None:
        return
    if before.classes and now.classes and not proposes_only(cfg):
        names = renamed(cfg, before.classes)
        check_class_names(names, now.classes, "the data to go on with", file, RENAMING_KEY)
    for change in before.changes(now):
        logger.warning("the data changed since %s: %s", file, change)


def say_what_is_other(
    cfg: CfgNode, file: str, checkpoint: Mapping[str, Any], now: TrainedOn
) -> None:
    """Say in the log what is otherwise than for the weights that a new training begins with.

    That may be meant, as when a model is trained for other data. Classes are mentioned where those
    weights are taken over that tell them apart: where there are as many.
    """
    before = trained_on_of(checkpoint)
    if before is None:
        return
    as_many = len(before.classes) == len(now.classes)
    if as_many and before.classes != now.classes and not proposes_only(cfg):
        logger.warning(
            "%s was trained on the classes %s, and this training is on %s: as there are as many, "
            "the weights that tell the first ones apart are begun with for these",
            *(file, before.classes, now.classes),
        )
    for difference in other_than_trained(cfg, before, file):
        logger.warning("%s", difference)


def check_test_classes(cfg: CfgNode, file: str, checkpoint: Mapping[str, Any]) -> None:
    """Raise unless the datasets of ``DATASETS.TEST`` have the classes of a checkpoint's model.

    What else is otherwise than in its training is said in the log.

    Raises:
        ValueError: they do not; both lists are shown.
    """
    record = trained_on_of(checkpoint)
    for difference in other_than_trained(cfg, record or TrainedOn(), file):
        logger.warning("%s", difference)
    if record is None or not record.classes or proposes_only(cfg):
        return
    names = renamed(cfg, record.classes)
    for dataset in cfg.DATASETS.TEST:
        other: Sequence[str] = MetadataCatalog.get(dataset).get("thing_classes") or ()
        if not other:  # COCO-format sets learn their class names from their JSON
            DatasetCatalog.get(dataset)
            other = MetadataCatalog.get(dataset).get("thing_classes") or ()
        if other:
            check_class_names(names, other, f"dataset {dataset!r}", file, RENAMING_KEY)
