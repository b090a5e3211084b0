"""The paper's alternating training: an RPN and a detector, then both again on one shared backbone.

Each step has its folder; re-running skips completed steps and resumes an interrupted one.

example:
  fpn-ext four-step --rpn configs/paper/table5/rpn_R_50.yaml \\
      --detector configs/paper/table5/fast_rcnn_R_50.yaml --output output/paper/table5/R_50
"""

import argparse

from .options import add_output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rpn", required=True, metavar="FILE", help="config of the RPN alone")
    parser.add_argument(
        "--detector",
        required=True,
        metavar="FILE",
        help="config of the Fast R-CNN; its files of proposals are replaced",
    )
    add_output(parser, "all steps")
    parser.add_argument(
        "--steps",
        type=int,
        choices=(2, 4),
        default=4,
        help="2: RPN and detector on backbones of their own, nothing shared",
    )
    parser.add_argument(
        "--num-gpus", type=int, default=0, metavar="N", help="0: as fpn-ext train chooses"
    )
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="overrides of both configs")


def run(args: argparse.Namespace) -> None:
    from ..paper.four_step import four_step

    four_step(args)
