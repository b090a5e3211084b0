"""Draw what a model does with an image: best anchors, proposals by level, feature maps.

With --run, --output is look in that folder.

examples:
  fpn-ext look --run output/demo --input photo.jpg
  fpn-ext look --config-file configs/demo/faster_rcnn_R_18_FPN.yaml --output out \\
      MODEL.WEIGHTS output/demo_R_18/model_final.pth
  fpn-ext look --config-file ... --input photo.jpg --output out --tensorboard MODEL.WEIGHTS ...
"""

import argparse

from .options import add_config, add_output, output_of_run, take_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser, run=True)
    add_output(parser, "the pictures", required=False)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--dataset", metavar="NAME", help="instead of DATASETS.TEST's first")
    source.add_argument("--input", nargs="+", metavar="PATH", help="image files and folders")
    parser.add_argument(
        "--num-images", type=int, default=2, metavar="N", help="of the dataset (%(default)s)"
    )
    parser.add_argument("--image-id", nargs="+", default=(), help="these of the dataset")
    parser.add_argument("--proposals", type=int, default=50, help="max to draw (%(default)s)")
    parser.add_argument("--tensorboard", action="store_true", help="write event files as well")


def run(args: argparse.Namespace) -> None:
    from ..inspection.look import look

    output_of_run(args, "look")
    take_run(args)
    look(args)
