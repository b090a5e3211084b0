"""Export a detector in eight bits: its scores before and after decide whether the file is kept."""

import contextlib
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from detectron2.config import CfgNode
from detectron2.evaluation import inference_on_dataset
from PIL import Image

from ..engine.testing import changed
from ..evaluation.evaluators import build_evaluator
from ..evaluation.rehearsal import SCORES, check_evaluation
from ..proposals.loader import build_test_loader
from ..reporting.measuring import markdown_table
from .formats import load_exported, require
from .int8 import require_int8
from .proof import Row
from .runtime import ExportedModel, arrays_of
from .write import (
    Report,
    batches_of,
    check_suffix,
    export,
    folder_beside,
    left_as_it_was,
    parts_of,
    put_in_place,
)

MIB = 2**20


class Cost(NamedTuple):
    """A score in float32 and in eight bits.

    Attributes:
        dataset: that was scored.
        score: what of it, as ``bbox AP``.
        float32, int8: of 100.
    """

    dataset: str
    score: str
    float32: float
    int8: float

    @property
    def lost(self) -> float:
        return self.float32 - self.int8


class Int8Export(NamedTuple):
    """What an export in eight bits has shown.

    Attributes:
        rows: of the file in float32, beside the model.
        costs: of eight bits.
        pictures: how many were calibrated on.
        mib: size of the file in float32, and in eight bits.
    """

    rows: list[Row]
    costs: list[Cost]
    pictures: int
    mib: tuple[float, float]


def export_int8(
    cfg: CfgNode,
    model: Any,
    classes: Mapping[int, str],
    file: Path,
    format_name: str,
    pictures: Sequence[Image.Image] = (),
    report: Report = lambda step: None,
    *,
    calibration_pictures: int = 300,
    max_ap_loss: float = 1.0,
) -> Int8Export:
    """Write a detector in eight bits, if its scores are not much lower.

    It is exported in float32 first, and proved equal (:func:`fpn_ext.export.write.export`). That
    file is quantised, calibrated on images of ``DATASETS.TRAIN`` as they are evaluated, and both
    are scored on each of ``DATASETS.TEST`` by their own runtime: box AP, and mask or keypoint AP;
    of an RPN AR@1000.

    Args:
        cfg, model, classes, file, format_name, pictures, report: as for ``export``.
        calibration_pictures: how many; all if there are fewer. They are spread evenly over the
            datasets, the same ones each time.
        max_ap_loss: the most that a score may fall, of 100.

    Returns:
        What was measured; the costs, ``int8`` in the file's metadata, too.

    Raises:
        ValueError: what ``export`` raises; a format that is not quantised; no datasets to
            calibrate on or to score; numbers that are none.
        ImportError: a package is missing; with the line that installs it.
        RuntimeError: what ``export`` raises; a score fell by more, or is none. The file is not
            kept.
    """
    quantiser = require_int8(format_name)
    form = require(format_name)
    check_suffix(file, format_name, form)
    _check_numbers(calibration_pictures, max_ap_loss)
    calibration = CalibrationImages(cfg, calibration_pictures)
    check_scored(cfg)
    with folder_beside(file) as folder:
        plain, trial, final = (folder / what / file.name for what in ("float32", "int8", "final"))
        for path in (plain, trial, final):
            path.parent.mkdir()
        rows = export(cfg, model, classes, plain, format_name, pictures, report)
        _, metadata = load_exported(plain)
        calibration.inputs = metadata["inputs"]
        report(f"eight bits: calibrated on {len(calibration)} images")
        save = quantiser.quantise(plain, calibration)
        save(trial, json.dumps(metadata))
        _runs(trial, batches_of(cfg, "proposals" in metadata["inputs"], pictures))
        costs = _costs(cfg, plain, trial, report)
        found = Int8Export(rows, costs, len(calibration), (_mib(plain), _mib(trial)))
        if any(math.isnan(cost.lost) for cost in costs):
            raise RuntimeError(
                f"{costs_table(found)}\n\nA score is no number where nothing is found, or nothing "
                f"is to be found; the file was not kept. {left_as_it_was(file)}"
            )
        if any(cost.lost > max_ap_loss for cost in costs):
            raise RuntimeError(
                f"{costs_table(found)}\n\nEight bits cost more than --max-ap-loss {max_ap_loss:g}: "
                f"the file was not kept. {left_as_it_was(file)}"
            )
        metadata["int8"] = {
            "calibrated_on": {"datasets": list(cfg.DATASETS.TRAIN), "pictures": len(calibration)},
            "scores": [cost._asdict() for cost in costs],
        }
        save(final, json.dumps(metadata))
        put_in_place(final, file)
        return found


def costs_table(found: Int8Export) -> str:
    """The scores before and after as Markdown."""
    header = ["dataset", "score", "float32", "int8", "lost"]
    lines = [
        [cost.dataset, cost.score, *(f"{x:.2f}" for x in (cost.float32, cost.int8, cost.lost))]
        for cost in found.costs
    ]
    lines.append(["", "file, MiB", *(f"{x:.1f}" for x in found.mib), ""])
    return markdown_table(header, lines)


class CalibrationImages:
    """Images of ``DATASETS.TRAIN`` as evaluation prepares them, with their proposals if need be.

    Args:
        count: how many; all if there are fewer.

    Attributes:
        inputs (list): names of what a file takes.

    Raises:
        ValueError: there are none.
        FileNotFoundError: a dataset, or a file of proposals, is not there.
    """

    def __init__(self, cfg: CfgNode, count: int):
        if not cfg.DATASETS.TRAIN:
            raise ValueError(
                "--int8 is calibrated on the images of DATASETS.TRAIN, and the config names none: "
                "append DATASETS.TRAIN \"('NAME',)\""
            )
        as_tested = cfg.clone()
        as_tested.defrost()
        as_tested.DATASETS.TEST = cfg.DATASETS.TRAIN
        as_tested.DATASETS.PROPOSAL_FILES_TEST = cfg.DATASETS.PROPOSAL_FILES_TRAIN
        as_tested.freeze()
        loaders = [build_test_loader(as_tested, name) for name in cfg.DATASETS.TRAIN]
        images = [(loader.dataset, i) for loader in loaders for i in range(len(loader.dataset))]
        chosen = np.linspace(0, len(images) - 1, min(count, len(images))).round().astype(int)
        self.images = [images[i] for i in chosen]
        self.inputs: Sequence[str] = ("images",)

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[tuple[np.ndarray, ...]]:
        return (arrays_of(dataset[i], self.inputs) for dataset, i in self.images)


def check_scored(cfg: CfgNode) -> None:
    """Raise ValueError unless there are datasets to score, and they can be."""
    if not cfg.DATASETS.TEST:
        raise ValueError(
            "--int8 is kept or not by its score on DATASETS.TEST, and the config names no dataset: "
            "append DATASETS.TEST \"('NAME',)\""
        )
    check_evaluation(_of_detections(cfg))


def _of_detections(cfg: CfgNode) -> CfgNode:
    """Without scores of the proposals inside, which a file does not give."""
    return changed(cfg, "TEST.FPN_EXT.EVALUATE_PROPOSALS", False)


def _costs(cfg: CfgNode, plain: Path, int8: Path, report: Report) -> list[Cost]:
    cfg = _of_detections(cfg)
    costs = []
    for dataset in cfg.DATASETS.TEST:
        scores = []
        for what, file in (("float32", plain), ("eight bits", int8)):
            report(f"{what}: scored on {dataset}")
            scores.append(_scores(cfg, dataset, file))
        before, after = scores
        costs += [Cost(dataset, score, before[score], after[score]) for score in before]
    return costs


def _scores(cfg: CfgNode, dataset: str, file: Path) -> dict[str, float]:
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools's tables
        results = inference_on_dataset(
            ExportedModel(file),
            build_test_loader(cfg, dataset),
            build_evaluator(cfg, dataset, None),
        )
    return {f"{task} {SCORES[task]}": of[SCORES[task]] for task, of in results.items()}


def _runs(file: Path, batches: Sequence[tuple[str, list[np.ndarray]]]) -> None:
    """Run a file on sizes and numbers of pictures that are not those of the datasets."""
    run, _ = load_exported(file)
    for _, arrays in batches:
        run(*arrays)


def _mib(file: Path) -> float:
    return sum(part.stat().st_size for part in parts_of(file)) / MIB


def _check_numbers(calibration_pictures: int, max_ap_loss: float) -> None:
    if calibration_pictures < 1:
        raise ValueError(f"--calibration-pictures must be at least 1, got {calibration_pictures}")
    if not (math.isfinite(max_ap_loss) and max_ap_loss >= 0):
        raise ValueError(f"--max-ap-loss must be a number of AP, of 100, from 0, got {max_ap_loss}")
