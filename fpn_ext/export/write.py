"""Export a detector: write the file, run it beside the model, and keep it if both agree."""

import contextlib
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from PIL import Image

from ..data.demo_scenes import make_scene
from ..data.reading import from_rgb, value_range
from ..files.atomic import move_into_place
from ..files.weight_files import sha256
from ..reporting.provenance import commit, versions
from .formats import Format, require
from .graph import DetectorGraph, detector_graph
from .proof import Row, compared, table, with_many, with_none

Report = Callable[[str], None]

# Boxes given to Fast R-CNN in the proof, per picture.
GIVEN_BOXES = 300
UNRESIZED_SIDE = 320  # of pictures compared where INPUT.MIN_SIZE_TEST is 0: theirs as they are


def export(
    cfg: CfgNode,
    model: Any,
    classes: Mapping[int, str],
    file: Path,
    format_name: str,
    pictures: Sequence[Image.Image] = (),
    report: Report = lambda step: None,
) -> list[Row]:
    """Write a detector as a file of another runtime, if that finds the same as the model.

    The file is written beside ``file`` first, and run in its own runtime on batches of three sizes
    that were not recorded. Before that it is written with other limits, and run where it finds a
    thousand boxes, if the model can, and where it finds none.

    Args:
        cfg: the config that the model was built from.
        model: in eval mode, on the CPU.
        classes: COCO category id of each class, in the order of their numbers, and its name.
        file: to write; replaced if it is there. OpenVINO's weights are beside it, as ``.bin``.
        format_name: one of ``FORMATS``.
        pictures: RGB, for the comparison; none for generated ones.
        report: called with what is done next, as each step may take minutes.

    Returns:
        The comparison, a row for each batch.

    Raises:
        ValueError: a part of the model that cannot be exported; no such format; another suffix
            than the format's.
        ImportError: a package of the format is missing.
        OSError: a full disk, for one; names the folder.
        RuntimeError: the file finds something else than the model. It is not kept.
    """
    form = require(format_name)
    check_suffix(file, format_name, form)
    device = next(model.parameters()).device
    if device.type != "cpu":
        raise ValueError(f"export a model on the CPU (MODEL.DEVICE cpu), got one on {device}")
    takes_proposals = getattr(model, "proposal_generator", model) is None
    batches = batches_of(cfg, takes_proposals, pictures)
    rows = []
    with folder_beside(file) as folder:
        for what, altered in (("up to 1000", with_many(model)), ("none", with_none(model))):
            stem = folder / f"finds {what}"
            report(f"{format_name}: a file of the model that finds {what}, written and compared")
            _, arrays = batches[0]
            with _written(cfg, altered, classes, stem, form) as (run, outputs):
                rows.append(compared(f"picture, {what}", altered, run, outputs, arrays))
        if all(row.is_equal for row in rows):
            report(f"{format_name}: the file, written and compared on {len(batches)} sizes")
            with _written(cfg, model, classes, folder / file.stem, form) as (run, outputs):
                rows += [compared(what, model, run, outputs, a) for what, a in batches]
            if all(row.is_equal for row in rows):
                put_in_place(folder / file.name, file)
                return rows
    raise RuntimeError(
        f"{table(rows)}\n\nThe {format_name} file does not find what the model finds; it was not "
        f"kept. {left_as_it_was(file)}"
    )


@contextlib.contextmanager
def folder_beside(file: Path) -> Iterator[Path]:
    """A hidden folder to write in, until what is written is moved to ``file``; then removed.

    Raises:
        OSError: it cannot be made; a block that fails with one that names no file, as on a full
            disk, fails with the same for ``file``.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=file.parent) as folder:
        try:
            yield Path(folder)
        except OSError as error:
            if error.errno and error.filename is None:
                error.filename = str(file)
            raise


def check_suffix(file: Path, format_name: str, form: Format) -> None:
    """Raise ValueError unless the name of a file to write is one of its format."""
    if file.suffix != form.suffix:
        raise ValueError(f"--output {file}: a file of {format_name} ends with {form.suffix}")


def put_in_place(written: Path, file: Path) -> None:
    """Move a file, and OpenVINO's weights beside it, to where they were asked for."""
    for part in parts_of(written):
        move_into_place(part, file.with_suffix(part.suffix))


def parts_of(file: Path) -> list[Path]:
    """A written file, after OpenVINO's weights beside it, which it names.

    Raises:
        FileNotFoundError: there is none.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: was not written")
    weights = file.with_suffix(".bin")
    return [weights, file] if file.suffix == ".xml" and weights.is_file() else [file]


def left_as_it_was(file: Path) -> str:
    """What an export that did not succeed has left at a file, for its error."""
    return f"{file} " + ("is as it was before." if file.exists() else "was not written.")


@contextlib.contextmanager
def _written(
    cfg: CfgNode, model: Any, classes: Mapping[int, str], stem: Path, form: Format
) -> Iterator[tuple[Any, tuple[str, ...]]]:
    """The file of a model, opened: how it is run, and the names of its outputs."""
    graph = detector_graph(model, form.suppression()).eval()
    metadata = _metadata(cfg, graph, classes)
    file = stem.with_name(stem.name + form.suffix)
    with torch.no_grad():
        form.write(graph, _examples(cfg, graph), file, json.dumps(metadata))
    run, _ = form.load(file)
    yield run, graph.outputs


def _metadata(cfg: CfgNode, graph: DetectorGraph, classes: Mapping[int, str]) -> dict[str, Any]:
    return {
        "inputs": list(graph.inputs),
        "outputs": list(graph.outputs),
        "class_names": list(classes.values()),
        "category_ids": list(classes),  # in annotations in COCO's format
        "pixel_format": cfg.INPUT.FORMAT,
        "value_range": list(value_range(cfg)),
        "pixel_mean": [float(v) for v in cfg.MODEL.PIXEL_MEAN],
        "pixel_std": [float(v) for v in cfg.MODEL.PIXEL_STD],
        # Pillow's bilinear filter, the sides rounded half up.
        "resize": {
            "shortest_side": cfg.INPUT.MIN_SIZE_TEST,
            "longest_side_at_most": cfg.INPUT.MAX_SIZE_TEST,
        },
        "weights": _weights(cfg.MODEL.WEIGHTS),
        "config": cfg.dump(),
        "versions": {**versions(), "fpn_ext": commit()},
    }


def _weights(file: str) -> dict[str, str]:
    """Which weights a file is made of, to know later whether there are newer ones."""
    name = os.path.basename(file)
    return {"file": name, "sha256": sha256(file)} if os.path.isfile(file) else {"file": name}


def _examples(cfg: CfgNode, graph: DetectorGraph) -> tuple[torch.Tensor, ...]:
    """Inputs to record with: two images of a size that no picture of the comparison has."""
    step = max(graph.divisor, 32)
    height, width = 5 * step, 7 * step
    images = torch.rand(2, len(cfg.MODEL.PIXEL_MEAN), height, width) * 255
    proposals = torch.from_numpy(_proposals(2, height, width, np.random.default_rng(0)))
    return (images, proposals)[: len(graph.inputs)]


def batches_of(
    cfg: CfgNode, takes_proposals: bool, pictures: Sequence[Image.Image]
) -> list[tuple[str, list[np.ndarray]]]:
    """Batches of three sizes, by name: the inputs of the graph."""
    rng = np.random.default_rng(0)
    side = cfg.INPUT.MIN_SIZE_TEST or UNRESIZED_SIDE
    wide, tall, odd = (side, side * 4 // 3), (side * 4 // 3, side), (side * 3 // 4 + 1, side + 3)
    given = itertools.cycle(pictures or [make_scene(rng, 320)[0] for _ in range(4)])
    batches = []
    for what, count, (height, width) in (
        ("picture", 1, wide),
        ("pictures", 2, tall),
        ("picture", 1, odd),
    ):
        images = []
        for picture in itertools.islice(given, count):
            pixels = np.asarray(picture.convert("RGB").resize((width, height)))
            pixels = from_rgb(pixels, cfg.INPUT.FORMAT).astype(np.float32)
            images.append(pixels.reshape(height, width, -1).transpose(2, 0, 1))
        batches.append((what, [np.stack(images)]))
    if takes_proposals:
        for _, arrays in batches:
            count, _, height, width = arrays[0].shape
            arrays.append(_proposals(count, height, width, rng))
    return batches


def _proposals(count: int, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    corners = rng.uniform(0, 1, (count, GIVEN_BOXES, 2, 2)) * (width, height)
    return np.concatenate((corners.min(axis=2), corners.max(axis=2)), axis=2).astype(np.float32)
