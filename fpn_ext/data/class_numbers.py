"""Class names of datasets by number, and splits that number the same classes differently.

A model's class numbers are those of the dataset that it was trained on. Where another split has the
same names in another order, or not all of them, its classes are found by name.
"""

import os
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from ..keys import own_keys
from ..names import did_you_mean
from ..registries.architectures import class_count
from .coco_file import coco_class_names


def class_names(dataset_name: str) -> tuple[str, ...]:
    """The class names of a registered dataset by their numbers; () where nothing tells.

    Those of its metadata, else those in its COCO file: the dataset itself is not read.
    """
    if dataset_name not in MetadataCatalog.list():
        return ()
    metadata = MetadataCatalog.get(dataset_name)
    names = metadata.get("thing_classes")
    json_file = metadata.get("json_file")
    if not names and json_file and dataset_name in DatasetCatalog and os.path.isfile(json_file):
        names = coco_class_names(json_file)
    return tuple(names or ())


def trained_classes(cfg: CfgNode) -> tuple[str, ...]:
    """The class names by the numbers that the model gives them.

    Those of ``TEST.FPN_EXT.CLASS_NAMES``, else of ``DATASETS.TRAIN``; () where they are not known,
    or are not as many as the model tells apart.

    Raises:
        ValueError: the datasets of ``DATASETS.TRAIN`` have different classes, or numbers for them.
    """
    renamed = tuple(own_keys(cfg, "TEST").get("CLASS_NAMES") or ())
    if renamed:
        return renamed if class_count(cfg) in (0, len(renamed)) else ()
    known = [(name, class_names(name)) for name in cfg.DATASETS.TRAIN]
    known = [(name, classes) for name, classes in known if classes]
    if not known:
        return ()
    first, classes = known[0]
    for name, others in known[1:]:
        if others != classes:
            raise ValueError(
                f"DATASETS.TRAIN: {first!r} and {name!r} number their classes differently: "
                f"{_differ(classes, others)}. Datasets to be trained on together need the same "
                "names, with the same ids"
            )
    if len(set(classes)) < len(classes):
        twice = next(name for name in classes if classes.count(name) > 1)
        raise ValueError(f"DATASETS.TRAIN: {first!r} has class {twice!r} twice")
    return classes if class_count(cfg) in (0, len(classes)) else ()


def numbers_in(
    order: Sequence[str], names: Sequence[str], dataset_name: str
) -> tuple[dict[int, int], str]:
    """Each class number of a dataset's that ``order`` has, and the number that it has there.

    Args:
        order: the class names by their numbers in the model; () if not known.
        names: those of the dataset; () if not known.

    Returns:
        The numbers, and what there is to say: "" where nothing changes.

    >>> numbers_in(["cat", "dog"], ["dog", "cat"], "val")[0]
    {0: 1, 1: 0}
    >>> numbers_in(["cat", "dog"], ["cat", "dog"], "val")
    ({0: 0, 1: 1}, '')
    """
    same = {number: number for number in range(len(names))}
    if not order or not names or tuple(order) == tuple(names):
        return same, ""
    numbers = {i: list(order).index(name) for i, name in enumerate(names) if name in order}
    said = (
        f"dataset {dataset_name!r} numbers its classes otherwise than DATASETS.TRAIN "
        f"({_differ(order, names)}): they are found by name"
    )
    return numbers, said


def in_trained_order(
    cfg: CfgNode, dataset_name: str, records: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The records of a dataset to evaluate on, in the class numbers of the model.

    Raises:
        ValueError: an object of a class that the model was not trained on.
    """
    order, names = trained_classes(cfg), class_names(dataset_name)
    numbers, said = numbers_in(order, names, dataset_name)
    if not said or not isinstance(records, list):
        return records
    mapped = []
    for record in records:
        objects = record.get("annotations")
        if objects is None:
            mapped.append(record)
            continue
        for annotation in objects:
            if annotation["category_id"] not in numbers:
                raise unknown_class(dataset_name, names, annotation["category_id"], order)
        renumbered = [{**a, "category_id": numbers[a["category_id"]]} for a in objects]
        mapped.append({**record, "annotations": renumbered})
    return mapped


def unknown_class(
    dataset_name: str, names: Sequence[str], number: int, order: Sequence[str]
) -> ValueError:
    """An object of a class that is not among those trained on."""
    name = names[number] if 0 <= number < len(names) else str(number)
    return ValueError(
        f"dataset {dataset_name!r} has objects of class {name!r}, which DATASETS.TRAIN has not; "
        f"{did_you_mean(name, order)}. Give the class the same name in both, add it to the "
        "training data, or rename the model's classes with TEST.FPN_EXT.CLASS_NAMES"
    )


def _differ(order: Sequence[str], names: Sequence[str]) -> str:
    """The first place in which two lists of classes differ.

    >>> _differ(["cat", "dog"], ["dog"])
    "class 0 is 'cat' and 'dog'"
    """
    for number, (first, second) in enumerate(zip(order, names, strict=False)):
        if first != second:
            return f"class {number} is {first!r} and {second!r}"
    return f"{len(order)} and {len(names)} classes"
