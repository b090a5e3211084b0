"""Train a classifier of generated shapes; `fpn-ext reproduce --scale small` starts from it.

example:
  fpn-ext pretrain --config-file configs/paper/scale/small.yaml --output shapes.pth
"""

import argparse
from pathlib import Path

from .options import add_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser, has_data=False)
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="weights")
    parser.add_argument("--iterations", type=int, default=1000, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="(default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    from ..paper.pretrain import write_pretrained

    accuracy = write_pretrained(
        args.config_file, args.opts, args.iterations, args.seed, args.output
    )
    print(f"{args.output}: accuracy {accuracy:.1f} % on the last images of the training")
