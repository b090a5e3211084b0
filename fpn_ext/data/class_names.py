"""The names of a model's classes: of its checkpoint, else of the dataset it is tested on."""

import logging
from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from ..files.trained_on import TrainedOn, check_class_names
from ..keys import declare, own_keys
from ..registries.architectures import proposes_only

RENAMING_KEY = "TEST.FPN_EXT.CLASS_NAMES"
declare(
    "TEST.FPN_EXT.CLASS_NAMES",
    [],
    "Names of the model's classes, in the order of their numbers, in place of those that its "
    "checkpoint holds; [] for those.",
    "evaluation",
    "inference",
)

logger = logging.getLogger(__name__)


def renamed(cfg: CfgNode, names: Sequence[str]) -> list[str]:
    """Class names, or those that the config gives in their place.

    Raises:
        ValueError: it gives more or fewer.
    """
    given = own_keys(cfg, "TEST").CLASS_NAMES
    if given and len(given) != len(names):
        raise ValueError(
            f"{RENAMING_KEY} has {len(given)} names, the model {len(names)} classes: give one for "
            f"each of {list(names)}"
        )
    return [str(name) for name in given or names]


def class_names(cfg: CfgNode, record: TrainedOn | None, count: int | None) -> dict[int, str]:
    """COCO category id of each class of a model, in the order of their numbers, and its name.

    The names are those of the checkpoint; where it does not say, of the first dataset of
    ``DATASETS.TEST``; where that cannot be read, ``class 0`` and so on, and that is said.

    Args:
        record: what the model was trained on.
        count: how many classes the model has; None where it does not say.

    Raises:
        ValueError: the dataset's classes are not the model's.
    """
    if proposes_only(cfg):
        return {1: "object"}
    weights = cfg.MODEL.WEIGHTS or "the model"
    if record is not None and record.classes:
        names = renamed(cfg, record.classes)
        ids = record.category_ids or range(1, len(names) + 1)
        for dataset in cfg.DATASETS.TEST[:1]:
            known = MetadataCatalog.get(dataset).get("thing_classes")
            if known:
                check_class_names(names, known, f"dataset {dataset!r}", weights, RENAMING_KEY)
    else:
        by_id = _of_dataset(cfg)
        if not by_id:
            numbers = range(count or 0)
            by_id = {number + 1: f"class {number}" for number in numbers}
            if not own_keys(cfg, "TEST").CLASS_NAMES:
                logger.warning(
                    "%s does not say the names of its classes, and no dataset of DATASETS.TEST "
                    "can be read: they are numbered. %s gives them names",
                    weights,
                    RENAMING_KEY,
                )
        names, ids = renamed(cfg, list(by_id.values())), list(by_id)
    if count is not None and len(names) != count:
        raise ValueError(
            f"{weights} has {count} classes, but there are names for {len(names)}: {names}. Name "
            f"in DATASETS.TEST a dataset with the model's classes, or give their names: "
            f'{RENAMING_KEY} "[...]"'
        )
    return dict(zip(ids, names, strict=True))


def _of_dataset(cfg: CfgNode) -> dict[int, str]:
    """As :func:`class_names`, by the metadata of a dataset; empty if it cannot be read."""
    if not cfg.DATASETS.TEST or cfg.DATASETS.TEST[0] not in DatasetCatalog:
        return {}
    dataset = cfg.DATASETS.TEST[0]
    metadata = MetadataCatalog.get(dataset)
    if not metadata.get("thing_classes"):
        try:
            DatasetCatalog.get(dataset)  # COCO-format sets learn their class names from their JSON
        except OSError as error:
            logger.warning("dataset %r cannot be read: %s", dataset, error)
            return {}
    names = metadata.get("thing_classes") or ()
    number_of = metadata.get("thing_dataset_id_to_contiguous_id")
    if number_of is None:  # not a COCO-format set, or one not read yet
        return {number + 1: name for number, name in enumerate(names)}
    id_of = {number: category for category, number in number_of.items()}
    return {id_of[number]: name for number, name in enumerate(names)}
