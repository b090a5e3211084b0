"""What Detectron2 and pycocotools cannot read in a COCO file, or would misread without a word.

All annotations are looked at, and no picture is opened; ``fpn-ext data`` looks at every box and
picture. What is found is one sentence for each kind: how many, the first of them, what mends it.
"""

import functools
import math
import os
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from ..files.json_lists import ListInFile, State, read_json, state_of
from .dataset_contents import Name, four_numbers, id_of, short, size_of

MOST_PIXELS = 1 << 30
LONG_LISTS = ("images", "annotations")  # read entry by entry


class Faults:
    """Faults by kind: how often each was met, and where first."""

    def __init__(self) -> None:
        self.found: dict[str, list[Any]] = {}  # remedy: [count, what and where first]

    def add(self, remedy: str, where: str) -> None:
        self.found.setdefault(remedy, [0, where])[0] += 1

    def sentences(self) -> list[str]:
        return [
            f"{where}{f' (the first of {count})' if count > 1 else ''}: {remedy}"
            for remedy, (count, where) in self.found.items()
        ]

    def check(self, source: str) -> None:
        """Raise ValueError with all of them if there are any."""
        if self.found:
            raise ValueError(
                f"{source}: {len(self.found)} kind(s) of fault; fpn-ext data lists every place\n"
                + "\n".join(f"  - {sentence}" for sentence in self.sentences())
            )


def check_coco_file(json_file: str | os.PathLike, image_root: str | os.PathLike = "") -> list[str]:
    """What there is to say of a COCO instances JSON that can be used.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it cannot be read, or something of it would be lost or misread.
    """
    file = os.fspath(json_file)
    return list(_checked(file, os.fspath(image_root), state_of(file)))


def coco_class_names(json_file: str | os.PathLike) -> tuple[str, ...]:
    """The class names of a COCO JSON in the order of their ids, as Detectron2 numbers them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not such a file.
    """
    file = os.fspath(json_file)
    return _names(file, state_of(file))


@functools.lru_cache(maxsize=16)
def _names(file: str, state: State) -> tuple[str, ...]:
    try:
        categories = _read(file, state)["categories"]
        return tuple(c["name"] for c in sorted(categories, key=lambda c: c["id"]))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file}: 'categories' needs an 'id' and a 'name' for each") from error


def coco_lists(json_file: str | os.PathLike) -> Mapping[str, Any]:
    """As :func:`read_coco_json`, with :data:`LONG_LISTS` kept in the file; not to be changed.

    A file that was not changed since is not read again.
    """
    file = os.fspath(json_file)
    return _read(file, state_of(file))


@functools.lru_cache(maxsize=4)
def _read(file: str, state: State) -> Mapping[str, Any]:
    return read_coco_json(file, LONG_LISTS)


def read_coco_json(file: str, kept_in_file: Collection[str] = ()) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        kept_in_file: its lists that are read entry by entry (:class:`ListInFile`).

    Raises:
        ValueError: not JSON, not UTF-8, a byte order mark, or something else than an object.
    """
    with open(file, "rb") as stream:
        beginning = stream.read(3)
    if beginning.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(
            f"{file} begins with a byte order mark, which JSON does not allow and pycocotools "
            "cannot read: save it as UTF-8 without one"
        )
    try:
        data = read_json(file, kept_in_file)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{file} must hold an object {{...}}, got {short(data)}")
    return data


@functools.lru_cache(maxsize=16)  # what was found, not what was read
def _checked(file: str, image_root: str, state: State) -> tuple[str, ...]:
    data = _read(file, state)
    faults = Faults()
    for key in ("categories", "images"):
        if not isinstance(data.get(key), list | ListInFile) or not data[key]:
            faults.add(
                "COCO's format lists them there", f"{key!r} is {short(data.get(key))}, no list"
            )
    if not isinstance(data.get("annotations", []), list | ListInFile):
        faults.add("it must be a list", f"'annotations' is {short(data['annotations'])}")
    faults.check(file)
    classes = _check_classes(data["categories"], faults)
    images, sides = _check_images(data["images"], image_root, faults)
    strays = _check_annotations(
        *(data.get("annotations", []), images, sides, classes, faults), unique="minival" not in file
    )
    faults.check(file)
    notes = []
    if strays:
        notes.append(f"{file}: {strays} annotation(s) of images that it does not list; not used")
    return tuple(notes)


def _check_classes(entries: Iterable[Any], faults: Faults) -> set[Any]:
    names: dict[Any, str] = {}
    for entry in entries:
        key = id_of(entry.get("id")) if isinstance(entry, dict) else None
        name = entry.get("name") if isinstance(entry, dict) else None
        if key is None or not isinstance(name, str):
            faults.add("each needs an 'id' and a 'name'", f"categories: {short(entry)}")
        elif key in names:
            faults.add("each class needs an id of its own", f"categories: id {short(key)} again")
        elif name in names.values():
            faults.add("each class needs a name of its own", f"categories: {short(name)} again")
        else:
            names[key] = name
    if len({type(key) for key in names}) > 1:
        faults.add("write all as whole numbers", "categories: ids that are numbers and text")
    return set(names)


def _check_images(
    entries: Iterable[Any], image_root: str, faults: Faults
) -> tuple[dict[Name, str], dict[Name, int]]:
    """Returns names and longer sides by image id."""
    names: dict[Name, str] = {}
    sides: dict[Name, int] = {}
    for entry in entries:
        key = id_of(entry.get("id")) if isinstance(entry, dict) else None
        name = entry.get("file_name") if isinstance(entry, dict) else None
        if key is None or not isinstance(name, str) or not name:
            faults.add("each needs an 'id' and a 'file_name'", f"images: {short(entry)}")
            continue
        if key in names:
            faults.add(
                "each image needs an id of its own; the last alone would be used",
                f"image {short(name)}: id {short(key)} is also that of {short(names[key])}",
            )
        names[key] = name
        size = size_of(entry.get("width"), entry.get("height"))
        sides[key] = max(size or (0,))
        if size and size[0] * size[1] > MOST_PIXELS:
            faults.add(
                f"no image of more than {MOST_PIXELS} pixels is read; write the file's size",
                f"image {short(name)}: {size[0]} x {size[1]}",
            )
        if size is None:
            faults.add(
                "Detectron2 and the evaluation read 'width' and 'height' in whole pixels; write "
                "them",
                f"image {short(name)}: {short(entry.get('width'))} x {short(entry.get('height'))}",
            )
        if "\\" in name and not os.path.exists(os.path.join(image_root, name)):
            faults.add(
                "the path has Windows' backslashes, and no such file is there; write /",
                f"image {short(name)}",
            )
    if len({type(key) for key in names}) > 1:
        faults.add("write all as whole numbers, or all as text", "images: ids that are both")
    return names, sides


def _check_annotations(
    entries: Iterable[Any],
    images: dict[Name, str],
    sides: dict[Name, int],
    classes: set[Any],
    faults: Faults,
    unique: bool,
) -> int:
    """Returns how many annotations are of no image of the file."""
    ids: set[Any] = set()
    as_text = {str(key): key for key in images}
    strays = 0
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict):
            faults.add("each must be an object", f"annotations[{number}] is {short(entry)}")
            continue
        key = id_of(entry.get("id"))
        image = id_of(entry.get("image_id"))

        def where(number: int = number, entry: dict[str, Any] = entry) -> str:
            return f"annotations[{number}], id {short(entry.get('id'))}"

        if key is None:
            faults.add("each needs an 'id', a whole number or text", where())
        elif key in ids and unique:
            faults.add("each annotation needs an id of its own; Detectron2 refuses these", where())
        ids.add(key)
        if image not in images:
            if str(image) in as_text:
                faults.add(
                    "'image_id' and the image's 'id' must both be numbers or both be text; as "
                    "they are, the object belongs to no image",
                    f"{where()}: image_id {short(image)}, id {short(as_text[str(image)])}",
                )
            else:
                strays += 1
            continue
        _check_object(entry, sides[image], classes, faults, where)
    return strays


def _check_object(
    entry: dict[str, Any], side: int, classes: set[Any], faults: Faults, where: Any
) -> None:
    category = entry.get("category_id")
    if id_of(category) not in classes:
        faults.add(
            "'category_id' is not the id of one of 'categories'", f"{where()}: {short(category)}"
        )
    if four_numbers(entry.get("bbox")) is None:
        faults.add(
            "'bbox' must be four finite numbers [x, y, width, height]",
            f"{where()}: {short(entry.get('bbox'))}",
        )
    if entry.get("iscrowd", 0) not in (0, 1):
        faults.add("'iscrowd' must be 0 or 1", f"{where()}: {short(entry['iscrowd'])}")
    if entry.get("ignore", 0) != 0:
        faults.add("Detectron2 refuses 'ignore'; a region to be ignored has 'iscrowd' 1", where())
    segmentation = entry.get("segmentation")
    if isinstance(segmentation, dict) and not {"size", "counts"} <= set(segmentation):
        faults.add(
            "a run-length mask needs 'size' and 'counts'", f"{where()}: {short(segmentation)}"
        )
    elif segmentation and not isinstance(segmentation, list | dict):
        faults.add(
            "'segmentation' must be a list of polygons or a run-length mask",
            f"{where()}: {short(segmentation)}",
        )
    elif isinstance(segmentation, list) and not all(
        isinstance(polygon, list) for polygon in segmentation
    ):
        faults.add(
            "a list of polygons is a list of lists [[x, y, x, y, ...]]",
            f"{where()}: {short(segmentation)}",
        )
    elif isinstance(segmentation, list) and not all(_is_near(p, side) for p in segmentation):
        faults.add(
            "a polygon's coordinates must be numbers, no further outside the image than it is long",
            f"{where()}: {short(segmentation)}",
        )


def _is_near(polygon: list[Any], side: int) -> bool:
    """Whether a polygon is one of an image; pycocotools' memory grows with its coordinates."""
    if not polygon or not side:  # no side: said already
        return True
    try:
        low, high, total = min(polygon), max(polygon), sum(polygon)
        return bool(math.isfinite(total) and -side <= low and high <= 2 * side)
    except (TypeError, OverflowError):
        return False
