"""Shared by anchor_report and level_report: arguments and files."""

import argparse
from collections.abc import Callable
from typing import TypeVar

import matplotlib.pyplot as plt
from detectron2.config import CfgNode
from matplotlib.figure import Figure

from ..config.data_keys import resolve_data
from ..config.load import load_config, written_keys
from ..data.datasets import register_datasets
from ..data.training_boxes import TrainingBoxes, read_boxes
from ..reporting.drawn import write_figure
from ..reporting.findings import Report
from ..reporting.json_files import write_json

R = TypeVar("R", bound=Report)


def run(
    args: argparse.Namespace,
    make: Callable[[CfgNode, TrainingBoxes], R],
    draw: Callable[[R], Figure],
    picture: str,
) -> None:
    """Make a report of the datasets that the arguments name, and print it.

    Args:
        args: of ``fpn-ext anchors`` or ``fpn-ext levels``.
        make: makes the report on the boxes.
        draw: draws the report's figure.
        picture: file name of the figure.

    Raises:
        FileNotFoundError, TypeError, ValueError: invalid arguments.
    """
    report = make(*config_and_boxes(args))
    print(report)
    if args.json:
        write_json(args.json, report.as_json())
    if args.output:
        figure = draw(report)
        write_figure(figure, args.output / picture)
        plt.close(figure)
        print(f"\nwrote {args.output / picture}")


def config_and_boxes(args: argparse.Namespace) -> tuple[CfgNode, TrainingBoxes]:
    """The config and the boxes named by the arguments of :func:`run`.

    Raises:
        FileNotFoundError, TypeError, ValueError: invalid arguments.
    """
    cfg = load_config(args.config_file, args.opts)
    register_datasets()
    for note in resolve_data(cfg, False, written_keys(args.config_file, args.opts)):
        print(note)
    if args.dataset:
        cfg.DATASETS.TRAIN = (args.dataset,)
    return cfg, read_boxes(cfg.DATASETS.TRAIN)
