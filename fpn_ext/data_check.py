"""Check a data set before training on it: every problem at once, in minutes instead of days.

    python -m fpn_ext.data_check --dataset bccd_trainval --config-file CONFIG
    python -m fpn_ext.data_check --coco annotations.json --images folder/ --json report.json
    python -m fpn_ext.data_check --voc folder/ --split train --classes cat dog

Every picture is decoded, every annotation looked at; nothing is ever written but the report. Exit
code: 0 without errors (warnings may be there), 1 with errors, 2 if the call itself is wrong.
"""

import argparse
import os
import stat
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from .annotation_files import (
    KINDS,
    Box,
    Contents,
    Corners,
    Picture,
    Problem,
    read_coco,
    read_records,
    read_voc,
    short,
)
from .config import load_config
from .data import register_datasets
from .json_files import write_json
from .levels import stride_named
from .names import did_you_mean

# Pixels a box may reach beyond its image: conventions differ by a half and by one.
SLACK = 1.0
EXIF_ORIENTATION = 0x0112
TURNED = (5, 6, 7, 8)  # the orientations that swap width and height
DEEP_MODES = ("I", "I;16", "I;16B", "I;16L", "F")  # Pillow's modes of more than 8 bits
EXAMPLES = 3  # per kind of problem in the printed report
# When boxes are taken for the other format, see _other_format.
LEAST_SUSPECTS, SUSPECT_SHARE, FITTING_SHARE = 3, 0.2, 0.98


@dataclass(frozen=True, slots=True)
class Look:
    """What decoding a picture has shown; sizes are (width, height)."""

    kind: str | None = None  # of the problem, if it cannot be used
    detail: str = ""
    size: tuple[int, int] | None = None  # as Detectron2 reads it: turned as EXIF says
    stored_size: tuple[int, int] | None = None  # as in the file
    mode: str = ""


class Report:
    """The problems of a data set, most severe first."""

    def __init__(self, contents: Contents, problems: Iterable[Problem]):
        self.source = contents.source
        self.num_images = len(contents.pictures)
        boxes = Counter(box.category for picture in contents.pictures for box in picture.boxes)
        self.boxes_per_class = {name: boxes[name] for name in contents.classes}
        by_kind: dict[str, list[Problem]] = {kind: [] for kind in KINDS}
        for problem in problems:
            by_kind[problem.kind].append(problem)
        order = ("error", "warning", "note")
        kinds = sorted(by_kind, key=lambda kind: order.index(KINDS[kind][0]))
        self.problems_of = {kind: by_kind[kind] for kind in kinds if by_kind[kind]}

    def count(self, severity: str) -> int:
        """How many problems are an ``"error"``, a ``"warning"`` or a ``"note"``."""
        return sum(len(p) for kind, p in self.problems_of.items() if KINDS[kind][0] == severity)

    def as_json(self) -> dict[str, Any]:
        """Everything, as plain values for :func:`json.dumps`."""
        return {
            "source": self.source,
            "images": self.num_images,
            "boxes_per_class": self.boxes_per_class,
            "errors": self.count("error"),
            "warnings": self.count("warning"),
            "notes": self.count("note"),
            "kinds": {
                kind: {
                    "severity": KINDS[kind][0],
                    "meaning": KINDS[kind][1],
                    "count": len(problems),
                    "images": len({p.image for p in problems if p.image is not None}),
                }
                for kind, problems in self.problems_of.items()
            },
            "problems": [
                {
                    "kind": kind,
                    "severity": problem.severity,
                    "image": problem.image,
                    "annotation": problem.annotation,
                    "detail": problem.detail,
                }
                for kind, problems in self.problems_of.items()
                for problem in problems
            ],
        }

    def __str__(self) -> str:
        classes = ", ".join(f"{_printable(n)} {c}" for n, c in self.boxes_per_class.items())
        boxes = sum(self.boxes_per_class.values())
        lines = [
            f"{_printable(self.source)}: {self.num_images} images, {boxes} boxes"
            + f" ({classes})" * bool(classes)
        ]
        for kind, problems in self.problems_of.items():
            severity, meaning = KINDS[kind]
            images = len({p.image for p in problems if p.image is not None})
            where = f" on {images} images" if images > 1 else ""
            lines += [
                "",
                f"{severity.upper():8}{kind}: {len(problems)}{where}",
                f"        {meaning}",
            ]
            lines += [f"          {_line(problem)}" for problem in problems[:EXAMPLES]]
            if len(problems) > EXAMPLES:
                lines.append(f"          and {len(problems) - EXAMPLES} more (--json lists all)")
        errors, others = self.count("error"), self.count("warning")
        return "\n".join([*lines, "", f"{errors} error(s), {others} warning(s)"])


def _line(problem: Problem) -> str:
    places = []
    if problem.image is not None:
        places.append(_printable(problem.image))
    if problem.annotation is not None:
        places.append(f"annotation {_printable(str(problem.annotation))}")
    return ": ".join(filter(None, [", ".join(places), _printable(problem.detail)]))


def _printable(text: str) -> str:
    """A string of a file, safe for a terminal: short, without control characters."""
    return text if text.isprintable() and len(text) <= 300 else short(text)


# ------------------------------------------------------------------------------ the check


def read_registered(name: str) -> Contents:
    """The contents of a data set registered in Detectron2's ``DatasetCatalog``.

    Of COCO-format and Pascal VOC sets the files themselves are read; of others, the records that
    the registered function gives.

    Raises:
        ValueError: nothing is registered under ``name``.
        FileNotFoundError: its annotations are not there.
    """
    if name not in DatasetCatalog:
        known = did_you_mean(name, DatasetCatalog.keys())
        raise ValueError(f"--dataset: {name!r} is not a registered data set; {known}")
    metadata = MetadataCatalog.get(name)
    evaluator_type = metadata.get("evaluator_type")
    if evaluator_type == "coco" and metadata.get("json_file"):
        return read_coco(metadata.json_file, metadata.image_root)
    if evaluator_type == "pascal_voc" and metadata.get("dirname"):
        return read_voc(metadata.dirname, metadata.split, metadata.thing_classes)
    return read_records(DatasetCatalog.get(name), metadata.get("thing_classes", ()), name)


def check(contents: Contents, cfg: CfgNode | None = None, workers: int = 1) -> Report:
    """Decode every picture and look at every box.

    Args:
        cfg: also check the data against this config: ``MODEL.ROI_HEADS.NUM_CLASSES``, boxes that
            ``INPUT.MIN_SIZE_TEST`` and ``MAX_SIZE_TEST`` make tiny, and what
            ``DATALOADER.FILTER_EMPTY_ANNOTATIONS`` does to images without boxes.
        workers: processes that decode.
    """
    looks = look_at_pictures([picture.file for picture in contents.pictures], workers)
    problems = [*contents.problems, *_data_set_problems(contents, cfg)]
    boxes: list[tuple[Box, tuple[int, int]]] = []
    for picture in contents.pictures:
        look = looks[picture.file]
        problems += _picture_problems(picture, look)
        problems += _duplicate_boxes(picture)
        if all(box.crowd for box in picture.boxes):
            problems.append(Problem("image-without-boxes", picture.name, None, _fate(cfg)))
        # A wrong size is one problem, reported above; it is not one of every box as well.
        size = picture.size or look.size
        for box in picture.boxes:
            problems += _box_problems(picture, box, size)
            if size:
                boxes.append((box, size))
                problems += _tiny(picture, box, size, cfg)
    problems += _format_problems(boxes)
    return Report(contents, problems)


def _data_set_problems(contents: Contents, cfg: CfgNode | None) -> Iterable[Problem]:
    if not contents.pictures:
        yield Problem("no-images", None, None, contents.source)
    used = {box.category for picture in contents.pictures for box in picture.boxes}
    for name in contents.classes:
        if name not in used:
            yield Problem("class-without-boxes", None, None, short(name))
    if cfg is not None and cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN":
        wanted, found = cfg.MODEL.ROI_HEADS.NUM_CLASSES, len(contents.classes)
        if wanted != found:
            yield Problem("class-count", None, None, f"{wanted} in the config, {found} in the data")


def _fate(cfg: CfgNode | None) -> str:
    """What training does with an image without boxes."""
    dropped = cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS if cfg is not None else True
    default = " (the default)" if cfg is None else ""
    verb = "dropped" if dropped else "kept"
    return f"{verb} in training: DATALOADER.FILTER_EMPTY_ANNOTATIONS is {dropped}{default}"


def _picture_problems(picture: Picture, look: Look) -> Iterable[Problem]:
    if look.kind:
        yield Problem(look.kind, picture.name, None, look.detail)
        return
    if look.mode in DEEP_MODES:
        yield Problem("colour-depth", picture.name, None, f"Pillow's mode {look.mode}")
    if picture.size is None or look.size is None or picture.size == look.size:
        return
    detail = f"{_by(picture.size)} in the annotations, {_by(look.size)} in the picture"
    if picture.size != look.size[::-1]:
        kind = "wrong-size"
    elif look.size == look.stored_size:
        kind = "swapped-size"
    else:
        kind = "exif-rotated"
    yield Problem(kind, picture.name, None, detail)


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _duplicate_boxes(picture: Picture) -> Iterable[Problem]:
    first: dict[tuple[str, Corners], Box] = {}
    for box in picture.boxes:
        key = (box.category, box.written)
        if key in first:
            detail = f"{_numbers(box)}, as annotation {first[key].annotation}"
            yield Problem("duplicate-box", picture.name, box.annotation, detail)
        first.setdefault(key, box)


def _numbers(box: Box) -> str:
    names = "x, y, width, height" if box.form == "XYWH" else "x0, y0, x1, y1"
    return f"[{', '.join(f'{value:.6g}' for value in box.written)}] ({names})"


def _box_problems(picture: Picture, box: Box, size: tuple[int, int] | None) -> Iterable[Problem]:
    def problem(kind: str, detail: str) -> Problem:
        return Problem(kind, picture.name, box.annotation, detail)

    x0, y0, x1, y1 = box.corners
    if min(box.sides) < 0:
        yield problem("inverted-box", _numbers(box))
        return
    if min(box.sides) == 0:
        yield problem("empty-box", _numbers(box))
        return
    if box.form == "VOC" and 0 <= min(box.written[:2]) < 1:
        yield problem("zero-based", _numbers(box))
    if size is not None:
        width, height = size
        if x0 >= width or y0 >= height or x1 <= 0 or y1 <= 0:
            yield problem("outside-box", f"{_numbers(box)} on {_by(size)}")
        elif max(-x0, -y0, x1 - width, y1 - height) > SLACK:
            yield problem("partly-outside", f"{_numbers(box)} on {_by(size)}")
    if box.mask_extent is not None and not box.crowd:
        distance = max(abs(a - b) for a, b in zip(box.corners, box.mask_extent, strict=True))
        if distance > 2 * SLACK:
            extent = ", ".join(f"{value:.6g}" for value in box.mask_extent)
            yield problem("mask-mismatch", f"box {_numbers(box)}, mask from corner [{extent}]")


def _tiny(
    picture: Picture, box: Box, size: tuple[int, int], cfg: CfgNode | None
) -> Iterable[Problem]:
    if cfg is None or box.crowd or min(box.sides) <= 0:
        return
    x0, y0, x1, y1 = box.corners
    scale, stride = scale_at_test(cfg, size), _finest_stride(cfg)
    if min(x1 - x0, y1 - y0) * scale < stride:
        sides = f"{(x1 - x0) * scale:.1f}x{(y1 - y0) * scale:.1f}"
        detail = f"{sides} pixels, and the finest map has stride {stride}"
        yield Problem("tiny-after-resize", picture.name, box.annotation, detail)


def scale_at_test(cfg: CfgNode, size: tuple[int, int]) -> float:
    """The factor by which a config's test resize scales an image of size (width, height).

    Detectron2's default: the shorter side to 800, the longer one to at most 1333.

    >>> from detectron2.config import get_cfg
    >>> scale_at_test(get_cfg(), (640, 480)), scale_at_test(get_cfg(), (4000, 1000))
    (1.6666666666666667, 0.33325)
    """
    if cfg.INPUT.MIN_SIZE_TEST == 0:
        return 1.0
    return min(cfg.INPUT.MIN_SIZE_TEST / min(size), cfg.INPUT.MAX_SIZE_TEST / max(size))


def _finest_stride(cfg: CfgNode) -> int:
    """Of the maps the RPN reads, by their names: p2 has stride 4, res4 has 16."""
    found = [stride_named(name) for name in cfg.MODEL.RPN.IN_FEATURES]
    return min((stride for stride in found if stride), default=4)


# ------------------------------------------------------------------- boxes in another format


def _format_problems(boxes: Sequence[tuple[Box, tuple[int, int]]]) -> Iterable[Problem]:
    if len(boxes) >= LEAST_SUSPECTS and all(max(map(abs, b.written)) <= 1 for b, _ in boxes):
        yield Problem("looks-relative", None, None, f"all {len(boxes)} boxes lie in 0..1")
        return
    for as_xywh, kind, other in (
        (True, "looks-like-xyxy", "XYXY"),
        (False, "looks-like-xywh", "XYWH"),
    ):
        of_form = [(b.written, size) for b, size in boxes if (b.form == "XYWH") == as_xywh]
        suspects, fitting = _other_format(of_form, as_xywh)
        enough = max(LEAST_SUSPECTS, SUSPECT_SHARE * len(of_form))
        if suspects >= enough and fitting >= FITTING_SHARE * len(of_form):
            detail = (
                f"of {len(of_form)} boxes, {fitting} fit their image when read as {other}, "
                f"{suspects} of them only then"
            )
            yield Problem(kind, None, None, detail)


def _other_format(
    boxes: Iterable[tuple[Corners, tuple[int, int]]], as_xywh: bool
) -> tuple[int, int]:
    """How many boxes fit their image only when read in the other format, and how many then fit.

    Corners read as XYWH give a right edge of x0 + x1, twice the box's centre: beyond the image for
    every box whose centre lies right of the middle (or below it), about three in four. And each
    corner pair has x1 > x0 and y1 > y0, which widths and heights have by chance only: in boxes
    truly XYWH some are narrower than their distance from the edge. Both must hold, the first for
    a fifth of the boxes, the second for all but a fiftieth; a few boxes drawn beyond the edge
    give the first without the second.
    """
    suspects = fitting = 0
    for (x, y, a, b), (width, height) in boxes:
        corners, sides = (x, y, a, b), (x, y, x + a, y + b)
        own, other = (sides, corners) if as_xywh else (corners, sides)
        if _fits(other, width, height):
            fitting += 1
            suspects += not _fits(own, width, height)
    return suspects, fitting


def _fits(corners: Corners, width: int, height: int) -> bool:
    x0, y0, x1, y1 = corners
    return -SLACK <= x0 < x1 <= width + SLACK and -SLACK <= y0 < y1 <= height + SLACK


# -------------------------------------------------------------------------------- pictures


def look_at_pictures(files: Iterable[str], workers: int = 1) -> dict[str, Look]:
    """Decode pictures, in this process or in several.

    Raises:
        RuntimeError: a decoding process died.
    """
    unique = list(dict.fromkeys(files))
    if workers <= 1 or len(unique) < 2:
        return {file: look_at(file) for file in unique}
    try:
        with ProcessPoolExecutor(workers) as pool:
            return dict(zip(unique, pool.map(look_at, unique, chunksize=16), strict=True))
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a process died while decoding pictures (killed for its memory?); run with --workers 1"
        ) from error


def look_at(file: str) -> Look:
    """Decode one picture, all of it."""
    try:
        if not stat.S_ISREG(os.stat(file).st_mode):  # opening a pipe would wait for ever
            return Look("unreadable-image", f"{_printable(file)} is not a file")
    except (OSError, ValueError) as error:
        return Look("missing-image", _where(file, error))
    try:
        with warnings.catch_warnings():  # about broken metadata and large pictures
            warnings.simplefilter("ignore")
            with Image.open(file) as image:
                image.load()
                turned = _orientation(image) in TURNED
                stored = image.size
                return Look(None, "", stored[::-1] if turned else stored, stored, image.mode)
    except Exception as error:  # decoders raise what they like: OSError, SyntaxError, struct.error
        return Look("unreadable-image", f"{type(error).__name__}: {str(error)[:200]}")


def _orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(EXIF_ORIENTATION)
    except Exception:  # Detectron2 takes a picture with broken EXIF as it is
        return None


def _where(file: str, error: OSError | ValueError) -> str:
    """A missing file, and the one beside it that may be meant."""
    stem, suffix = os.path.splitext(file)
    if isinstance(error, FileNotFoundError):
        for other in (".jpg", ".JPG", ".jpeg", ".png", ".PNG"):
            if other != suffix and os.path.isfile(stem + other):
                return f"no file {_printable(file)}, but one that ends in {other}"
        return f"no file {_printable(file)}"
    return f"{type(error).__name__}: {str(error)[:200]}"


# ---------------------------------------------------------------------------- command line


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m fpn_ext.data_check", description=(__doc__ or "").partition("\n")[0]
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--dataset", metavar="NAME", help="a registered data set")
    source.add_argument("--coco", metavar="JSON", type=Path, help="with --images")
    source.add_argument("--voc", metavar="FOLDER", type=Path, help="with --split")
    parser.add_argument("--images", metavar="FOLDER", type=Path)
    parser.add_argument("--split", metavar="NAME", help="a list in ImageSets/Main")
    parser.add_argument("--classes", nargs="+", metavar="NAME", help="default: those in the files")
    parser.add_argument("--config-file", help="check the data against this config too")
    parser.add_argument("--workers", type=int, default=1, help="processes that decode pictures")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write every problem here")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="overrides of the config")
    args = parser.parse_args(argv)
    for option, needed in (("coco", "images"), ("voc", "split")):
        if bool(getattr(args, option)) != bool(getattr(args, needed)):
            parser.error(f"--{option} and --{needed} go together")
    if args.classes and not args.voc:
        parser.error("--classes goes with --voc")
    if args.json and args.coco and args.json.exists() and args.json.samefile(args.coco):
        parser.error(f"--json {args.json} would overwrite the annotations")
    try:
        cfg = load_config(args.config_file, args.opts) if args.config_file else None
        contents = _read(args)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    report = check(contents, cfg, args.workers)
    print(report)
    if args.json:
        write_json(args.json, report.as_json())
    return 1 if report.count("error") else 0


def _read(args: argparse.Namespace) -> Contents:
    if args.coco:
        return read_coco(args.coco, args.images)
    if args.voc:
        return read_voc(args.voc, args.split, args.classes)
    register_datasets()
    return read_registered(args.dataset)


if __name__ == "__main__":
    sys.exit(main())
