"""Read annotations of any quality: keep what is usable and list every problem.

Three readers (COCO JSON, Pascal VOC, records of any registered dataset) return the same
:class:`Contents`. Malformed content becomes a :class:`Problem`, never an exception; only a missing
file raises. :mod:`fpn_ext.data.check` checks further.
"""

import functools
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

import numpy as np
from detectron2.structures import BoxMode

from ..files.json_lists import ListInFile, read_json
from ..names import did_you_mean
from .coco_file import LONG_LISTS
from .collector import paused_collector
from .dataset_contents import (
    Box,
    Contents,
    Corners,
    Name,
    Picture,
    four_numbers,
    id_of,
    number_of,
    short,
    size_of,
)
from .datasets import voc_image_ids
from .voc_files import read_voc_annotation, voc_box

# ------------------------------------------------------------------------------------ COCO


@paused_collector()
def read_coco(json_file: str | os.PathLike, image_root: str | os.PathLike) -> Contents:
    """The contents of a COCO instances JSON with images under ``image_root``.

    Raises:
        FileNotFoundError: no such JSON.
    """
    json_file = Path(json_file)
    if not json_file.is_file():
        raise FileNotFoundError(f"no annotation file {json_file}; see datasets/README.md")
    contents = Contents(str(json_file))
    try:
        data = read_json(json_file, LONG_LISTS)
    except (ValueError, RecursionError) as error:
        contents.report("unreadable-annotations", f"not JSON: {error}")
        return contents
    if not isinstance(data, dict):
        contents.report("bad-field", f"the file must hold an object {{...}}, got {short(data)}")
        return contents
    class_of = _coco_classes(_entries(data, "categories", contents), contents)
    picture_of = _coco_pictures(_entries(data, "images", contents), str(image_root), contents)
    contents.pictures = list(picture_of.values())
    seen: set[Name] = set()
    for place, entry in _entries(data, "annotations", contents):
        _read_coco_annotation(place, entry, picture_of, class_of, seen, contents)
    return contents


def _entries(
    data: dict[str, Any], key: str, contents: Contents
) -> Iterable[tuple[str, dict[str, Any]]]:
    """The objects in one of the JSON's lists, each with its path, e.g. ``images[3]``."""
    entries = data.get(key)
    if not isinstance(entries, list | ListInFile):
        contents.report("bad-field", f"{key!r} must be a list, got {short(entries)}")
        return
    for number, entry in enumerate(entries):
        if isinstance(entry, dict):
            yield f"{key}[{number}]", entry
        else:
            contents.report("bad-field", f"{key}[{number}] must be an object, got {short(entry)}")


def _coco_classes(
    entries: Iterable[tuple[str, dict[str, Any]]], contents: Contents
) -> dict[Name, str]:
    names: dict[Name, str] = {}
    for place, entry in entries:
        key, name = id_of(entry.get("id")), entry.get("name")
        if key is None or not isinstance(name, str):
            contents.report(
                "bad-field",
                f"{place} needs an 'id' and a 'name', got {short(entry.get('id'))}, {short(name)}",
            )
        elif key in names:
            contents.report(
                "duplicate-class", f"{place}: id {short(key)} is also {short(names[key])}"
            )
        else:
            names[key] = name
    uses = Counter(names.values())
    contents.classes = list(uses)
    for name, count in uses.items():
        if count > 1:
            contents.report("duplicate-class", f"{short(name)} has {count} ids")
    return names


def _coco_pictures(
    entries: Iterable[tuple[str, dict[str, Any]]], image_root: str, contents: Contents
) -> dict[Name, Picture]:
    pictures: dict[Name, Picture] = {}
    files: dict[str, str] = {}  # file: path of its first use
    for place, entry in entries:
        key, name = id_of(entry.get("id")), entry.get("file_name")
        if key is None or not isinstance(name, str) or not name:
            contents.report(
                "bad-field",
                f"{place} needs an 'id' (a whole number or a string) and a 'file_name', got "
                f"{short(entry.get('id'))} and {short(name)}",
            )
            continue
        if key in pictures:
            contents.report("duplicate-image-id", f"{place}: id {short(key)} again", name)
            continue
        size = size_of(entry.get("width"), entry.get("height"))
        if size is None:
            contents.report(
                "bad-field",
                f"{place} needs a 'width' and a 'height' in whole pixels, got "
                f"{short(entry.get('width'))} and {short(entry.get('height'))}",
                name,
            )
        file = os.path.normpath(os.path.join(image_root, name))
        if file in files:
            contents.report("duplicate-file-name", f"{place} and {files[file]}", name)
        files.setdefault(file, place)
        pictures[key] = Picture(name, file, size)
    return pictures


def _read_coco_annotation(
    place: str,
    entry: dict[str, Any],
    picture_of: Mapping[Name, Picture],
    class_of: Mapping[Name, str],
    seen: set[Name],
    contents: Contents,
) -> None:
    key = id_of(entry.get("id"))
    image_key = id_of(entry.get("image_id"))
    picture = picture_of.get(image_key) if image_key is not None else None
    where = picture.name if picture else None if image_key is None else str(image_key)
    if key is None:
        contents.report(
            "bad-field",
            f"{place} needs an 'id' (a whole number or a string), got {short(entry.get('id'))}",
            where,
        )
        key = place
    elif key in seen:
        contents.report("duplicate-annotation-id", f"{place}: id {short(key)} again", where, key)
    seen.add(key)
    for flag, allowed, remedy in (
        ("iscrowd", (0, 1), "must be 0 or 1"),
        ("ignore", (0,), "is refused by Detectron2 unless it is 0"),
    ):
        if entry.get(flag, 0) not in allowed:
            contents.report("bad-field", f"'{flag}' {remedy}, got {short(entry[flag])}", where, key)
    if picture is None:
        contents.report("unknown-image", f"image_id {short(entry.get('image_id'))}", where, key)
        return
    category = id_of(entry.get("category_id"))
    if category is None or category not in class_of:
        contents.report(
            "unknown-class",
            f"category_id {short(entry.get('category_id'))} is not in 'categories'",
            where,
            key,
        )
        return
    written = four_numbers(entry.get("bbox"))
    if written is None:
        contents.report("bad-box", f"'bbox': {short(entry.get('bbox'))}", where, key)
        return
    crowd = entry.get("iscrowd", 0) == 1
    extent = _mask_extent(entry.get("segmentation"), picture, key, contents)
    picture.boxes.append(Box(key, written, "XYWH", class_of[category], crowd, extent))


def _mask_extent(
    segmentation: Any, picture: Picture, key: Name, contents: Contents
) -> Corners | None:
    """XYXY of an object's polygons; None if it has none. Reports what Detectron2 cannot use."""
    if not segmentation:
        return None
    if isinstance(segmentation, dict):
        size, counts = segmentation.get("size"), segmentation.get("counts")
        expected = [picture.size[1], picture.size[0]] if picture.size else size
        if not isinstance(counts, str | list) or size != expected:
            contents.report(
                "bad-segmentation",
                f"a run-length mask needs 'counts', and the image's height and width as 'size', "
                f"got {short(counts)} and {short(size)}",
                picture.name,
                key,
            )
        return None
    polygons = segmentation if isinstance(segmentation, list) else []
    # Detectron2 drops polygons of invalid length, then objects with no polygons left.
    of_right_length = [
        p for p in polygons if isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0
    ]
    points = [[number_of(value) for value in polygon] for polygon in of_right_length]
    flat = [value for polygon in points for value in polygon if value is not None]
    all_numbers = len(flat) == sum(map(len, points)) and all(map(math.isfinite, flat))
    if not flat or not all_numbers:
        contents.report(
            "bad-segmentation",
            f"a mask is a list of polygons [x, y, x, y, x, y, ...] or a run-length object, got "
            f"{short(segmentation)}",
            picture.name,
            key,
        )
        return None
    xs = [value for polygon in points for value in polygon[::2] if value is not None]
    ys = [value for polygon in points for value in polygon[1::2] if value is not None]
    return min(xs), min(ys), max(xs), max(ys)


# ------------------------------------------------------------------------------ Pascal VOC


def read_voc(root: str | os.PathLike, split: str, classes: Sequence[str] | None = None) -> Contents:
    """The contents of one split of a dataset in Pascal VOC's layout.

    Args:
        classes: the allowed class names; None for those used in the files.

    Raises:
        FileNotFoundError: no image list ``ImageSets/Main/{split}.txt``.
        ValueError: the image list is not text.
    """
    root = Path(root)
    contents = Contents(f"{root}, split {split}", classes=list(classes or []))
    image_ids = voc_image_ids(root, split)
    seen = set()
    for image_id in image_ids:
        if image_id in seen:
            contents.report("duplicate-image-id", f"twice in the list of split {split}", image_id)
            continue
        seen.add(image_id)
        name = f"{image_id}.jpg"
        picture = Picture(name, str(root / "JPEGImages" / name), None)
        contents.pictures.append(picture)
        try:
            tree = read_voc_annotation(root / "Annotations" / f"{image_id}.xml")
        except FileNotFoundError as error:
            contents.report("missing-annotations", str(error), name)
            continue
        except (OSError, ValueError) as error:
            contents.report("unreadable-annotations", str(error), name)
            continue
        _read_voc_tree(tree, picture, classes, contents)
    if classes is None:
        contents.classes = sorted({box.category for p in contents.pictures for box in p.boxes})
    return contents


def _read_voc_tree(
    tree: ElementTree.Element,
    picture: Picture,
    classes: Sequence[str] | None,
    contents: Contents,
) -> None:
    sides = [tree.findtext(f"size/{side}", "") for side in ("width", "height")]
    picture.size = size_of(*map(_parsed, sides))
    if picture.size is None:
        contents.report(
            "bad-field",
            f"<size> needs a <width> and a <height> in whole pixels, got {short(sides)}",
            picture.name,
        )
    for number, element in enumerate(tree.findall("object")):
        category = element.findtext("name", "")
        if not category:
            contents.report("bad-field", "an <object> needs a <name>", picture.name, number)
            continue
        if classes is not None and category not in classes:
            contents.report(
                "unknown-class",
                f"{short(category)}; {_nearest(category[:80], tuple(classes))}",
                picture.name,
                number,
            )
            continue
        try:
            x0, y0, x1, y1 = voc_box(element, Path(picture.name))
        except ValueError as error:
            contents.report("bad-box", str(error), picture.name, number)
            continue
        picture.boxes.append(Box(number, (x0, y0, x1, y1), "VOC", category))


def _parsed(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


@functools.lru_cache(maxsize=1024)  # a wrong name recurs with every object
def _nearest(name: str, classes: tuple[str, ...]) -> str:
    return did_you_mean(name, classes)


# -------------------------------------------------------------- records of a registered set


def read_records(
    records: Iterable[Mapping[str, Any]], classes: Sequence[str], source: str
) -> Contents:
    """The contents of Detectron2's standard records, as ``DatasetCatalog.get`` returns them."""
    contents = Contents(source, classes=list(classes))
    files: set[str] = set()
    keys: set[Name] = set()
    for number, record in enumerate(records):
        file = record.get("file_name") if isinstance(record, Mapping) else None
        if not isinstance(file, str | os.PathLike):
            contents.report("bad-field", f"record {number} needs a 'file_name', got {short(file)}")
            continue
        name = os.fspath(file)
        if name in files:
            contents.report("duplicate-file-name", f"record {number}", name)
        files.add(name)
        key = id_of(record.get("image_id"))
        if key is not None and key in keys:
            contents.report("duplicate-image-id", f"record {number}: id {short(key)} again", name)
        if key is not None:
            keys.add(key)
        # Both are optional; Detectron2 falls back to the image's.
        size = size_of(record.get("width"), record.get("height"))
        if size is None and ("width" in record or "height" in record):
            contents.report(
                "bad-field",
                f"'width' and 'height' in whole pixels, got {short(record.get('width'))} and "
                f"{short(record.get('height'))}",
                name,
            )
        picture = Picture(name, name, size)
        contents.pictures.append(picture)
        for place, annotation in enumerate(record.get("annotations", ())):
            _read_record_annotation(place, annotation, picture, contents)
    return contents


def _read_record_annotation(
    number: int, annotation: Mapping[str, Any], picture: Picture, contents: Contents
) -> None:
    mode = annotation.get("bbox_mode")
    if mode not in (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS):
        contents.report("other-box-mode", short(mode), picture.name, number)
        return
    category = annotation.get("category_id")
    count = len(contents.classes)
    if not isinstance(category, int | np.integer) or not 0 <= category < max(count, 1):
        contents.report(
            "unknown-class",
            f"category_id {short(category)}; the classes are 0 to {count - 1}",
            picture.name,
            number,
        )
        return
    written = four_numbers(annotation.get("bbox"))
    if written is None:
        contents.report("bad-box", short(annotation.get("bbox")), picture.name, number)
        return
    name = contents.classes[int(category)] if count else str(category)
    form: Literal["XYXY", "XYWH"] = "XYXY" if mode == BoxMode.XYXY_ABS else "XYWH"
    crowd = annotation.get("iscrowd", 0) == 1
    picture.boxes.append(Box(number, written, form, name, crowd))
