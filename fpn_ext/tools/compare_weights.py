"""Compare a config with its control, with the same weights in both models.

How far every stage, the detections and the scores differ, how long an image takes and how much
memory. Exit status 1 where a difference is larger than the project's parity tests allow; a key that
only one side reads, such as CANONICAL_BOX_SIZE, makes one.

example:
  fpn-ext compare weights --weights output/demo_R_18/model_final.pth --output out \\
      --config-file configs/demo/faster_rcnn_R_18_FPN.yaml \\
      --control configs/demo/faster_rcnn_R_18_FPN_builtin.yaml \\
      MODEL.FPN_EXT.CANONICAL_BOX_SIZE 224
"""

import argparse

from .options import add_output, add_sides


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_sides(parser)
    parser.add_argument(
        "--weights", required=True, help="a .pth or .pkl file, or detectron2://... (model zoo)"
    )
    parser.add_argument(
        "--num-images", type=int, metavar="N", help="of each dataset, the first (default: all)"
    )
    parser.add_argument(
        "--rounds", type=int, default=5, metavar="N", help="of timing, 0 for none (%(default)s)"
    )
    add_output(parser, "the report, as Markdown and JSON, and the detections", required=False)


def run(args: argparse.Namespace) -> int:
    from ..inspection.compare import compare

    return compare(args, "weights")
