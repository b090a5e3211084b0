"""Print the worked example of a pyramid: what an image of a given size becomes in a model.

The maps of the bottom-up network, the lateral connections and the top-down pathway, and the levels,
with their sizes and channels; the anchors of each level; the level that boxes of given sizes are
pooled from; which levels share weights; the parameters of each part. All is measured on the model
of the config, without weights and without computing anything. Without --config-file and --run it is
Faster R-CNN on ResNet-50 (configs/detectron2/faster_rcnn_R_50_FPN_1x.yaml).

examples:
  fpn-ext explain --size 512
  fpn-ext explain --size 800x1333 --config-file configs/demo/faster_rcnn_R_18_FPN.yaml
  fpn-ext explain MODEL.FPN_EXT.BOTTOM_UP torchvision/convnext_tiny --boxes 16 32 100x300
"""

import argparse
import math
import re

from .options import add_config, add_json, take_run

CONFIG = "configs/detectron2/faster_rcnn_R_50_FPN_1x.yaml"

# What a config says of data does not matter here, and the data need not be there.
NO_DATA = (
    *("DATASETS.TRAIN", "()", "DATASETS.TEST", "()", "DATASETS.FPN_EXT.DATA", ""),
    *("DATASETS.PROPOSAL_FILES_TRAIN", "()", "DATASETS.PROPOSAL_FILES_TEST", "()"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser, required=False, run=True, has_data=False)
    parser.add_argument(
        "--size",
        type=image_size,
        default=(512, 512),
        metavar="SIZE",
        help="of the image as the network gets it, in pixels: 800x1333 is HEIGHTxWIDTH, one number "
        "a square (512)",
    )
    parser.add_argument(
        "--boxes",
        type=box_size,
        nargs="+",
        metavar="SIZE",
        help="of boxes to pool, in pixels of that image (16 32 64 112 224 448)",
    )
    add_json(parser)


def image_size(text: str) -> tuple[int, int]:
    """(height, width) of ``"512"`` or ``"800x1333"``; otherwise an argparse error.

    >>> image_size("512"), image_size("800x1333")
    ((512, 512), (800, 1333))
    """
    found = re.fullmatch(r"(\d{1,9})(?:x(\d{1,9}))?", text)
    if not found or 0 in (sides := (int(found[1]), int(found[2] or found[1]))):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no size in whole pixels: 512 (a square) or 800x1333 (HEIGHTxWIDTH)"
        )
    return sides


def box_size(text: str) -> tuple[float, float]:
    """The same for a box, whose sides need not be whole.

    >>> box_size("223.5"), box_size("100x300")
    ((223.5, 223.5), (100.0, 300.0))
    """
    try:
        height, _, width = text.partition("x")
        sides = float(height), float(width or height)
    except ValueError:
        sides = 0.0, 0.0
    if not all(math.isfinite(side) and side > 0 for side in sides) or text.endswith("x"):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no size of a box: 224 (a square) or 100x300 (HEIGHTxWIDTH), in pixels; "
            "KEY VALUE overrides come before --boxes"
        )
    return sides


def run(args: argparse.Namespace) -> None:
    from ..config.prepare import prepare
    from ..inspection.explain import BOXES, explain
    from ..reporting.json_files import write_json

    take_run(args, weights=False)
    opts = [*args.opts, *NO_DATA]
    cfg = prepare(str(args.config_file or CONFIG), opts).cfg
    explanation = explain(cfg, args.size, args.boxes or BOXES)
    print(explanation)
    if args.json:
        write_json(args.json, explanation.as_json())
