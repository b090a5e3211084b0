"""Make the generated dataset of the demo, unless it is there, and print its counts.

example:
  fpn-ext demo-data --num-train 800 --num-val 160
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="(default: demo_multiscale in DETECTRON2_DATASETS, or datasets/)",
    )
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--num-train", type=int, default=800, help="images (%(default)s)")
    parser.add_argument("--num-val", type=int, default=160, help="images (%(default)s)")
    parser.add_argument(
        "--image-size", type=int, default=224, help="longer side in pixels (%(default)s)"
    )
    parser.add_argument(
        "--distractors", type=int, default=0, help="max shapes that are not objects (%(default)s)"
    )
    parser.add_argument(
        "--companions",
        type=int,
        default=0,
        help="max small discs, from 2, of the class of the shapes far around them (%(default)s)",
    )


def run(args: argparse.Namespace) -> None:
    from ..data.demo_data import default_root, ensure, table

    root = args.output or default_root()
    summary = ensure(
        root,
        seed=args.seed,
        num_train=args.num_train,
        num_val=args.num_val,
        image_size=args.image_size,
        distractors=args.distractors,
        companions=args.companions,
    )
    print(f"{root}\n{table(summary)}")
