"""COCO's JSON, read and written: one file per split, with ``images``, ``annotations`` and
``categories`` (https://cocodataset.org/#format-data)."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..data_file import DataFile, Source
from ..dataset import AnnotatedImage, Dataset, Instance, Tally, names_of, rounded
from ..dataset_contents import four_numbers, number_of, short, size_of
from ..mask_area import mask_area
from .layout import Files, Pictures, by_split, check_folders
from .pictures import copy_pictures

BACKGROUND = ("background", "__background__")
KEYS = ("images", "annotations", "categories")


def find(files: Files) -> dict[str, Source]:
    """The splits of the COCO files in a folder; {} where there are none.

    Of several files of a split, ``instances_...`` is taken.

    Raises:
        ValueError: several files of a split, or some that name no split.
    """
    found = [file for file in files.others[".json"] if _looks_like_coco(file)]
    if not found:
        return {}
    of_instances = [file for file in found if file.name.startswith("instances")]
    chosen = of_instances or found
    splits = by_split(chosen, {file: files.split_of(file) for file in chosen}, "JSON files")
    for split, several in splits.items():
        if len(several) > 1:
            names = ", ".join(str(file.relative_to(files.root)) for file in several)
            raise ValueError(
                f"{len(several)} COCO files may be {split}: {names}; name one in a data file, "
                f"e.g. {'train' if split == 'all' else split}: {{annotations: {several[0].name}}}"
            )
    return {
        split: Source(annotations=(str(file.relative_to(files.root)),))
        for split, (file,) in splits.items()
    }


def _looks_like_coco(file: Path) -> bool:
    content = file.read_bytes()
    return all(f'"{key}"'.encode() in content for key in KEYS)


def read(data: DataFile, splits: Mapping[str, Source], files: Files) -> Dataset:
    """The images and objects of each split.

    Classes are in the order of the category ids of the first split; other splits' are matched by
    name.

    Raises:
        FileNotFoundError: no such JSON.
        ValueError: what is wrong with it.
    """
    tally = Tally()
    dataset = Dataset(data.file, "coco", [], {}, [], tally)
    numbers: dict[str, Any] = {}
    spare: dict[str, str] = {}  # classes that exporters add, and why each is none
    for split, source in splits.items():
        images: list[AnnotatedImage] = []
        for written in source.annotations or source.images:
            json_file = (data.root / written).absolute()
            reader = _File(json_file, _load(json_file), tally)
            for name, key in reader.names.items():
                if numbers.setdefault(name, key) != key:
                    what = "classes have another number in another split: matched by name"
                    tally.note(what, name)
            spare |= reader.spare_classes()
            dataset.classes += [name for name in reader.names if name not in dataset.classes]
            dataset.keypoint_names = dataset.keypoint_names or reader.keypoint_names()
            folders = [data.root / name for name in source.images if source.annotations]
            check_folders(data, folders)
            images += reader.images(_pictures(folders, data, split, json_file, files, tally))
        dataset.splits[split] = images
    used = {i.category for image in dataset.images for i in image.instances}
    for name, why in spare.items():
        if name not in used and name not in data.classes:
            tally.note(f"classes are {why} and have no boxes: left out", name)
            dataset.classes.remove(name)
    return dataset


def _load(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"no annotation file {file}")
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    missing = [
        key
        for key in KEYS
        if not isinstance(content, dict)
        or not isinstance(content.get(key), list)
        or not all(isinstance(entry, dict) for entry in content[key])
    ]
    if missing:
        raise ValueError(
            f"{file} is no COCO file: {' and '.join(missing)} must be lists of objects"
        )
    return dict(content)


def _pictures(
    folders: list[Path], data: DataFile, split: str, json_file: Path, files: Files, tally: Tally
) -> Pictures:
    """Where the images of a JSON may lie, the likeliest first."""
    named = json_file.stem.removeprefix("instances_")
    here, root = json_file.parent, data.root
    if not folders:
        likely = [here, here / "images", here / named, root / named, root / "images" / named]
        likely += [root / split, root / "images" / split, root / "images", root]
        folders = [folder for folder in dict.fromkeys(likely) if folder.is_dir()]
    return Pictures(files.pictures, folders, tally)


class _File:
    """One JSON file, its parts by their ids. Ids 1 and "1" are the same."""

    def __init__(self, file: Path, content: dict[str, Any], tally: Tally):
        self.file, self.content, self.tally = file, content, tally
        self.categories = sorted(
            content["categories"], key=lambda c: (not isinstance(c.get("id"), int), _key(c))
        )
        self.name_of: dict[str, str] = {}
        for category in self.categories:
            key, name = str(category.get("id")), category.get("name")
            if "id" not in category or not isinstance(name, str) or not name:
                tally.fault("categories need an id and a name", f"{file.name}: {short(category)}")
            elif key in self.name_of or name in self.name_of.values():
                tally.fault("categories have the id or the name of another one", name)
            else:
                self.name_of[key] = name
        self.names = {name: key for key, name in self.name_of.items()}

    def spare_classes(self) -> dict[str, str]:
        """Classes that may be none, with what they are.

        Roboflow's first category is the supercategory of all others; datumaro's, from VOC, is the
        background.
        """
        if len(self.names) < 2:
            return {}
        spare = {name: "the background" for name in self.names if name in BACKGROUND}
        parents = {str(c.get("supercategory")) for c in self.categories}
        for name in parents & set(self.names):
            if all(
                c.get("supercategory") == name for c in self.categories if c.get("name") != name
            ):
                spare[name] = "the parent of all others"
        return spare

    def keypoint_names(self) -> list[str]:
        lists = (c.get("keypoints") for c in self.categories)
        return next((list(map(str, names)) for names in lists if isinstance(names, list)), [])

    def images(self, pictures: Pictures) -> list[AnnotatedImage]:
        of_id: dict[str, AnnotatedImage] = {}
        types: dict[str, type] = {}
        missing: set[str] = set()  # the annotations of these images are not at fault
        for entry in self.content["images"]:
            key, name = str(entry.get("id")), entry.get("file_name")
            if "id" not in entry or not isinstance(name, str) or not name:
                self.tally.fault("images need an id and a file_name", short(entry))
                continue
            picture = pictures.named(name)
            if picture is None:
                pictures.miss(name, self.file.name)
                missing.add(key)
                continue
            if key in of_id:
                self.tally.fault("images have the id of another one", name)
            of_id[key] = AnnotatedImage(
                picture, *(size_of(entry.get("width"), entry.get("height")) or (0, 0))
            )
            types[key] = type(entry["id"])
        seen: dict[str, tuple[Any, Any, str]] = {}
        for entry in self.content["annotations"]:
            if str(entry.get("image_id")) in missing.difference(of_id):
                continue
            self._annotation(entry, of_id, types, seen)
        return list(of_id.values())

    def _annotation(
        self,
        entry: dict[str, Any],
        of_id: Mapping[str, AnnotatedImage],
        types: Mapping[str, type],
        seen: dict[str, tuple[Any, Any, str]],
    ) -> None:
        tally, image_key = self.tally, str(entry.get("image_id"))
        if image_key not in of_id:
            tally.warn("annotations are of images that are not in the file: left out", image_key)
            return
        if type(entry["image_id"]) is not types[image_key]:
            tally.note(
                "annotations have an image_id of another type than the image's id", image_key
            )
        image, where = of_id[image_key], of_id[image_key].file.name
        key = str(entry.get("id"))
        if key == "0":
            what = "annotations have the id 0, COCO's sign for no match: numbered anew"
            tally.note(what, where)
        content = entry.get("bbox"), entry.get("category_id"), image_key
        if key in seen:
            if seen[key] == content:  # pylabel's, in place of an image without objects
                tally.note("annotations are written twice: taken once", where)
                return
            if seen[key][:2] == content[:2]:
                tally.fault("annotations repeat the id and the box of another one", where)
            tally.note("annotations have the id of another one: numbered anew", where)
        seen[key] = content
        name = self.name_of.get(str(entry.get("category_id")))
        if name is None:
            tally.fault(
                f"annotations have a category_id that is not in {self.file.name}'s categories",
                f"{short(entry.get('category_id'))} on {where}",
            )
            return
        mask = self._mask(entry.get("segmentation"), where)
        box = self._box(entry, mask, where)
        if box is None:
            return
        instance = Instance(name, rounded(box), self._crowd(entry, where), mask)
        points = entry.get("keypoints")
        if points:
            if (
                isinstance(points, list)
                and len(points) % 3 == 0
                and all((v := number_of(p)) is not None and math.isfinite(v) for p in points)
            ):
                instance.keypoints = points
            else:
                tally.fault("keypoints are no triples of numbers", f"{where}: {short(points)}")
        area = number_of(entry.get("area"))
        if area is not None and math.isfinite(area) and area > 0:
            instance.area = area
        image.instances.append(instance)

    def _box(self, entry: dict[str, Any], mask: Any, where: str) -> list[float] | None:
        four = four_numbers(entry.get("bbox"))
        if four is not None:
            x, y, width, height = four
            return [x, y, x + width, y + height]
        if isinstance(mask, list) and not entry.get("bbox"):
            self.tally.note("annotations had no box: taken from their polygons", where)
            points = np.concatenate([np.reshape(polygon, (-1, 2)) for polygon in mask])
            return [*points.min(0).tolist(), *points.max(0).tolist()]
        self.tally.fault(
            "annotations have no bbox of four finite numbers",
            f"{where}: {short(entry.get('bbox'))}",
        )
        return None

    def _mask(self, written: Any, where: str) -> list[list[float]] | dict[str, Any] | None:
        if not written:
            return None
        if isinstance(written, dict):
            if not _is_mask(written):
                self.tally.fault(
                    "run-length masks do not cover their image: size is [height, width] and the "
                    "counts add up to height x width",
                    f"{where}: {short(written)}",
                )
                return None
            return written
        polygons = written if isinstance(written, list) else []
        kept = [
            [float(value) for value in polygon]
            for polygon in polygons
            if isinstance(polygon, list)
            and len(polygon) >= 6
            and len(polygon) % 2 == 0
            and all((v := number_of(value)) is not None and math.isfinite(v) for value in polygon)
        ]
        if len(kept) < len(polygons) or not kept:
            self.tally.note("masks have polygons of fewer than three points: left out", where)
        return kept or None

    def _crowd(self, entry: dict[str, Any], where: str) -> bool:
        if "iscrowd" not in entry:
            self.tally.note("annotations had no iscrowd: taken as 0", where)
        if entry.get("ignore") in (1, True):
            self.tally.note("annotations have ignore 1: taken as crowd regions", where)
            return True
        value = entry.get("iscrowd", 0)
        if value not in (0, 1):
            self.tally.fault("annotations have an iscrowd other than 0 and 1", short(value))
        return value == 1


def _key(category: dict[str, Any]) -> Any:
    key = category.get("id")
    return key if isinstance(key, int) else str(key)


def write(dataset: Dataset, folder: Path) -> None:
    """``annotations/instances_{split}.json``, and the images in ``{split}/``."""
    from ...reporting.json_files import write_json
    from ..canonical import coco_json  # the same JSON that is trained on

    for split, images in dataset.splits.items():
        names = names_of([image.file for image in images])
        copy_pictures(images, names, folder / split)
        content = coco_json(dataset, split)
        write_json(folder / "annotations" / f"instances_{split}.json", content, indent=None)


def _is_mask(written: dict[str, Any]) -> bool:
    """Whether run lengths cover an image of the size that they state."""
    size = written.get("size")
    if not (isinstance(size, list) and len(size) == 2 and all(type(side) is int for side in size)):
        return False
    try:
        mask_area(written, *size)
    except ValueError:
        return False
    return True
