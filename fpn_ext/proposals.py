"""Proposals made beforehand, for Fast R-CNN: make, check, convert and measure files of them.

    python -m fpn_ext.proposals generate --config-file RPN.yaml --datasets coco_2017_train \\
        coco_2017_val --output proposals MODEL.WEIGHTS output/rpn/model_final.pth
    python -m fpn_ext.proposals validate proposals/coco_2017_val.safetensors \\
        --dataset coco_2017_val

and ground-truth, selective-search, convert, stats: each has --help. To train and test on the files:
MODEL.LOAD_PROPOSALS True, MODEL.PROPOSAL_GENERATOR.NAME PrecomputedProposals, and a file for each
data set in DATASETS.PROPOSAL_FILES_TRAIN and DATASETS.PROPOSAL_FILES_TEST.
"""

import argparse
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, get_detection_dataset_dicts
from detectron2.modeling import build_model

from .bottom_ups import resolve_bottom_up
from .checkpoint import CompleteCheckpointer
from .config import check_config, check_weights, load_config, resolve_device
from .data import register_datasets
from .names import did_you_mean
from .optimize import model_for_inference
from .proposal_file import ImageId, ProposalFile, Proposals, first_ids
from .proposal_pickle import convert, open_proposals
from .proposal_sources import (
    TOP_K,
    check_top_k,
    generate_proposals,
    ground_truth_proposals,
    selective_search_proposals,
)
from .recall import AREA_SUFFIXES, LIMITS, average_recall, ground_truth_of

# Pixels by which a box may stick out of its image: float32 arithmetic on XYWH rounds by less.
OUTSIDE_TOLERANCE = 0.01


@dataclass
class Finding:
    """Something about a file of proposals: how often, and in which images."""

    check: str
    text: str
    count: int = 1
    image_ids: list[ImageId] = field(default_factory=list)

    def __str__(self) -> str:
        return self.text + (f": {first_ids(self.image_ids)}" if self.image_ids else "")


@dataclass
class Report:
    """What :func:`inspect_proposals` finds: problems, and what may well be meant."""

    file: str
    dataset: str
    images: int = 0
    boxes: int = 0
    coverage: float = 0.0
    problems: list[Finding] = field(default_factory=list)
    notes: list[Finding] = field(default_factory=list)


def check_proposals(file: str | os.PathLike, dataset_name: str) -> list[str]:
    """What is wrong with a file of proposals for a data set, a sentence each; [] if it is sound.

    Reads the whole file. The checks are those of ``python -m fpn_ext.proposals validate``.

    Raises:
        FileNotFoundError: there is no such file.
    """
    return [str(problem) for problem in inspect_proposals(file, dataset_name).problems]


def inspect_proposals(file: str | os.PathLike, dataset_name: str) -> Report:
    """Check every value of a file of proposals, ours or Detectron2's ``.pkl``, for a data set.

    Problems: a file that cannot be read, bytes that changed since it was written, image ids that
    are missing or unknown, NaN and infinite values, boxes without area or outside of their image,
    scores out of order. Notes: images without proposals, another data set's name in the file,
    images whose size the data set does not tell.
    """
    report = Report(os.fspath(file), dataset_name)
    try:
        proposals = open_proposals(file)
    except ValueError as error:
        report.problems.append(Finding("unreadable", str(error)))
        return report
    report.images, report.boxes = len(proposals), proposals.num_boxes
    if isinstance(proposals, ProposalFile):
        for name in proposals.damaged_tensors():
            text = f"the bytes of {name!r} are not those that were written (CRC-32)"
            report.problems.append(Finding("checksum", text))
    sizes = {
        str(record["image_id"]): (record["image_id"], record.get("width"), record.get("height"))
        for record in get_detection_dataset_dicts(
            dataset_name, filter_empty=False, check_consistency=False
        )
    }
    _check_ids(report, proposals, [image_id for image_id, *_ in sizes.values()])
    _check_values(report, proposals, sizes)
    return report


def _check_ids(report: Report, proposals: Proposals, image_ids: list[ImageId]) -> None:
    known = set(map(str, image_ids))
    missing = [image_id for image_id in image_ids if image_id not in proposals]
    unknown = [image_id for image_id in proposals if str(image_id) not in known]
    for check, ids, what in (
        ("missing_ids", missing, f"images of {report.dataset!r} have no entry"),
        ("unknown_ids", unknown, f"entries are for images that {report.dataset!r} has not"),
    ):
        if ids:
            report.problems.append(Finding(check, f"{len(ids)} {what}", len(ids), ids))
    if proposals.dataset not in ("", report.dataset):
        text = f"it was made for data set {proposals.dataset!r}"
        report.notes.append(Finding("dataset", text))


def _check_values(report: Report, proposals: Proposals, sizes: dict[str, tuple]) -> None:
    counts: dict[str, dict[ImageId, int]] = {check: {} for check in _VALUE_CHECKS}
    empty: list[ImageId] = []
    unsized: list[ImageId] = []
    for image_id, (boxes, scores) in proposals.items():
        _, width, height = sizes.get(str(image_id), (image_id, None, None))
        if str(image_id) in sizes and not len(boxes):
            empty.append(image_id)
        if str(image_id) in sizes and not (width and height):
            unsized.append(image_id)
        for check, (faulty, _) in _VALUE_CHECKS.items():
            count = int(faulty(boxes, scores, (width or np.inf, height or np.inf)).sum())
            if count:
                counts[check][image_id] = count
    for check, (_, what) in _VALUE_CHECKS.items():
        if counts[check]:
            total, ids = sum(counts[check].values()), list(counts[check])
            text = f"{total} {what}, in {len(ids)} images"
            report.problems.append(Finding(check, text, total, ids))
    covered = sum(image_id in proposals for image_id, *_ in sizes.values()) - len(empty)
    report.coverage = covered / len(sizes)
    if empty:
        text = f"{len(empty)} images have an entry without boxes"
        report.notes.append(Finding("empty", text, len(empty), empty))
    if unsized:
        text = f"{len(unsized)} images have no width and height in the data set; whether boxes are "
        text += "outside of them is unknown"
        report.notes.append(Finding("unsized", text, len(unsized), unsized))


def _not_finite(boxes: np.ndarray, scores: np.ndarray, size: tuple) -> np.ndarray:
    finite: np.ndarray = np.isfinite(boxes).all(axis=1) & np.isfinite(scores)
    return ~finite


def _no_area(boxes: np.ndarray, scores: np.ndarray, size: tuple) -> np.ndarray:
    # Not "not >": NaN has a finding of its own.
    return np.less_equal(boxes[:, 2:], boxes[:, :2]).any(axis=1)


def _outside(boxes: np.ndarray, scores: np.ndarray, size: tuple) -> np.ndarray:
    low, high = -OUTSIDE_TOLERANCE, np.array([*size, *size]) + OUTSIDE_TOLERANCE
    finite = np.isfinite(boxes).all(axis=1)
    return finite & ((boxes < low) | (boxes > high)).any(axis=1)


def _out_of_order(boxes: np.ndarray, scores: np.ndarray, size: tuple) -> np.ndarray:
    return scores[1:] > scores[:-1]


_VALUE_CHECKS: dict[str, tuple[Callable[..., np.ndarray], str]] = {
    "not_finite": (_not_finite, "boxes have a coordinate or score that is NaN or infinite"),
    "no_area": (_no_area, "boxes have no area"),
    "outside": (_outside, "boxes stick out of their image"),
    "order": (_out_of_order, "boxes have a higher score than the one before"),
}


def proposal_stats(file: str | os.PathLike, dataset_name: str) -> dict[str, float]:
    """How good and how many the proposals in a file are, for a data set with ground truth.

    Returns:
        Average recall in percent (:func:`fpn_ext.recall.average_recall`), of all, small, medium and
        large objects, NaN where there are none: ``"AR@10"``, ``"ARs@10"``, ..., ``"ARl@1000"``.
        Then, over the images of the data set, ``"boxes per image"`` (mean), ``"fewest boxes"`` and
        ``"most boxes"``, and ``"images with boxes"``, in percent.

    Raises:
        FileNotFoundError, ValueError: the file cannot be read, or has values that are not finite.
    """
    proposals = open_proposals(file)
    ground_truth = ground_truth_of(dataset_name)
    best = {
        image_id: [array[: max(LIMITS)] for array in proposals[image_id]]
        for image_id in ground_truth.imgs
        if image_id in proposals
    }
    boxes = {image_id: own for image_id, (own, _) in best.items()}
    scores = {image_id: own for image_id, (_, own) in best.items()}
    stats: dict[str, float] = {}
    for limit in LIMITS:
        stats |= average_recall(ground_truth, boxes, scores, limits=(limit,))
    counts = [len(proposals[i][1]) if i in proposals else 0 for i in ground_truth.imgs]
    stats |= {
        "boxes per image": float(np.mean(counts)),
        "fewest boxes": min(counts),
        "most boxes": max(counts),
        "images with boxes": 100 * float(np.count_nonzero(counts)) / len(counts),
    }
    return stats


# The commands.


def _generate(args: argparse.Namespace) -> int:
    cfg = load_config(args.config_file, args.opts)
    check_top_k(args.top_k)
    check_config(cfg)
    check_weights(cfg, required=True)
    for note in (resolve_device(cfg), *resolve_bottom_up(cfg)):
        if note:
            print(note)
    cfg.freeze()
    model = build_model(cfg)
    CompleteCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    model = model_for_inference(cfg, model)
    for dataset, file in _outputs(args):
        generate_proposals(cfg, model, dataset, file, args.top_k)
        _say_written(file)
    return 0


def _ground_truth(args: argparse.Namespace) -> int:
    for dataset, file in _outputs(args):
        ground_truth_proposals(dataset, file)
        _say_written(file)
    return 0


def _selective_search(args: argparse.Namespace) -> int:
    for dataset, file in _outputs(args):
        selective_search_proposals(dataset, file, args.top_k, args.quality)
        _say_written(file)
    return 0


def _validate(args: argparse.Namespace) -> int:
    report = inspect_proposals(args.file, args.dataset)
    if args.json:
        print(json.dumps({"valid": not report.problems, **asdict(report)}, indent=1))
    else:
        print(
            f"{report.file}: {report.images} images, {report.boxes} boxes; proposals for "
            f"{report.coverage:.1%} of the images of {report.dataset!r}"
        )
        for note in report.notes:
            print(f"  note: {note}")
        for problem in report.problems:
            print(f"  PROBLEM: {problem}")
        print(f"{len(report.problems)} problem(s)" if report.problems else "no problems")
    return 1 if report.problems else 0


def _stats(args: argparse.Namespace) -> int:
    stats = proposal_stats(args.file, args.dataset)
    if args.json:
        print(json.dumps({k: None if math.isnan(v) else v for k, v in stats.items()}, indent=1))
        return 0
    print(f"{args.file} on {args.dataset!r}, average recall in percent:\n")
    print("limit" + "".join(f"{area:>9}" for area in ("all", "small", "medium", "large")))
    for limit in LIMITS:
        values = [stats[f"AR{suffix}@{limit}"] for suffix in AREA_SUFFIXES]
        print(f"{limit:5}" + "".join(f"{value:9.2f}" for value in values))
    print(
        f"\n{stats['boxes per image']:.1f} boxes per image ({stats['fewest boxes']} to "
        f"{stats['most boxes']}); {stats['images with boxes']:.1f}% of the images have boxes"
    )
    return 0


def _convert(args: argparse.Namespace) -> int:
    convert(args.source, args.target, args.noted_dataset)
    _say_written(args.target)
    return 0


def _outputs(args: argparse.Namespace) -> list[tuple[str, Path]]:
    return [(dataset, args.output / f"{dataset}.safetensors") for dataset in args.datasets]


def _say_written(file: str | os.PathLike) -> None:
    proposals = open_proposals(file)
    print(f"{os.fspath(file)}: {proposals.num_boxes} boxes on {len(proposals)} images")


def _check_datasets(names: Sequence[str]) -> None:
    for name in names:
        if name not in DatasetCatalog:
            raise ValueError(
                f"{name!r} is not a registered data set; "
                + did_you_mean(name, DatasetCatalog.keys())
                + ". KEY VALUE overrides of the config come last, after another option"
            )


def _parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m fpn_ext.proposals",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> Any:
        own = commands.add_parser(name, help=text.partition(". ")[0], description=text)
        own.set_defaults(run=run)
        return own

    def writes_datasets(own: argparse.ArgumentParser) -> None:
        own.add_argument(
            "--datasets",
            required=True,
            nargs="+",
            metavar="NAME",
            help="registered data sets, training and test sets alike; one file for each",
        )
        own.add_argument(
            "--output",
            required=True,
            type=Path,
            metavar="DIR",
            help="folder for the files, DIR/NAME.safetensors; existing ones are replaced",
        )

    def bounded(own: argparse.ArgumentParser) -> None:
        own.add_argument(
            "--top-k",
            type=int,
            default=TOP_K,
            metavar="N",
            help="the most proposals of one image (default: %(default)s)",
        )

    def checks_dataset(own: argparse.ArgumentParser) -> None:
        own.add_argument("file", metavar="FILE", help="a .safetensors, or Detectron2's .pkl")
        own.add_argument("--dataset", required=True, metavar="NAME", help="the data set it is for")
        own.add_argument("--json", action="store_true", help="print a JSON object instead of text")

    own = command(
        "generate",
        _generate,
        "Make proposals with a trained RPN. The model is a ProposalNetwork or a detector with an "
        "RPN inside; images are resized as for a test, none is left out, and boxes are given in "
        "pixels of the original image. MODEL.RPN.POST_NMS_TOPK_TEST bounds what the RPN gives.",
    )
    own.add_argument("--config-file", required=True, metavar="RPN.yaml")
    bounded(own)
    writes_datasets(own)
    own.add_argument(
        "opts",
        nargs="*",
        metavar="KEY VALUE",
        help="overrides of the config; MODEL.WEIGHTS, the checkpoint, must be there or in the file",
    )

    own = command(
        "ground-truth",
        _ground_truth,
        "Take the ground truth as proposals. What a box head reaches on them is the most it can "
        "reach on any. Crowd regions are left out; all boxes have the same score.",
    )
    writes_datasets(own)

    own = command(
        "selective-search",
        _selective_search,
        "Make proposals with OpenCV's selective search. It gives an order, not scores: the first "
        "box gets 0, the second -1, and so on. Needs the extra: pip install -e "
        "'.[selective-search]'.",
    )
    bounded(own)
    own.add_argument(
        "--quality",
        action="store_true",
        help="more boxes, several times slower, instead of its fast mode",
    )
    writes_datasets(own)

    own = command(
        "validate",
        _validate,
        "Check a file against a data set. All problems are listed, with their number and the first "
        "image ids. The exit code is 0 if there are none, else 1.",
    )
    checks_dataset(own)

    own = command(
        "stats",
        _stats,
        "Measure a file on a data set. Average recall (AR) of the 10, 100 and 1000 best boxes of "
        "each image, of small, medium and large objects; boxes per image; share of images.",
    )
    checks_dataset(own)

    own = command(
        "convert",
        _convert,
        "Convert Detectron2's .pkl into this project's .safetensors, or back. The suffixes say "
        "which. Detectron1's keys and XYWH boxes are understood; boxes and scores become float32. "
        "A .pkl is read without running what is in it.",
    )
    own.add_argument("source", metavar="IN")
    own.add_argument("target", metavar="OUT")
    own.add_argument(
        "--dataset",
        dest="noted_dataset",
        default="",
        metavar="NAME",
        help="name of the data set, to be noted in a .safetensors",
    )
    return top


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    # Progress and warnings, on standard error.
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    register_datasets()
    if "datasets" in args:
        _check_datasets(args.datasets)
    elif "dataset" in args:
        _check_datasets([args.dataset])
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
