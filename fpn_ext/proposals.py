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
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model

from .bottom_ups import resolve_bottom_up
from .checkpoint import CompleteCheckpointer
from .config import check_config, check_weights, load_config, resolve_device
from .data import register_datasets
from .json_files import plain
from .names import did_you_mean
from .optimize import model_for_inference
from .proposal_pickle import convert, open_proposals
from .proposal_sources import (
    TOP_K,
    check_top_k,
    generate_proposals,
    ground_truth_proposals,
    selective_search_proposals,
)
from .proposal_stats import proposal_stats
from .proposal_validation import inspect_proposals
from .recall import AREA_SUFFIXES, LIMITS


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
    print(json.dumps(plain(report.as_json()), indent=1) if args.json else report)
    return 1 if report.problems else 0


def _stats(args: argparse.Namespace) -> int:
    stats = proposal_stats(args.file, args.dataset)
    if args.json:
        print(json.dumps(plain(stats), indent=1))
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
        parser = commands.add_parser(name, help=text.partition(". ")[0], description=text)
        parser.set_defaults(run=run)
        return parser

    def writes_datasets(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--datasets",
            required=True,
            nargs="+",
            metavar="NAME",
            help="registered data sets, training and test sets alike; one file for each",
        )
        parser.add_argument(
            "--output",
            required=True,
            type=Path,
            metavar="DIR",
            help="folder for the files, DIR/NAME.safetensors; existing ones are replaced",
        )

    def bounded(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--top-k",
            type=int,
            default=TOP_K,
            metavar="N",
            help="the most proposals of one image (default: %(default)s)",
        )

    def checks_dataset(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("file", metavar="FILE", help="a .safetensors, or Detectron2's .pkl")
        parser.add_argument(
            "--dataset", required=True, metavar="NAME", help="the data set it is for"
        )
        parser.add_argument(
            "--json", action="store_true", help="print a JSON object instead of text"
        )

    parser = command(
        "generate",
        _generate,
        "Make proposals with a trained RPN. The model is a ProposalNetwork or a detector with an "
        "RPN inside; images are resized as for a test, none is left out, and boxes are given in "
        "pixels of the original image. MODEL.RPN.POST_NMS_TOPK_TEST bounds what the RPN gives.",
    )
    parser.add_argument("--config-file", required=True, metavar="RPN.yaml")
    bounded(parser)
    writes_datasets(parser)
    parser.add_argument(
        "opts",
        nargs="*",
        metavar="KEY VALUE",
        help="overrides of the config; MODEL.WEIGHTS, the checkpoint, must be there or in the file",
    )

    parser = command(
        "ground-truth",
        _ground_truth,
        "Take the ground truth as proposals. What a box head reaches on them is the most it can "
        "reach on any. Crowd regions are left out; all boxes have the same score.",
    )
    writes_datasets(parser)

    parser = command(
        "selective-search",
        _selective_search,
        "Make proposals with OpenCV's selective search. It gives an order, not scores: the first "
        "box gets 0, the second -1, and so on. Needs the extra: pip install -e "
        "'.[selective-search]'.",
    )
    bounded(parser)
    parser.add_argument(
        "--quality",
        action="store_true",
        help="more boxes, several times slower, instead of its fast mode",
    )
    writes_datasets(parser)

    parser = command(
        "validate",
        _validate,
        "Check a file against a data set. All problems are listed, with their number and the first "
        "image ids. The exit code is 0 if there are none, else 1.",
    )
    checks_dataset(parser)

    parser = command(
        "stats",
        _stats,
        "Measure a file on a data set. Average recall (AR) of the 10, 100 and 1000 best boxes of "
        "each image, of small, medium and large objects; boxes per image; share of images.",
    )
    checks_dataset(parser)

    parser = command(
        "convert",
        _convert,
        "Convert Detectron2's .pkl into this project's .safetensors, or back. The suffixes say "
        "which. Detectron1's keys and XYWH boxes are understood; boxes and scores become float32. "
        "A .pkl is read without running what is in it.",
    )
    parser.add_argument("source", metavar="IN")
    parser.add_argument("target", metavar="OUT")
    parser.add_argument(
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
