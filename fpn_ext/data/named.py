"""A dataset by the name of its file or folder: read, divided, written as COCO JSON, registered."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from iopath.common.file_io import file_lock

from ..files.atomic import replacing
from ..files.paths import without_dots
from ..files.run_lock import is_in_use
from ..keys import declare
from ..reporting.json_files import plain
from .canonical import coco_json, complete, look_for_untrained
from .data_file import open_data
from .dataset import SPLITS, Dataset, common_folder
from .formats import read_dataset
from .formats.layout import OURS
from .splits import divide

declare(
    "DATASETS.FPN_EXT.DATA",
    "",
    """What is trained on and scored on: a folder of photographs and annotations (COCO, VOC, YOLO,
    DeepPCB), or a YAML file that describes one; DATASETS.TRAIN and DATASETS.TEST follow. `--data`
    on the command line. Empty: the datasets registered under the names in DATASETS.TRAIN and
    TEST.""",
    "training",
    "evaluation",
)

_registered: dict[str, "NamedData"] = {}  # by the name of each dataset, what it was made of


@dataclass(frozen=True)
class NamedData:
    """A dataset that is registered.

    Attributes:
        source: the file or folder it was read from.
        format: of its annotations.
        names: of its splits as registered, ``{"train": "photos_train", ...}``.
        counts: images and objects of each split.
        classes: in the order of their numbers.
        notes: what was filled in, mended or decided.
        warnings: what was left out and may have been meant.
    """

    source: Path
    format: str
    names: dict[str, str]
    counts: dict[str, tuple[int, int]]
    classes: tuple[str, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]


def register_data(path: str | Path, folder: Path) -> NamedData:
    """Read a dataset and register each split in COCO's format, evaluated as COCO is.

    Args:
        path: a folder, or a YAML file that describes one (:mod:`fpn_ext.data.data_file`).
        folder: for ``{name}_{split}.json``, which is what is trained on, and for the split that
            was drawn where there was none. Several processes may call this at a time.

    Raises:
        FileNotFoundError, ValueError: what is wrong with the data, all there is, counted; images in
            the folder of the training, which would be read as data no more.
    """
    data = open_data(path)
    dataset = complete(read_dataset(data), data.classes)
    _check_outside(dataset, data.root, folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / OURS).exists():
        (folder / OURS).touch()  # not to be read as data, should the folder lie among them
    with file_lock(str(folder / data.name)):
        drawn = folder / f"{data.name}_split.json"
        divided = divide(dataset, data.split, data.seed, drawn, data.split_file)
        look_for_untrained(dataset)
        names = {s: f"{data.name}_{s}" for s in SPLITS if dataset.splits.get(s)}
        files = {name: folder / f"{name}.json" for name in names.values()}
        changed = [_write_if_new(files[name], dataset, split) for split, name in names.items()]
        named = NamedData(
            data.file,
            dataset.format,
            names,
            {s: (len(dataset.splits[s]), _objects(dataset, s)) for s in names},
            tuple(dataset.classes),
            tuple([*filter(None, [divided]), *dataset.tally.noted()]),
            (*filter(None, changed), *dataset.tally.warned()),
        )
        for split, name in names.items():
            _register(name, files[name], dataset, split, named)
    return named


def _check_outside(dataset: Dataset, root: Path, folder: Path) -> None:
    """Raise if an image of a dataset lies where a training is to write, which is not read again."""
    folder, root = without_dots(folder), without_dots(root)
    run = folder.parent
    if root not in (folder, *folder.parents):  # then all below the root is read
        return
    left_out = os.path.join(run if root in run.parents else folder, "")
    files = (os.path.abspath(image.file) for image in dataset.images)
    if inside := next((file for file in files if file.startswith(left_out)), ""):
        raise ValueError(
            f"OUTPUT_DIR {run}: {inside} of the data lies where a training writes, and what is "
            "there is not read as data: name another OUTPUT_DIR"
        )


def _objects(dataset: Dataset, split: str) -> int:
    return sum(len(image.instances) for image in dataset.splits[split])


def _write_if_new(file: Path, dataset: Dataset, split: str) -> str:
    """Another process may be reading what is there, and it most often is the same.

    Returns:
        What changed, where it is other data; "" for the same, and for a new file.
    """
    text = json.dumps(plain(coco_json(dataset, split)), separators=(",", ":"), allow_nan=False)
    content = f"{text}\n".encode()
    before = file.read_bytes() if file.is_file() else None
    if before == content:
        return ""
    run = file.parent.parent
    if before is not None and is_in_use(run):  # its evaluations read this file, each anew
        raise ValueError(
            f"OUTPUT_DIR {run}: a training is running there whose {file.name} is of other "
            "data; name another OUTPUT_DIR, or wait until it ends"
        )
    with replacing(file) as stream:
        stream.write(content)
    return "" if before is None else _changed(file, before, content)


def _changed(file: Path, before: bytes, now: bytes) -> str:
    counts = []
    for content in (before, now):
        try:
            read = json.loads(content)
            images, objects = len(read["images"]), len(read["annotations"])
        except (ValueError, KeyError, TypeError):
            return f"{file} was no annotations, and is written anew"
        counts.append(f"{images} images with {objects} objects")
    as_many = ", others" if counts[0] == counts[1] else ""
    return (
        f"the data changed since the last command in this OUTPUT_DIR: {file.name} had {counts[0]}, "
        f"and has {counts[1]}{as_many}; scores of before are of other data"
    )


def _register(name: str, json_file: Path, dataset: Dataset, split: str, named: NamedData) -> None:
    if name in DatasetCatalog:
        if name not in _registered:
            raise ValueError(
                f"--data {named.source}: a dataset {name!r} is registered already; give this one "
                "another name, `name: ...` in data.yaml in its folder or in its data file"
            )
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    image_root = str(common_folder([image.file for image in dataset.splits[split]]))
    json_path = os.fspath(json_file.absolute())
    DatasetCatalog.register(name, lambda: load_coco_json(json_path, image_root, name))
    metadata = MetadataCatalog.get(name)
    metadata.set(
        json_file=json_path,
        image_root=image_root,
        evaluator_type="coco",
        thing_classes=list(dataset.classes),
    )
    if dataset.keypoint_names:
        metadata.set(
            keypoint_names=dataset.keypoint_names,
            keypoint_flip_map=_flip_map(dataset.keypoint_names),
        )
    _registered[name] = named


def _flip_map(names: list[str]) -> list[tuple[str, str]]:
    """The pairs of left and right, by their names."""
    pairs = ((name, name.replace("left", "right")) for name in names if "left" in name)
    return [(left, right) for left, right in pairs if right in names]
