"""A dataset described by a YAML file, or by the folder it lies in.

    format: voc                  # coco, voc, yolo or deeppcb; found out where it is left out
    path: /data/photos           # where the rest lies, relative to this file; default: beside it
    name: photos                 # default: the folder's
    classes: [cat, dog]          # names and their order; default: those of the annotations
    train: {images: images/train, annotations: labels/train}  # or a string, or a list of them
    val: ...
    test: ...
    split: 0.2                   # share of the images held out as val where there is no val
    seed: 1                      # of that split
    split_file: my_split.json    # a split that was written before
    corners: 0                   # of VOC: the number of the first pixel, 1 by VOC's convention
    unannotated: empty           # images that no annotation names have no objects; or: left out

All keys may be left out. YOLO's own data.yaml is such a file as well.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..files.paths import without_dots
from ..files.safe_yaml import load_yaml
from ..names import did_you_mean
from .dataset import SPLITS

FORMATS = ("coco", "voc", "yolo", "deeppcb")
KEYS = (
    *("name", "format", "path", "classes", *SPLITS),
    *("split", "seed", "split_file", "corners", "unannotated"),
)
# What YOLO's data.yaml may hold besides; of these, only names and kpt_shape say something here.
YOLO_KEYS = (
    *("names", "nc", "kpt_shape", "flip_idx", "kpt_names", "channels", "download", "roboflow"),
    *("author", "date", "license", "version", "description", "docs", "yaml_file"),
)
IN_A_FOLDER = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
UNANNOTATED = ("left out", "empty")
NAMED_BY_SPLIT = {"training": "train", "valid": "val", "validation": "val", "testing": "test"}


@dataclass(frozen=True)
class Source:
    """Where one split lies: paths as they are written, relative to :attr:`DataFile.root`.

    Attributes:
        images: folders, lists of images, or files.
        annotations: JSON files, or folders of XML or of label files.
    """

    images: tuple[str, ...] = ()
    annotations: tuple[str, ...] = ()


@dataclass(frozen=True)
class DataFile:
    """What is known of a dataset before its files are looked at; see the module."""

    file: Path  # of the description, or the folder
    root: Path
    name: str
    format: str = ""
    classes: tuple[str, ...] = ()
    splits: Mapping[str, Source] = field(default_factory=dict)
    split: float = 0.2
    seed: int = 1
    split_file: Path | None = None
    corners: int | None = None
    unannotated: str = "left out"
    names: tuple[str, ...] = ()  # YOLO's
    keypoints: tuple[int, int] | None = None  # YOLO's kpt_shape: how many, numbers of each
    notes: tuple[str, ...] = ()


def open_data(path: str | Path) -> DataFile:
    """The description in a YAML file, or of a folder: its data.yaml, if it has one.

    Raises:
        FileNotFoundError: nothing of this name.
        ValueError: the file is no YAML, or has an unknown key or a value of a wrong kind.
    """
    path = without_dots(Path(path).expanduser())
    if path.is_dir():
        described = [path / name for name in IN_A_FOLDER if (path / name).is_file()]
        if len(described) > 1:
            names = " and ".join(file.name for file in described)
            raise ValueError(f"{path} has {names}: name the one that is meant, with --data")
        if not described:
            return DataFile(path, path, safe_name(path.name))
        path = described[0]
    if not path.is_file():
        raise FileNotFoundError(
            f"--data: no file or folder {path}; it is a folder of photographs and annotations, or "
            "a YAML file that describes one (docs/start/your_data.md)"
        )
    if path.suffix.lower() == ".json":  # one of COCO's
        source = Source(annotations=(path.name,))
        return DataFile(path, path.parent, safe_name(path.stem), "coco", splits={"all": source})
    return _parsed(path, _content(path))


def _content(file: Path) -> dict[str, Any]:
    try:
        content = load_yaml(file.read_text(encoding="utf-8-sig"), f"--data: {file}")
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--data: {file} is not YAML in UTF-8: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"--data: {file} must hold keys ({', '.join(KEYS)}), got {type(content).__name__}"
        )
    return content


def _parsed(file: Path, content: dict[str, Any]) -> DataFile:
    for key in content:
        if key not in (*KEYS, *YOLO_KEYS):
            raise ValueError(
                f"--data: {file} has an unknown key {key!r}; {did_you_mean(str(key), KEYS)}"
            )
    root, notes = _root(file, content)
    generic = file.name in IN_A_FOLDER
    name = _of_type(file, content, "name", str, root.name if generic else file.stem)
    kind = _of_type(file, content, "format", str, "yolo" if "names" in content else "")
    if kind not in ("", *FORMATS):
        raise ValueError(f"--data: {file}: format {kind!r}; {did_you_mean(kind, FORMATS)}")
    share = float(_of_type(file, content, "split", (int, float), 0.2))
    if not 0 <= share < 1:
        raise ValueError(
            f"--data: {file}: split is a share of the images, from 0 to below 1, got {share:g}"
        )
    corners = _of_type(file, content, "corners", int, None)
    if corners not in (None, 0, 1):
        raise ValueError(f"--data: {file}: corners is 0 or 1, the first pixel, got {corners}")
    unannotated = _of_type(file, content, "unannotated", str, UNANNOTATED[0])
    if unannotated not in UNANNOTATED:
        raise ValueError(
            f"--data: {file}: unannotated {unannotated!r}; {did_you_mean(unannotated, UNANNOTATED)}"
        )
    names = tuple(_class_names(file, content.get("names"), "names"))
    count = _of_type(file, content, "nc", int, len(names))
    if names and count != len(names):
        raise ValueError(f"--data: {file}: nc is {count}, and names has {len(names)} of them")
    split_file = _of_type(file, content, "split_file", str, None)
    if content.get("download"):
        notes.append(f"{file.name}: nothing is downloaded (its key download is not read)")
    return DataFile(
        file,
        root,
        safe_name(name),
        kind,
        tuple(_class_names(file, content.get("classes"), "classes")),
        {s: _source(file, s, content[s]) for s in SPLITS if content.get(s)},
        share,
        _of_type(file, content, "seed", int, 1),
        (file.parent / split_file) if split_file else None,
        corners,
        unannotated,
        names,
        _keypoint_shape(file, content.get("kpt_shape")),
        tuple(notes),
    )


def _root(file: Path, content: dict[str, Any]) -> tuple[Path, list[str]]:
    written = _of_type(file, content, "path", str, "")
    root = file.parent / Path(written).expanduser()
    if root.is_dir():
        return without_dots(root), []
    # YOLO's tools look from a folder of all datasets, which here is most often the file's parent.
    for other in (file.parent, file.parent.parent / written):
        if "names" in content and all(
            (other / name).exists() for s in SPLITS for name in _paths(content.get(s))
        ):
            note = f"{file.name}: no folder path {written!r}; {other} has what it names"
            return without_dots(other), [note]
    raise FileNotFoundError(f"--data: {file}: path {written!r} is no folder ({root})")


def _paths(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [text for text in values if isinstance(text, str)]


def _source(file: Path, split: str, value: Any) -> Source:
    if isinstance(value, Mapping):
        unknown = [key for key in value if key not in ("images", "annotations")]
        if unknown:
            raise ValueError(
                f"--data: {file}: {split} has an unknown key {unknown[0]!r}; "
                f"{did_you_mean(str(unknown[0]), ('images', 'annotations'))}"
            )
        return Source(
            _texts(file, f"{split}: images", value.get("images", [])),
            _texts(file, f"{split}: annotations", value.get("annotations", [])),
        )
    return Source(images=_texts(file, split, value))


def _texts(file: Path, key: str, value: Any) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) and text for text in values):
        raise ValueError(f"--data: {file}: {key} is a path or a list of paths, got {value!r}")
    return tuple(values)


def _class_names(file: Path, value: Any, key: str) -> Sequence[str]:
    """A list of names, or YOLO's mapping from numbers to names."""
    if value is None:
        return ()
    if isinstance(value, Mapping):
        numbers = sorted(value, key=str)
        if {str(n) for n in numbers} != {str(i) for i in range(len(value))}:
            raise ValueError(
                f"--data: {file}: {key} must number the classes from 0 to {len(value) - 1}, "
                f"got {numbers}"
            )
        by_number = {int(number): name for number, name in value.items()}
        value = [by_number[i] for i in range(len(value))]
    # 8 and 3.5 are names as well; True is what YAML makes of a class called yes or on.
    if not isinstance(value, list) or any(
        isinstance(name, bool) or not isinstance(name, str | int | float) for name in value
    ):
        raise ValueError(
            f"--data: {file}: {key} is a list of names, got {value!r} (yes, no, on and off are "
            'names only in quotes: "yes")'
        )
    names = [str(name) for name in value]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not names:
        raise ValueError(
            f"--data: {file}: {key} has {twice[0]!r} twice"
            if twice
            else f"--data: {file}: {key} is empty"
        )
    return names


def _keypoint_shape(file: Path, value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    if not (isinstance(value, list) and len(value) == 2 and value[1] in (2, 3)):
        raise ValueError(f"--data: {file}: kpt_shape is [keypoints, 2 or 3], got {value!r}")
    return value[0], value[1]


def _of_type(file: Path, content: dict[str, Any], key: str, kind: Any, default: Any) -> Any:
    value = content.get(key)
    if value is None:
        return default
    if not isinstance(value, kind) or isinstance(value, bool):
        names = [k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,))]
        raise ValueError(f"--data: {file}: {key} must be {' or '.join(names)}, got {value!r}")
    return value


def safe_name(text: str) -> str:
    """A name for files and for ``DATASETS.TRAIN``.

    >>> safe_name("My photos (2)")
    'My_photos_2'
    """
    return re.sub(r"[^\w.-]+", "_", text).strip("_.") or "data"


def split_named(text: str) -> str:
    """The split that a file's or folder's name says it is of, or ``""``.

    >>> [split_named(name) for name in ("instances_val2017", "valid", "Trainval", "retrained")]
    ['val', 'val', 'trainval', '']
    """
    found = re.findall(
        r"(?<![a-z])(trainval|train(?:ing)?|val(?:id(?:ation)?)?|test(?:ing)?)(?![a-z])",
        text.lower(),
    )
    return NAMED_BY_SPLIT.get(found[-1], found[-1]) if found else ""
