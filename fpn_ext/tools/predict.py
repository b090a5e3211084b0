"""Detect objects on images: an annotated copy of each, and all detections as COCO-format JSON.

example:
  fpn-ext predict --config-file configs/demo/faster_rcnn_R_18_FPN.yaml \\
      --input photo.jpg folder/ --output out MODEL.WEIGHTS output/demo/model_final.pth
"""

import argparse

from .options import add_config, add_detections, add_output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument(
        "--input", required=True, nargs="+", metavar="PATH", help="image files and folders"
    )
    add_output(parser, "annotated copies and detections.json")
    add_detections(parser)


def run(args: argparse.Namespace) -> None:
    from ..inference.pictures import find_pictures, load_inference_config, predict

    pictures = find_pictures(args.input)
    cfg = load_inference_config(args.config_file, args.opts)
    result = predict(cfg, pictures, args.output, args.min_score, args.label_levels)
    print(
        f"{len(result['annotations'])} detections on {len(pictures)} image(s): "
        f"{args.output / 'detections.json'}, annotated copies beside it"
    )
