"""What anchor_report and level_report have in common: arguments, files, exit code."""

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import matplotlib.pyplot as plt
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from matplotlib.figure import Figure

from .atomic import replacing
from .config import load_config
from .data import register_datasets
from .findings import Report
from .json_files import write_json
from .training_boxes import TrainingBoxes, read_boxes

R = TypeVar("R", bound=Report)


def run(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    make: Callable[[CfgNode, TrainingBoxes], R],
    draw: Callable[[R], Figure],
    picture: str,
) -> int:
    """Make a report of the data sets that the arguments name, and print it.

    Args:
        parser: of :func:`argument_parser`.
        argv: the arguments; None for those of the command line.
        make: the report of the boxes; what it raises as OSError, TypeError or ValueError is a
            mistake in the arguments.
        draw: the picture of a report.
        picture: the name of its file.

    Returns:
        The exit code.
    """
    args = parser.parse_args(argv)
    try:
        cfg, found = config_and_boxes(args)
        report = make(cfg, found)
    except (OSError, TypeError, ValueError) as error:
        parser.error(str(error))
    print(report)
    if args.json:
        write_json(args.json, report.as_json())
    if args.output:
        figure = draw(report)
        with replacing(args.output / picture) as stream:
            figure.savefig(stream, dpi=120, format="png")
        plt.close(figure)
        print(f"\nwrote {args.output / picture}")
    return 0


def argument_parser(prog: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m fpn_ext.{prog}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument(
        "--dataset", metavar="NAME", help="a registered data set, instead of DATASETS.TRAIN"
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the whole report here")
    parser.add_argument("--output", metavar="FOLDER", type=Path, help="write a picture (PNG) here")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="overrides of the config")
    return parser


def config_and_boxes(args: argparse.Namespace) -> tuple[CfgNode, TrainingBoxes]:
    """What the arguments of :func:`argument_parser` name.

    Raises:
        FileNotFoundError, TypeError, ValueError: what of it is wrong.
    """
    cfg = load_config(args.config_file, args.opts)
    register_datasets()
    if args.dataset:
        cfg.DATASETS.TRAIN = (args.dataset,)
    for name in cfg.DATASETS.TRAIN:
        annotations = MetadataCatalog.get(name).get("json_file") if name in DatasetCatalog else None
        if args.json and annotations and _same(args.json, annotations):
            raise ValueError(f"--json {args.json} would overwrite the annotations of {name}")
    return cfg, read_boxes(cfg.DATASETS.TRAIN)


def _same(file: Path, other: str | os.PathLike) -> bool:
    return file.resolve() == Path(other).resolve()
