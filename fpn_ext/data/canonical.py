"""A dataset made fit to train on and to be scored, and written as the COCO JSON for both.

Whatever format the annotations came in, the same photographs and boxes give the same JSON: images
in the order of their names and boxes as they were annotated, ids from 1, every field that an
evaluator reads. What was filled in or left out for it is counted in the dataset's tally.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..names import did_you_mean
from .box_formats import format_problems
from .dataset import AnnotatedImage, Dataset, Instance, names_of, rounded
from .dataset_contents import KINDS, Box
from .mask_area import mask_area
from .picture_files import identity_of, size_of_picture

EMPTY = "boxes have no width or no height: left out"
OUTSIDE = "boxes lie outside their images: left out"
UNUSED = "classes have no boxes, and cannot be learnt"
UNTRAINED = "classes have boxes to be scored on and none to train on: their AP will be 0"
VISIBLE = 0.01  # pixels: a box that reaches further beyond its image is said to be clipped


def complete(dataset: Dataset, classes: Sequence[str] = ()) -> Dataset:
    """Fill in sizes and areas, clip boxes to their images and leave out empty ones; in place.

    Args:
        classes: names in the order of their numbers, where the dataset's are not meant.

    Raises:
        ValueError: images that are not there, twice in a split or of another size than annotated,
            objects of classes that there are none of, no images, or no object to train on.
    """
    tally = dataset.tally
    if classes:
        dataset.classes = list(classes)
    known = set(dataset.classes)
    for image in dataset.images:
        _complete_size(image, dataset)
        for instance in image.instances:
            if instance.category not in known:
                tally.fault(
                    f"objects are of class {instance.category!r}, which classes does not name; "
                    + did_you_mean(instance.category, known),
                    image.file.name,
                )
    boxes = (
        (written_box(0, instance, dataset.format), (image.width, image.height))
        for image in dataset.images
        for instance in image.instances
    )
    for problem in format_problems(boxes):
        tally.fault(f"formats of boxes: {KINDS[problem.kind][1]}", problem.detail)
    look_over(dataset)
    tally.check(dataset.source)
    dataset.splits = {split: images for split, images in dataset.splits.items() if images}
    for image in dataset.images:
        image.instances = [
            instance for instance in image.instances if _complete(instance, image, dataset)
        ]
    used = {instance.category for instance in _objects(dataset.images)}
    if nothing := nothing_to_learn(dataset):
        raise ValueError(nothing + "".join(f"; {line}" for line in tally.lines()))
    for name in dataset.classes:
        if name not in used:
            tally.warn(UNUSED, name)
    for split, images in dataset.splits.items():
        names = names_of([image.file for image in images])
        dataset.splits[split] = sorted(images, key=lambda image: names[image.file])
    return dataset


def look_over(dataset: Dataset) -> None:
    """Count what is wrong with the whole of a dataset, and not with one of its images."""
    tally = dataset.tally
    first_of: dict[object, tuple[str, Path]] = {}  # by file, whatever it is called
    for split, images in dataset.splits.items():
        if not images and split == "val":
            tally.fault("splits have no images: give it some, or leave it out of the data", split)
        elif not images:
            tally.note("splits have no images: left out", split)
        here: set[Path] = set()
        for image in images:
            other, file = first_of.setdefault(identity_of(image.file), (split, image.file))
            name = image.file.name if file == image.file else f"{image.file} is {file}"
            if image.file in here:
                tally.fault("images are twice in a split", f"{image.file}, in {split}")
            elif other != split:
                tally.note(
                    "images are in two splits: a score on what was trained on is worth nothing",
                    f"{name}, in {other} and {split}",
                )
            elif file != image.file:
                tally.note("images are in a split under two names (links to one file)", name)
            here.add(image.file)
    written: dict[str, str] = {}
    for name in dataset.classes:
        other = written.setdefault(" ".join(name.lower().split()), name)
        if other != name:
            tally.note(
                "classes differ from another one in upper and lower case or in spaces alone",
                f"{other!r} and {name!r}",
            )


def nothing_to_learn(dataset: Dataset) -> str:
    """The message for a dataset that nothing can be learnt from; ``""`` for any other.

    One without images to train on may be scored: what is found there is false.
    """
    trained = [image for s, i in dataset.splits.items() if s in ("train", "all") for image in i]
    if dataset.images and (_objects(trained) or not trained):
        return ""
    to_train = "to train on " if len(trained) < len(dataset.images) else ""
    return (
        f"{dataset.source} ({dataset.format}): {len(trained)} images {to_train}and no object on "
        "any of them (crowd regions are none)"
    )


def look_for_untrained(dataset: Dataset) -> None:
    """Count classes that are scored, and that no image to train on has an object of."""
    trained = {i.category for i in _objects(dataset.splits.get("train", []))}
    if not trained:
        return  # nothing is trained on, or nothing is divided yet
    for split, images in dataset.splits.items():
        for name in sorted({i.category for i in _objects(images)} - trained):
            dataset.tally.warn(UNTRAINED, f"{name}, in {split}")


def _objects(images: Sequence[AnnotatedImage]) -> list[Instance]:
    return [i for image in images for i in image.instances if not i.iscrowd]


def written_box(number: int, instance: Instance, written_in: str) -> Box:
    """A box with its four numbers as its format has them; what they look like tells mistakes.

    Args:
        number: of the object on its image.
        written_in: the format.
    """
    x0, y0, x1, y1 = instance.box
    form, written = {
        "coco": ("XYWH", (x0, y0, x1 - x0, y1 - y0)),
        "voc": ("VOC", (x0 + 1, y0 + 1, x1, y1)),
    }.get(written_in, ("XYXY", instance.box))
    mask = instance.segmentation
    extent = None
    if isinstance(mask, list):
        xs = [x for polygon in mask for x in polygon[::2]]
        ys = [y for polygon in mask for y in polygon[1::2]]
        extent = min(xs), min(ys), max(xs), max(ys)
    return Box(number, written, form, instance.category, instance.iscrowd, extent)  # type: ignore[arg-type]


def _complete_size(image: AnnotatedImage, dataset: Dataset) -> None:
    tally = dataset.tally
    try:
        width, height = size_of_picture(image.file)
    except (FileNotFoundError, ValueError) as error:
        tally.fault("images are missing or cannot be read", f"{image.file}: {error}")
        return
    if not (image.width and image.height):
        if dataset.format in ("coco", "voc"):
            tally.note("images had no size: read from the images", image.file.name)
        image.width, image.height = width, height
    elif (image.width, image.height) != (width, height):
        tally.fault(
            "images have another size than annotated (turned by EXIF, or scaled since?)",
            f"{image.file.name}: {width}x{height}, annotated {image.width}x{image.height}",
        )


def _complete(instance: Instance, image: AnnotatedImage, dataset: Dataset) -> bool:
    """Whether there is a box, clipped and with an area."""
    tally, where = dataset.tally, f"{image.file.name}, {instance.category}"
    x0, y0, x1, y1 = instance.box
    if not (x1 > x0 and y1 > y0):
        tally.warn(EMPTY, where)
        return False
    width, height = image.width, image.height
    clipped = rounded((max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)))
    if not (clipped[2] > clipped[0] and clipped[3] > clipped[1]):
        tally.warn(OUTSIDE, where)
        return False
    if max(abs(a - b) for a, b in zip(clipped, instance.box, strict=True)) > VISIBLE:
        tally.note("boxes reach beyond their images: clipped", where)
    instance.box = clipped
    if instance.area is None:
        if instance.segmentation is None:
            x0, y0, x1, y1 = clipped
            source, instance.area = "boxes", round((x1 - x0) * (y1 - y0), 4)
        else:
            source, instance.area = "masks", _mask_area(instance)
        if dataset.format == "coco":
            tally.note(f"annotations had no area: taken from their {source}", where)
    return True


def _mask_area(instance: Instance) -> float:
    """Of polygons by the shoelace formula, as COCO's; of a run-length mask its pixels."""
    mask = instance.segmentation
    if isinstance(mask, dict):
        return float(mask_area(mask, *mask["size"]))
    area = 0.0
    for polygon in mask or ():
        x, y = np.reshape(polygon, (-1, 2)).T
        area += abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))) / 2
    return round(area, 4)


def coco_json(dataset: Dataset, split: str) -> dict[str, Any]:
    """One split of a completed dataset as COCO's JSON.

    ``file_name`` is relative to the common folder of the split's images.
    """
    images = dataset.splits[split]
    names = names_of([image.file for image in images])
    number_of = {name: number for number, name in enumerate(dataset.classes, 1)}
    annotations: list[dict[str, Any]] = []
    for image_id, image in enumerate(images, 1):
        for instance in image.instances:
            x0, y0, x1, y1 = instance.box
            annotation: dict[str, Any] = {
                "id": len(annotations) + 1,
                "image_id": image_id,
                "category_id": number_of[instance.category],
                "bbox": [x0, y0, round(x1 - x0, 2), round(y1 - y0, 2)],
                "area": instance.area,
                "iscrowd": int(instance.iscrowd),
            }
            if instance.segmentation is not None:
                annotation["segmentation"] = instance.segmentation
            if instance.keypoints is not None:
                annotation["keypoints"] = instance.keypoints
                annotation["num_keypoints"] = sum(v > 0 for v in instance.keypoints[2::3])
            annotations.append(annotation)
    categories: list[dict[str, Any]] = [
        {"id": number, "name": name} for name, number in number_of.items()
    ]
    if dataset.keypoint_names:
        for category in categories:
            category["keypoints"] = dataset.keypoint_names
    return {
        "info": {"description": f"the split {split}"},
        "images": [
            {
                "id": image_id,
                "file_name": names[image.file],
                "width": image.width,
                "height": image.height,
            }
            for image_id, image in enumerate(images, 1)
        ],
        "annotations": annotations,
        "categories": categories,
    }
