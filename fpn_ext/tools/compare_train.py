"""Compare a config with its control, both trained from the same seeds.

Mean and spread of every score, and the difference of the means with its standard error. Re-running
skips completed trainings and resumes an interrupted one.

example:
  fpn-ext compare train --seeds 1 2 3 --output output/compare \\
      --config-file configs/demo/faster_rcnn_R_18_FPN.yaml \\
      --control configs/demo/faster_rcnn_R_18_FPN_builtin.yaml
"""

import argparse

from .options import add_output, add_sides


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_sides(parser)
    parser.add_argument("--seeds", type=int, nargs="+", required=True, metavar="SEED")
    add_output(parser, "runs and report")
    parser.add_argument("--num-gpus", type=int, default=1, metavar="N", help="of each training")


def run(args: argparse.Namespace) -> int:
    from ..inspection.compare import compare

    return compare(args, "train")
