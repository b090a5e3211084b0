"""YOLO's text files, one per image, with their data.yaml, read and written.

A line is ``class x y width height`` (centre and sides as fractions of the image's), a polygon
``class x y x y x y ...``, or with ``kpt_shape`` a box and its keypoints. The labels of
``images/.../a.jpg`` are ``labels/.../a.txt``, or ``a.txt`` beside it.
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from ...files.paths import without_dots
from ..data_file import DataFile, Source
from ..dataset import AnnotatedImage, Dataset, Instance, Tally, names_of, rounded
from ..picture_files import size_of_picture
from ..reading import PICTURE_SUFFIXES
from .layout import NAMES, Files, by_split, check_folders, lines_of
from .pictures import copy_pictures

CLASS_LISTS = ("classes.txt", "names.txt")
NOT_LABELS = {*CLASS_LISTS, "requirements.txt", "license.txt", "readme.txt"}
SLACK = 0.01  # of an image's side, by which a coordinate may lie beyond it and be clipped


def find(files: Files) -> dict[str, Source]:
    """The splits of the images in a folder that has label files; {} where it has none.

    Raises:
        ValueError: some images are in a folder that names a split, and others are not.
    """
    texts = [file for file in files.others[".txt"] if file.name.lower() not in NOT_LABELS]
    if not any(_looks_like_labels(file) for file in texts[:100]):
        return {}
    of_split = by_split(
        files.pictures, {file: files.split_of(file) for file in files.pictures}, "images"
    )
    return {
        split: Source(images=tuple(str(f.relative_to(files.root)) for f in several))
        for split, several in of_split.items()
    }


def _looks_like_labels(file: Path) -> bool:
    with file.open("rb") as stream:
        line = stream.readline(4096).split()
    try:
        numbers = [float(word) for word in line]
    except ValueError:
        return False
    return len(numbers) >= 5 and numbers[0] % 1 == 0 and all(0 <= v <= 1 for v in numbers[1:5])


def read(data: DataFile, splits: Mapping[str, Source], files: Files) -> Dataset:
    """The images and objects of each split.

    Raises:
        FileNotFoundError: a folder or a list that is not there.
        ValueError: no names of the classes.
    """
    tally = Tally()
    names = list(data.names or _listed_names(files) or data.classes)
    if not names:
        raise ValueError(
            f"{data.root}: YOLO's label files number the classes and nothing names them: write "
            "`names: [first, second]` into data.yaml in the folder (or `classes:` in the data file)"
        )
    if data.names and data.classes and set(data.names) != set(data.classes):
        raise ValueError(f"{data.file}: names and classes differ: leave classes out")
    dataset = Dataset(data.file, "yolo", names, {}, [], tally)
    if data.keypoints:
        dataset.keypoint_names = [f"keypoint_{i}" for i in range(data.keypoints[0])]
    used: set[Path | None] = set()
    for split, source in splits.items():
        labels = [data.root / name for name in source.annotations]
        check_folders(data, labels)
        dataset.splits[split] = images = []
        for folder, picture in _pictures(data.root, source, tally):
            file = _label_file(picture, folder, labels)
            used.add(file)
            images.append(_image(picture, file, names, data.keypoints, tally))
    if not data.splits:
        for file in files.others[".txt"]:
            if (
                file not in used
                and file.name.lower() not in NOT_LABELS
                and _looks_like_labels(file)
            ):
                tally.note(
                    "label files are of no image (beside it, or images/ to labels/)", file.name
                )
    return dataset


def _listed_names(files: Files) -> list[str]:
    """Of classes.txt, as labelImg and Label Studio write it, or Darknet's obj.names."""
    for file in (*files.others[".txt"], *files.others[NAMES]):
        if file.name in CLASS_LISTS or file.suffix == NAMES:
            lines = lines_of(file)
            return [line.strip() for line in lines if line.strip()]
    return []


def _pictures(root: Path, source: Source, tally: Tally) -> Iterable[tuple[Path, Path]]:
    """(the folder it was found through, file) of each image of a split."""
    for written in source.images:
        path = root / written
        if not path.exists() and written.startswith("../"):  # as Roboflow writes them
            path = root / written.removeprefix("../")
        if not path.exists() and Path(written).is_absolute():
            path = _moved(root, path)
            tally.note("paths are of another machine: their last folders are here", written)
        path = without_dots(path)  # also of links, from which labels/ is found
        if path.is_dir():
            yield from ((path, picture) for picture in Files(path).pictures)
        elif path.suffix.lower() in PICTURE_SUFFIXES:
            yield path.parent, path
        elif path.is_file():
            for line in lines_of(path):
                if line.strip():
                    yield path.parent, without_dots(path.parent / line.strip())
        else:
            raise FileNotFoundError(f"no folder, list or image {path}")


def _moved(root: Path, path: Path) -> Path:
    """What lies under root with the most of a path's last parts; the path where nothing does."""
    parts = path.parts[1:]
    here = (root.joinpath(*parts[first:]) for first in range(len(parts)))
    return next((candidate for candidate in here if candidate.exists()), path)


def _label_file(picture: Path, folder: Path, labels: list[Path]) -> Path | None:
    """None where an image has none: it is one without objects."""
    candidates = []
    if picture.is_relative_to(folder):
        candidates += [label / picture.relative_to(folder) for label in labels]
    parts = list(picture.parts)
    if not labels and "images" in parts:
        last = len(parts) - 1 - parts[::-1].index("images")
        candidates.append(Path(*parts[:last], "labels", *parts[last + 1 :]))
    candidates += [label / picture.name for label in labels] or [picture]
    files = (c.with_suffix(suffix) for c in candidates for suffix in (".txt", ".TXT"))
    return next((file for file in files if file.is_file()), None)


def _image(
    picture: Path, labels: Path | None, names: list[str], keypoints: tuple | None, tally: Tally
) -> AnnotatedImage:
    try:
        width, height = size_of_picture(picture)
    except (FileNotFoundError, ValueError):  # said where all images are looked at
        return AnnotatedImage(picture)
    image = AnnotatedImage(picture, width, height)
    if labels is None:
        tally.note("images have no label file: taken as images without objects", picture.name)
        return image
    for number, line in enumerate(lines_of(labels), 1):
        if not line.strip():
            continue
        where = f"{labels.name}, line {number}"
        try:
            category, *values = (float(word) for word in line.split())
        except ValueError:
            tally.fault("lines are no numbers", where)
            continue
        if category % 1 or not 0 <= category < len(names):
            # As sahi writes them from COCO's ids.
            hint = ", as where classes are counted from 1" if category == len(names) else ""
            tally.fault(f"lines have a class that is none of 0 to {len(names) - 1}{hint}", where)
        elif not all(map(math.isfinite, values)) or any(
            not -SLACK <= value <= 1 + SLACK for value in values[: 4 if keypoints else None]
        ):
            tally.fault("lines have numbers beyond 0 to 1: they are fractions of the sides", where)
        else:
            instance = _instance(names[int(category)], values, (width, height), keypoints)
            if instance is None:
                tally.fault(
                    f"lines have {len(values) + 1} numbers: a class and 4, or 3 and more points"
                    + (f", or 4 and keypoints {list(keypoints)}" if keypoints else ""),
                    where,
                )
            else:
                image.instances.append(instance)
    return image


def _instance(
    name: str, values: list[float], size: tuple[int, int], keypoints: tuple | None
) -> Instance | None:
    width, height = size
    if keypoints and len(values) == 4 + keypoints[0] * keypoints[1]:
        points = []
        for i in range(4, len(values), keypoints[1]):
            x, y, *visible = values[i : i + keypoints[1]]
            points += [round(x * width, 2), round(y * height, 2), int(visible[0]) if visible else 2]
        return Instance(name, _box(values, width, height), keypoints=points)
    if len(values) == 4:
        return Instance(name, _box(values, width, height))
    if len(values) >= 6 and len(values) % 2 == 0:
        polygon = [round(v * (height if i % 2 else width), 2) for i, v in enumerate(values)]
        xs, ys = polygon[::2], polygon[1::2]
        return Instance(name, rounded((min(xs), min(ys), max(xs), max(ys))), False, [polygon])
    return None


def _box(values: list[float], width: int, height: int) -> tuple[float, float, float, float]:
    x, y, w, h = values[:4]
    return rounded(
        ((x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height)
    )


def write(dataset: Dataset, folder: Path) -> None:
    """``images/{split}/``, ``labels/{split}/`` and data.yaml.

    Crowd regions and masks that are no single polygon are left out, and counted; of the latter the
    boxes are written.

    Raises:
        ValueError: two images whose labels would be one file.
    """
    import yaml

    has_keypoints = bool(dataset.keypoint_names)
    for split, images in dataset.splits.items():
        names = names_of([image.file for image in images])
        labels = [str(Path(name).with_suffix("")) for name in names.values()]
        if len(set(labels)) < len(labels):
            raise ValueError(f"{split} has images of one name and two suffixes: rename them")
        copy_pictures(images, names, folder / "images" / split)
        for image in images:
            file = folder / "labels" / split / Path(names[image.file]).with_suffix(".txt")
            file.parent.mkdir(parents=True, exist_ok=True)
            lines = _lines(image, dataset, has_keypoints)
            file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    about: dict = {"path": "."}
    about |= {split if split != "all" else "train": f"images/{split}" for split in dataset.splits}
    about["names"] = dict(enumerate(dataset.classes))
    if has_keypoints:
        about["kpt_shape"] = [len(dataset.keypoint_names), 3]
    text = yaml.safe_dump(about, sort_keys=False, allow_unicode=True)
    (folder / "data.yaml").write_text(text, encoding="utf-8")


def _lines(image: AnnotatedImage, dataset: Dataset, has_keypoints: bool) -> Iterable[str]:
    tally, sides = dataset.tally, (image.width, image.height)
    for instance in image.instances:
        if instance.iscrowd:
            tally.note("crowd regions left out: YOLO has none", image.file.name)
            continue
        x0, y0, x1, y1 = instance.box
        values = [(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0]
        mask = instance.segmentation
        one_polygon = isinstance(mask, list) and len(mask) == 1
        if mask and (has_keypoints or not one_polygon):
            tally.note("masks are not one polygon: their boxes are written", image.file.name)
        elif isinstance(mask, list):
            values = mask[0]
        fractions = [value / sides[i % 2] for i, value in enumerate(values)]
        if has_keypoints:
            points = instance.keypoints or [0] * (3 * len(dataset.keypoint_names))
            fractions += [
                value / sides[i % 3] if i % 3 < 2 else value for i, value in enumerate(points)
            ]
        number = dataset.classes.index(instance.category)
        yield " ".join([str(number), *(f"{value:.10g}" for value in fractions)])
