"""Check a dataset before training: reports every problem at once.

    fpn-ext data --dataset bccd_trainval --config-file CONFIG
    fpn-ext data --coco annotations.json --images folder/ --json report.json
    fpn-ext data --voc folder/ --split train --classes cat dog

Decodes every image and checks every annotation; writes nothing but the report. Exit code: 0 without
errors (there may be warnings), 1 with errors, 2 for invalid arguments.
"""

from collections.abc import Iterable

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from ..levels import stride_named
from ..names import did_you_mean
from ..registries.architectures import class_count, class_count_key
from .annotation_files import read_coco, read_records, read_voc
from .box_formats import SLACK, format_problems
from .collector import paused_collector
from .dataset_contents import Box, Contents, Corners, Picture, Problem, short
from .dataset_report import DatasetReport
from .picture_files import Look, look_at_pictures

DEEP_MODES = ("I", "I;16", "I;16B", "I;16L", "F")  # Pillow's modes of more than 8 bits


def read_registered(name: str) -> Contents:
    """The contents of a dataset registered in Detectron2's ``DatasetCatalog``.

    COCO-format and Pascal VOC datasets are read from their files, others from the records that the
    registered function returns.

    Raises:
        ValueError: nothing is registered under ``name``.
        FileNotFoundError: its annotations are missing.
    """
    if name not in DatasetCatalog:
        known = did_you_mean(name, DatasetCatalog.keys())
        raise ValueError(f"--dataset: {name!r} is not a registered dataset; {known}")
    metadata = MetadataCatalog.get(name)
    evaluator_type = metadata.get("evaluator_type")
    if evaluator_type == "coco" and metadata.get("json_file"):
        return read_coco(metadata.json_file, metadata.image_root)
    if evaluator_type == "pascal_voc" and metadata.get("dirname"):
        return read_voc(metadata.dirname, metadata.split, metadata.thing_classes)
    return read_records(DatasetCatalog.get(name), metadata.get("thing_classes", ()), name)


def check(contents: Contents, cfg: CfgNode | None = None, workers: int = 1) -> DatasetReport:
    """Decode every image and check every box.

    Args:
        cfg: also check the data against this config: ``MODEL.ROI_HEADS.NUM_CLASSES``, boxes that
            become tiny at ``INPUT.MIN_SIZE_TEST`` and ``MAX_SIZE_TEST``, and the effect of
            ``DATALOADER.FILTER_EMPTY_ANNOTATIONS`` on images without boxes.
        workers: number of decoding processes.
    """
    looks = look_at_pictures([picture.file for picture in contents.pictures], workers)
    with paused_collector():
        return DatasetReport(contents, _problems(contents, looks, cfg))


def _problems(contents: Contents, looks: dict[str, Look], cfg: CfgNode | None) -> list[Problem]:
    problems = [*contents.problems, *_dataset_problems(contents, cfg)]
    for picture in contents.pictures:
        look = looks[picture.file]
        problems += _picture_problems(picture, look)
        problems += _duplicate_boxes(picture)
        if all(box.crowd for box in picture.boxes):
            problems.append(Problem("image-without-boxes", picture.name, None, _fate(cfg)))
        # A wrong image size is reported once above, not again for every box.
        size = picture.size or look.size
        for box in picture.boxes:
            problems += _box_problems(picture, box, size)
            if size:
                problems += _tiny(picture, box, size, cfg)
    sized = ((picture, picture.size or looks[picture.file].size) for picture in contents.pictures)
    boxes = ((box, size) for picture, size in sized if size for box in picture.boxes)
    return [*problems, *format_problems(boxes)]


def _dataset_problems(contents: Contents, cfg: CfgNode | None) -> Iterable[Problem]:
    if not contents.pictures:
        yield Problem("no-images", None, None, contents.source)
    used = {box.category for picture in contents.pictures for box in picture.boxes}
    for name in contents.classes:
        if name not in used:
            yield Problem("class-without-boxes", None, None, short(name))
    if cfg is not None and class_count_key(cfg):
        wanted, found = class_count(cfg), len(contents.classes)
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
    """The scale factor of a config's test-time resize for an image of size (width, height).

    Detectron2's default: shorter side 800, longer side at most 1333.

    >>> from detectron2.config import get_cfg
    >>> scale_at_test(get_cfg(), (640, 480)), scale_at_test(get_cfg(), (4000, 1000))
    (1.6666666666666667, 0.33325)
    """
    if cfg.INPUT.MIN_SIZE_TEST == 0:
        return 1.0
    return min(cfg.INPUT.MIN_SIZE_TEST / min(size), cfg.INPUT.MAX_SIZE_TEST / max(size))


def _finest_stride(cfg: CfgNode) -> int:
    """The finest stride among the RPN's input maps, from their names: p2 has 4, res4 has 16."""
    found = [stride_named(name) for name in cfg.MODEL.RPN.IN_FEATURES]
    return min((stride for stride in found if stride), default=4)
