"""A small synthetic detection dataset in COCO format, with objects of every COCO size.

Five shapes (disc, square, triangle, star, ring) in random colours on cluttered backgrounds.
Colour, texture and size are independent of the class, so only the shape distinguishes classes,
and objects from distractors. Box sides range from about 17 to 210 pixels, which spreads the boxes
over all levels of a feature pyramid. Needs only NumPy, Pillow and the standard library.

    fpn-ext demo-data --output datasets/demo_multiscale

writes ``train/``, ``val/``, ``annotations/instances_{train,val}.json`` and ``info.json``.

All coordinates are in pixels with the origin in the top-left corner; boxes are XYWH.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from ..files.atomic import staged_folder
from ..reporting.json_files import write_json
from .demo_annotations import annotation_of
from .demo_scenes import make_family, make_scene
from .demo_shapes import CLASS_NAMES

SPLITS = ("train", "val")
# Part of a dataset's identity: increment with every change that alters a pixel or a box.
GENERATOR_VERSION = 2
MIN_IMAGE_SIZE = 128
_JPEG_QUALITY = 92


def _area_bin(area: float) -> str:
    if area < 32**2:
        return "small"
    return "medium" if area <= 96**2 else "large"


def _summarize(dataset: dict[str, Any]) -> dict[str, Any]:
    """Counts of one split; boxes exclude crowd regions."""
    single = [ann for ann in dataset["annotations"] if not ann["iscrowd"]]
    occupied = {ann["image_id"] for ann in dataset["annotations"]}
    by_class = dict.fromkeys(CLASS_NAMES, 0)
    by_area = dict.fromkeys(("small", "medium", "large"), 0)
    by_box_area = dict(by_area)
    for ann in single:
        by_class[CLASS_NAMES[ann["category_id"] - 1]] += 1
        by_area[_area_bin(ann["area"])] += 1
        by_box_area[_area_bin(ann["bbox"][2] * ann["bbox"][3])] += 1
    return {
        "images": len(dataset["images"]),
        "empty_images": len(dataset["images"]) - len(occupied),
        "boxes": len(single),
        "crowd_regions": len(dataset["annotations"]) - len(single),
        "boxes_per_class": by_class,
        "boxes_per_area": by_area,
        "boxes_per_box_area": by_box_area,
    }


def _write_split(root: Path, split: str, options: dict[str, int]) -> dict[str, Any]:
    """Write the images and annotations of one split, and return its summary."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    (root / split).mkdir()
    for index in range(options[f"num_{split}"]):
        # A separate random stream per image: independent of the number of images.
        rng = np.random.default_rng([options["seed"], SPLITS.index(split), index])
        if options["companions"]:
            image, scene = make_family(rng, options["image_size"], options["companions"])
        else:
            image, scene = make_scene(rng, options["image_size"], options["distractors"])
        name, image_id = f"{index + 1:06d}.jpg", index + 1
        image.save(root / split / name, quality=_JPEG_QUALITY)
        images.append(
            {
                "id": image_id,
                "file_name": name,
                "width": image.width,
                "height": image.height,
                "license": 1,
            }
        )
        for number in (n for n, item in enumerate(scene.items) if item.annotated):
            ids = {"id": len(annotations) + 1, "image_id": image_id}
            annotations.append(ids | annotation_of(scene, number))
    dataset = {
        "info": {
            "description": f"fpn_ext synthetic multi-scale shapes, {split}",
            "version": str(GENERATOR_VERSION),
        },
        "licenses": [{"id": 1, "name": "Apache License 2.0", "url": ""}],
        "images": images,
        "annotations": annotations,
        "categories": [
            {"id": number, "name": name, "supercategory": "shape"}
            for number, name in enumerate(CLASS_NAMES, start=1)
        ],
    }
    (root / "annotations").mkdir(exist_ok=True)
    write_json(root / "annotations" / f"instances_{split}.json", dataset, indent=None)
    return _summarize(dataset)


def _check_options(**options: Any) -> dict[str, int]:
    """The options as a dict; ValueError for an invalid value."""
    least = {
        "seed": 0,
        "num_train": 1,
        "num_val": 1,
        "image_size": MIN_IMAGE_SIZE,
        "distractors": 0,
        "companions": 0,
    }
    for name, minimum in least.items():
        value = options[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise ValueError(f"{name}: got {value!r}, needed an integer of at least {minimum}")
    if options["companions"] == 1:
        raise ValueError("companions: got 1, needed 0 or at least 2")
    if options["companions"] and options["distractors"]:
        raise ValueError(
            f"distractors: got {options['distractors']}, needed 0 in images with companions"
        )
    return options


def _load_existing(root: Path, options: dict[str, int]) -> dict[str, Any] | None:
    """The summary of the dataset in ``root``; None if it is empty or missing.

    Raises ValueError if ``root`` holds anything other than a dataset with these ``options``.
    """
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return None
    advice = f"delete {root} or choose another root"
    try:
        info = json.loads((root / "info.json").read_text(encoding="utf-8"))
        # Datasets without these options have no distractors and no companions.
        version = info["generator_version"]
        found = {"generator_version": version, "distractors": 0, "companions": 0, **info["options"]}
        summary: dict[str, Any] = info["summary"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{root} exists but holds no dataset of this kind; {advice}") from error
    wanted = {"generator_version": GENERATOR_VERSION, **options}
    differences = [
        f"{name} is {found.get(name)!r}, needed {value!r}"
        for name, value in wanted.items()
        if found.get(name) != value
    ]
    if differences:
        raise ValueError(f"{root} holds another dataset ({'; '.join(differences)}); {advice}")
    return summary


def _create(target: Path, options: dict[str, int]) -> dict[str, Any]:
    """Generate a dataset beside ``target``, move it there when complete, return its summary."""
    try:
        with staged_folder(target) as folder:
            summary = {split: _write_split(folder, split, options) for split in SPLITS}
            info = {"generator_version": GENERATOR_VERSION, "options": options, "summary": summary}
            write_json(folder / "info.json", info, indent=None)
    except OSError:
        # Another process may have been faster; its dataset will do if the options match.
        existing = _load_existing(target, options)
        if existing is None:
            raise
        return existing
    return summary


def generate(
    root: str | os.PathLike[str],
    *,
    seed: int = 0,
    num_train: int = 800,
    num_val: int = 160,
    image_size: int = 224,
    distractors: int = 0,
    companions: int = 0,
) -> dict[str, Any]:
    """Generate the dataset in ``root``, which must be empty or not exist.

    Args:
        root: folder to create; it appears only when complete.
        seed: non-negative; the same options give the same images and annotations.
        num_train, num_val: number of images, at least 1 each.
        image_size: longer side of the images in pixels, at least 128. Object sizes in pixels do
            not depend on it, so below about 200 fewer large objects fit.
        distractors: max number of other shapes (plus, half-disc, hourglass, chevron, arch) per
            image, drawn like the objects but not annotated, so that only the shape identifies an
            object of any size.
        companions: max number of small discs per image, at least 2, whose class only the larger
            shapes of the image tell (:func:`fpn_ext.data.demo_scenes.make_family`); 0 for none.

    Returns:
        The counts per split, also stored in ``info.json``.
    """
    options = _check_options(
        seed=seed,
        num_train=num_train,
        num_val=num_val,
        image_size=image_size,
        distractors=distractors,
        companions=companions,
    )
    target = Path(root).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists and is not empty; delete it or use ensure()")
    return _create(target, options)


def ensure(
    root: str | os.PathLike[str],
    *,
    seed: int = 0,
    num_train: int = 800,
    num_val: int = 160,
    image_size: int = 224,
    distractors: int = 0,
    companions: int = 0,
) -> dict[str, Any]:
    """Like ``generate``, but reuse a dataset generated in ``root`` with the same options.

    Raises ValueError if ``root`` holds anything else; nothing is ever overwritten.
    """
    options = _check_options(
        seed=seed,
        num_train=num_train,
        num_val=num_val,
        image_size=image_size,
        distractors=distractors,
        companions=companions,
    )
    target = Path(root).absolute()
    existing = _load_existing(target, options)
    return _create(target, options) if existing is None else existing


def default_root() -> str:
    """``demo_multiscale`` in the folder where Detectron2 looks for datasets."""
    return os.path.join(os.environ.get("DETECTRON2_DATASETS", "datasets"), "demo_multiscale")


def table(summary: dict[str, Any]) -> str:
    """The summary as text, one column per split."""
    rows: list[tuple[str, list[str]]] = [("", list(summary))]
    parts = list(summary.values())
    for key, value in parts[0].items():
        label = key.replace("_", " ")
        if not isinstance(value, dict):
            rows.append((label, [str(part[key]) for part in parts]))
            continue
        rows.append((label, []))
        for name in value:
            cells = [
                f"{part[key][name]} ({part[key][name] / max(part['boxes'], 1):4.0%})"
                for part in parts
            ]
            rows.append((f"  {name}", cells))
    return "\n".join(
        f"{label:<20}" + "".join(f"{cell:>14}" for cell in cells) for label, cells in rows
    )
