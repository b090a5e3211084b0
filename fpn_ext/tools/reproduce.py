"""Train the rows of the paper's tables and set their scores beside the paper's.

Re-running skips completed rows and resumes an interrupted one.

examples:
  fpn-ext reproduce --table 1                                # generated images, on a CPU
  fpn-ext reproduce --table 1 --scale coco --num-gpus 8 --seeds 1
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--table", type=int, nargs="+", choices=(1, 2, 3, 6), required=True)
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="default: all rows of the tables")
    parser.add_argument(
        "--scale",
        choices=("small", "small-context", "small-gpu", "coco"),
        default="small",
        help="small: generated images, on a CPU; small-context: the same with small objects that "
        "only their surroundings tell apart; small-gpu: more and larger images, on a GPU; coco: "
        "the paper's recipe (default: %(default)s)",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], metavar="SEED")
    parser.add_argument("--num-gpus", type=int, metavar="N", help="for each training")
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="trainings at a time (default: 2 on a CPU, else 1)"
    )
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of each, on a CPU")
    parser.add_argument(
        "--work", metavar="FOLDER", help="checkpoints and logs (default: output/reproduce/SCALE)"
    )
    parser.add_argument(
        "--output",
        "--results",
        dest="results",
        metavar="FOLDER",
        help="scores and tables (default: results/paper-SCALE)",
    )
    parser.add_argument("--report-only", action="store_true", help="train nothing")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config overrides, for trials")


def run(args: argparse.Namespace) -> int:
    from ..paper.reproduce import reproduce

    return reproduce(args)
