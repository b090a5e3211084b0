"""Detect objects on images: an annotated copy of each, and all detections as COCO-format JSON.

With --run, --output is predictions in that folder, or predictions-2, ... if there are some already.
Where --output has a detections.json of before, that is kept as detections-1.json, -2, ...
Exit status 1 if a picture could not be read; those that could are done.

examples:
  fpn-ext predict --run output/demo photo.jpg folder/
  fpn-ext predict --run output/demo --tiles 640 aerial.png
  fpn-ext predict --config-file configs/demo/faster_rcnn_R_18_FPN.yaml \\
      --input photo.jpg folder/ --output out MODEL.WEIGHTS output/demo_R_18/model_final.pth
"""

import argparse
import contextlib
import sys

from .options import add_config, add_detections, add_output, add_tuning, split_words, take_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser, run=True, paths="image files and folders")
    add_tuning(parser)
    parser.add_argument("--input", nargs="+", metavar="PATH", help="image files and folders")
    add_output(parser, "annotated copies and detections.json", required=False)
    add_detections(parser)
    parser.add_argument(
        "--tiles",
        type=int,
        metavar="N",
        help="detect on overlapping tiles of N x N px and on the whole image, for small objects in "
        "large images; boxes alone. Needs sahi",
    )


def run(args: argparse.Namespace) -> int:
    from ..engine.interrupts import ended_in_order
    from ..files.run_folder import new_folder
    from ..inference.pictures import find_pictures, predict
    from ..inference.predictor import load_inference_config
    from ..inference.tiles import check_tiles

    paths, args.opts = split_words([*(args.input or ()), *args.opts])
    if not paths:
        raise ValueError("no pictures: name files or folders, e.g. fpn-ext predict --run DIR a.jpg")
    if args.output is None and args.run is None:
        raise ValueError("--output FOLDER is needed without --run")
    if args.tiles is not None:
        check_tiles(args.tiles)
    pictures = find_pictures(paths)
    take_run(args)
    cfg = load_inference_config(args.config_file, args.opts, of_run=args.run is not None)
    with ended_in_order(), contextlib.ExitStack() as stack:
        if args.output is None:
            args.output = stack.enter_context(new_folder(args.run / "predictions"))
        result = predict(cfg, pictures, args.output, args.min_score, args.label_levels, args.tiles)
    skipped = len(result["skipped"])
    print(
        f"{len(result['annotations'])} detections of score {args.min_score:g} or more "
        f"(--min-score) on {len(result['images'])} image(s): "
        f"{args.output / 'detections.json'}, annotated copies beside it"
    )
    if skipped:
        print(f"{skipped} image(s) could not be read and were skipped", file=sys.stderr)
    return int(skipped > 0)
