"""Export a trained detector for another runtime, proved to find the same before it is written.

The file is run in its own runtime, beside the model, on pictures of three sizes; a table is
printed. If the two differ the file is not kept, and the exit status is 1. With --int8 that file is
quantised, calibrated on DATASETS.TRAIN, and kept if AP on DATASETS.TEST does not fall by more than
--max-ap-loss.

examples:
  fpn-ext export --run output/demo --format onnx
  fpn-ext export --run output/demo --format openvino --output deployed/detector.xml
  fpn-ext export --run output/demo --format openvino --int8 --max-ap-loss 0.5
  fpn-ext export --config-file configs/detectron2/faster_rcnn_R_50_FPN_1x.yaml \\
      --format onnx --output detector.onnx MODEL.WEIGHTS model_final.pth
"""

import argparse
import sys
from typing import Any

from .options import add_config, file_to_write, take_run

# As in fpn_ext/export/formats.py, which --help does not import.
SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "torchscript": ".pt", "pt2": ".pt2"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser, run=True, has_data=False)
    parser.add_argument("--format", required=True, choices=list(SUFFIXES), help="of the file")
    parser.add_argument(
        "--output",
        type=file_to_write,
        metavar="FILE",
        help="the file; with --run, model.onnx (.xml, .pt, .pt2) in its folder unless given, "
        "model_int8.onnx (.xml) with --int8",
    )
    parser.add_argument(
        "--pictures",
        nargs="+",
        metavar="PATH",
        help="image files and folders to compare on, the first four; unless given, generated ones",
    )
    parser.add_argument(
        "--int8",
        action="store_true",
        help="the network in eight bits; onnx and openvino, the latter needs nncf",
    )
    parser.add_argument(
        "--calibration-pictures",
        type=int,
        metavar="N",
        help="with --int8: images of DATASETS.TRAIN to calibrate on (300, or all of fewer)",
    )
    parser.add_argument(
        "--max-ap-loss",
        type=float,
        metavar="AP",
        help="with --int8: the most that AP, of 100, may fall on DATASETS.TEST (1.0)",
    )


def run(args: argparse.Namespace) -> int:
    from PIL import Image

    from ..data.reading import read_picture
    from ..engine.interrupts import ended_in_order
    from ..export.formats import require
    from ..export.int8 import require_int8
    from ..export.proof import table
    from ..export.write import check_suffix, export
    from ..export.write_int8 import costs_table, export_int8
    from ..inference.pictures import find_pictures
    from ..inference.predictor import Predictor, inference_config

    form = require(args.format)
    of_int8 = _options_of_int8(args)
    if args.int8:
        require_int8(args.format)
    if args.output is None:
        if args.run is None:
            raise ValueError("--output FILE is needed without --run")
        name = "model_int8" if args.int8 else "model"
        args.output = args.run / f"{name}{SUFFIXES[args.format]}"
    check_suffix(args.output, args.format, form)
    files = find_pictures(args.pictures, "--pictures") if args.pictures else []
    take_run(args)
    opts = [*args.opts, "MODEL.DEVICE", "cpu"]
    # Without --int8 no dataset is needed, so that those of another machine do not matter.
    of_run = args.run is not None and not args.int8
    cfg, notes = inference_config(args.config_file, opts, of_run=of_run)
    print("\n".join(notes))
    predictor = Predictor(cfg)
    print(f"weights: {predictor.weights}")
    pictures = [
        Image.fromarray(read_picture(file, "RGB", predictor.value_range)) for file in files[:4]
    ]
    what = (cfg, predictor.model, predictor.classes, args.output, args.format, pictures, _report)
    with ended_in_order():  # without leaving a file half written
        if args.int8:
            found = export_int8(*what, **of_int8)
            print(f"\nIn float32:\n\n{table(found.rows)}\n\n{costs_table(found)}\n")
            print(f"{args.output}: calibrated on {found.pictures} images")
        else:
            print(f"\n{table(export(*what))}\n\n{args.output}: finds what the model finds")
    return 0


def _report(step: str) -> None:
    print(f"{step} ...", file=sys.stderr, flush=True)


def _options_of_int8(args: argparse.Namespace) -> dict[str, Any]:
    """Those that are given.

    Raises:
        ValueError: one is, without --int8.
    """
    given = {
        name: getattr(args, name)
        for name in ("calibration_pictures", "max_ap_loss")
        if getattr(args, name) is not None
    }
    if given and not args.int8:
        options = " and ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(f"{options} needs --int8")
    return given
