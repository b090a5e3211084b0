"""Convert Detectron2's .pkl of proposals into this project's .safetensors, or back.

The suffixes say which. Detectron1's keys and XYWH boxes are understood; boxes and scores become
float32. Reading a .pkl never executes code.

example:
  fpn-ext proposals convert rpn_proposals.pkl rpn_proposals.safetensors --dataset coco_2017_val
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="IN")
    parser.add_argument("target", metavar="OUT")
    parser.add_argument(
        "--dataset", default="", metavar="NAME", help="of the dataset, noted in a .safetensors"
    )


def run(args: argparse.Namespace) -> None:
    from ..proposals.detectron2_pickle import convert, summary

    convert(args.source, args.target, args.dataset)
    print(summary(args.target))
