"""The datasets that the configs here name, registered by an explicit call.

Nothing is read at registration; the files are read when a dataset is used, from the folder that
``DETECTRON2_DATASETS`` (default ``datasets``) named at registration. Trees: datasets/README.md.
"""

import logging
import math
import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.build import (
    filter_images_with_few_keypoints,
    filter_images_with_only_crowd_annotations,
)
from detectron2.data.datasets import load_coco_json
from detectron2.structures import BoxMode
from iopath.common.file_io import file_lock

from ..names import did_you_mean
from ..registries.architectures import class_count, class_count_key
from . import demo_data

logger = logging.getLogger(__name__)

BCCD_CLASSES = ("RBC", "WBC", "Platelets")


# Datasets that fpn_ext.data.demo_data makes on first use, and the options it makes them with.
GENERATED: dict[str, dict[str, int]] = {
    "demo_multiscale": {},
    # For fpn_ext.paper.reproduce: shapes that are no objects, so that finding one takes knowing it.
    "demo_reproduction": {"seed": 1, "num_train": 1200, "num_val": 300, "distractors": 6},
}


def datasets_root() -> Path:
    """Where datasets are looked for: ``$DETECTRON2_DATASETS``, else ``datasets``."""
    return Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser()


def register_datasets() -> None:
    """Register the generated datasets and ``bccd_{train,val,trainval,test}``.

    Generated: each ``NAME_{train,val}`` of :data:`GENERATED`. Calling it again changes nothing.
    COCO and Pascal VOC are registered by Detectron2 itself.
    """
    root = datasets_root()
    for name, options in GENERATED.items():
        for split in ("train", "val"):
            register_generated(f"{name}_{split}", root / name, split, options)
    for split in ("train", "val", "trainval", "test"):
        register_voc_layout(f"bccd_{split}", root / "BCCD", split, BCCD_CLASSES)


def register_voc_layout(
    name: str, root: str | os.PathLike, split: str, classes: Sequence[str], year: int = 2012
) -> None:
    """Register a dataset in Pascal VOC's layout under a name for ``DATASETS.TRAIN`` and ``TEST``.

    Args:
        name: registered once only; a second call with the same name is ignored.
        root: folder with ``Annotations/*.xml``, ``ImageSets/Main/{split}.txt``, ``JPEGImages``.
        split: name of the list of images in ``ImageSets/Main``.
        classes: class names as in the XML files; their order gives the class numbers.
        year: which AP the Pascal VOC evaluator computes: 2012 (area under the
            precision-recall curve) or 2007 (11 points).

    Raises:
        ValueError: another ``year``.
    """
    if year not in (2007, 2012):
        raise ValueError(f"year chooses the AP and is 2007 or 2012, got {year}")
    if name in DatasetCatalog:
        return
    DatasetCatalog.register(name, lambda: load_voc_layout(root, split, classes))
    MetadataCatalog.get(name).set(
        thing_classes=list(classes),
        dirname=str(root),
        split=split,
        year=year,
        evaluator_type="pascal_voc",
    )


def load_voc_layout(
    root: str | os.PathLike, split: str, classes: Sequence[str]
) -> list[dict[str, Any]]:
    """Detectron2's records of one split of a dataset in Pascal VOC's layout.

    Boxes are XYXY_ABS, 0-based: VOC's 1-based, inclusive corners (xmin, ymin, xmax, ymax) become
    (xmin - 1, ymin - 1, xmax, ymax). A box without width or height is left out, and said.

    Raises:
        FileNotFoundError: a list, annotation or image file is not there.
        ValueError: an object's class is not among ``classes``.
    """
    root = Path(root)
    records = []
    for image_id in voc_image_ids(root, split):
        image_file = root / "JPEGImages" / f"{image_id}.jpg"
        if not image_file.is_file():
            raise FileNotFoundError(f"no image {image_file}, which split {split!r} lists")
        annotation_file = root / "Annotations" / f"{image_id}.xml"
        tree = read_voc_annotation(annotation_file)
        objects = []
        for number, element in enumerate(tree.findall("object")):
            box = voc_box(element, annotation_file)
            fault = box_fault(box)
            if fault:
                logger.warning(
                    "%s: object %d (%s) has %s, %s; it is left out",
                    annotation_file,
                    number,
                    element.findtext("name"),
                    fault,
                    box,
                )
                continue
            objects.append(
                {
                    "category_id": _class_number(element, classes, annotation_file),
                    "bbox": [box[0] - 1.0, box[1] - 1.0, box[2], box[3]],
                    "bbox_mode": BoxMode.XYXY_ABS,
                }
            )
        records.append(
            {
                "file_name": str(image_file),
                "image_id": image_id,
                "height": int(_number(tree, "size/height", annotation_file)),
                "width": int(_number(tree, "size/width", annotation_file)),
                "annotations": objects,
            }
        )
    return records


def check_classes(
    cfg: CfgNode, names: Sequence[str], records: Any, trained: Sequence[str] = ()
) -> None:
    """Check the classes of datasets that have been read against those that the model tells apart.

    On a GPU, a class beyond them is a device-side assert without a name.

    Args:
        trained: the classes of the model, where the records are in its numbers; else they are to be
            trained on, or to be evaluated on by a model of unknown classes.

    Raises:
        ValueError: an annotation of another class, or datasets with more or fewer classes.
    """
    key, limit = class_count_key(cfg), class_count(cfg)
    if not key or not isinstance(records, list):
        return  # of a torch dataset, which would have to be loaded
    classes = MetadataCatalog.get(names[0]).get("thing_classes") or []
    found = {a["category_id"] for r in records for a in r.get("annotations", ())}
    which = " + ".join(names)
    if classes and found and min(found) == 1 and max(found) == len(classes):
        raise ValueError(
            f"{which} has objects of the classes 1 to {len(classes)}: Detectron2 counts from 0. "
            "Have the registered function give 'category_id' less 1"
        )
    beyond = sorted(number for number in found if not 0 <= number < limit)
    if beyond or (classes and not trained and len(classes) != limit):
        listed = f" ({', '.join(classes[:5])}{', ...' if len(classes) > 5 else ''})"
        numbers = f" and boxes of class {', '.join(map(str, beyond[:5]))}" if beyond else ""
        needed = len(classes) or max(beyond) + 1
        remedy = (
            f"set it to {needed}"
            if needed != limit
            else "the registered function must give 'category_id' from 0 to one less"
        )
        raise ValueError(
            f"{key} is {limit}, but {which} has {len(classes) or 'no list of'} classes"
            f"{listed if classes else ''}{numbers}: {remedy}"
        )


def keep_trainable(cfg: CfgNode, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Detectron2's filters of images to train on; says what becomes of images without boxes.

    Boxes are counted as Detectron2 does: crowd regions (``iscrowd``) are none.

    Args:
        records: of all datasets of ``DATASETS.TRAIN``, unfiltered.

    Raises:
        ValueError: no image is left.
    """
    if not isinstance(records, list) or not records or "annotations" not in records[0]:
        return records  # a torch dataset, or one without annotations: nothing is dropped of it
    total = len(records)
    with_boxes = sum(any(not a.get("iscrowd", 0) for a in r["annotations"]) for r in records)
    drop = cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    logger.info(
        "%d of %d training images have no boxes: %s (DATALOADER.FILTER_EMPTY_ANNOTATIONS: %s)",
        total - with_boxes,
        total,
        "dropped" if drop else "kept",
        drop,
    )
    if not with_boxes:
        raise ValueError(
            f"DATASETS.TRAIN {tuple(cfg.DATASETS.TRAIN)} has no object to train on in its {total} "
            "images; crowd regions ('iscrowd' 1) are none. Check the annotations with fpn-ext data"
        )
    if drop:
        records = filter_images_with_only_crowd_annotations(records)
    model = cfg.MODEL
    if model.KEYPOINT_ON and model.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE > 0:
        least = model.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE
        records = filter_images_with_few_keypoints(records, least)
    if not records:
        raise ValueError(
            f"no image is left of the {total} of DATASETS.TRAIN {tuple(cfg.DATASETS.TRAIN)}: "
            f"{with_boxes} have boxes. Check the annotations with fpn-ext data; "
            "DATALOADER.FILTER_EMPTY_ANNOTATIONS False keeps images without boxes"
        )
    return records


def read_voc_annotation(file: Path) -> ElementTree.Element:
    """The root element of one annotation file.

    Entities of other files are not read, and one that expands without bound is an error: both are
    what expat does (2.4.1 or newer, as Python 3.10 to 3.12 bring it).

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not XML.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no annotation file {file}")
    try:
        return ElementTree.parse(file).getroot()
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # the latter: encodings
        raise ValueError(f"{file} is not XML: {error}") from error


def voc_box(element: ElementTree.Element, file: Path) -> list[float]:
    """[xmin, ymin, xmax, ymax] of an object, as written in ``file``: 1-based and inclusive."""
    return [
        _number(element, f"bndbox/{corner}", file) for corner in ("xmin", "ymin", "xmax", "ymax")
    ]


def box_fault(box: Sequence[float]) -> str:
    """What is wrong with an XYXY box, or ``""``.

    >>> box_fault([504, 337, 504, 337])
    'no width and no height'
    >>> box_fault([1, 1, 2, 2])
    ''
    """
    faults = [
        f"no {side}"
        for side, low, high in (("width", box[0], box[2]), ("height", box[1], box[3]))
        if not high > low
    ]
    return " and ".join(faults)


def voc_image_ids(root: Path, split: str) -> list[str]:
    """The words in a split's list, ``ImageSets/Main/{split}.txt``."""
    file = root / "ImageSets" / "Main" / f"{split}.txt"
    if not file.is_file():
        raise FileNotFoundError(
            f"no list of images {file}. Datasets are looked for under $DETECTRON2_DATASETS "
            f"({datasets_root()}); datasets/README.md shows the folders and where to get them."
        )
    try:
        return file.read_text(encoding="utf-8").split()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not a list of images in UTF-8: {error}") from error


def _class_number(element: ElementTree.Element, classes: Sequence[str], file: Path) -> int:
    name = element.findtext("name", "")
    if name not in classes:
        raise ValueError(f"{file}: class {name!r} is not among the classes {list(classes)}")
    return list(classes).index(name)


def _number(element: ElementTree.Element, path: str, file: Path) -> float:
    text = element.findtext(path, "")
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):  # float() takes "nan" and "inf" too
        raise ValueError(f"{file}: <{path}> must be a number, got {text!r}")
    return number


def register_generated(name: str, root: Path, split: str, options: dict[str, int]) -> None:
    """Register one split of a generated dataset, which is made in ``root`` when it is first read.

    Args:
        split: ``"train"`` or ``"val"``.
        options: of :func:`fpn_ext.demo_data.ensure`; a dataset that is there is used as it is.
    """
    if name in DatasetCatalog:
        return
    json_file = root / "annotations" / f"instances_{split}.json"
    images = root / split

    def load() -> list[dict[str, Any]]:
        if not json_file.is_file():  # one made with other options is used as it is
            with file_lock(str(root)):  # of several processes one makes it, and the others wait
                if not json_file.is_file():
                    logger.info("Generating the dataset in %s", root)
                    demo_data.ensure(root, **options)
        return load_coco_json(str(json_file), str(images), name)

    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(
        json_file=str(json_file),
        image_root=str(images),
        evaluator_type="coco",
        thing_classes=list(demo_data.CLASS_NAMES),
    )


def check_registered(names: Iterable[str]) -> None:
    """Raise ValueError unless each of these datasets is registered."""
    for name in names:
        if name not in DatasetCatalog:
            raise ValueError(
                f"{name!r} is not a registered dataset; {did_you_mean(name, DatasetCatalog.keys())}"
                ". KEY VALUE overrides of the config come last, after another option"
            )
