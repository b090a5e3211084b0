"""Count how many boxes of a dataset are pooled from each pyramid level.

examples:
  fpn-ext levels --config-file configs/demo/faster_rcnn_R_18_FPN.yaml
  fpn-ext levels --config-file ... --dataset bccd_trainval --json report.json --output out
"""

import argparse

from .options import add_boxes_report, take_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_boxes_report(parser)


def run(args: argparse.Namespace) -> None:
    from ..inspection.level_report import run as report

    take_run(args, weights=False)
    report(args)
