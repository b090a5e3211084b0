"""Convert a dataset between COCO's, Pascal VOC's and YOLO's formats; images are copied.

What the target cannot hold (crowd regions in YOLO and VOC, masks in VOC) is counted and said.

examples:
  fpn-ext data convert photos/ --to coco --output photos_coco
  fpn-ext data convert photos.yaml --to yolo --output photos_yolo
"""

import argparse

from .options import DATA, add_output, data_source


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", type=data_source, help=DATA)
    parser.add_argument("--to", required=True, choices=("coco", "voc", "yolo"), help="the format")
    add_output(parser, "the dataset, which must not be there yet")


def run(args: argparse.Namespace) -> None:
    from ..data.convert import convert

    print(convert(args.source, args.to, args.output))
