"""Export a trained detector for another runtime, proved to find the same before it is written.

The file is run in its own runtime, beside the model, on pictures of three sizes; a table is
printed. If the two differ the file is not kept, and the exit status is 1.

examples:
  fpn-ext export --run output/demo --format onnx
  fpn-ext export --run output/demo --format openvino --output deployed/detector.xml
  fpn-ext export --config-file configs/detectron2/faster_rcnn_R_50_FPN_1x.yaml \\
      --format onnx --output detector.onnx MODEL.WEIGHTS model_final.pth
"""

import argparse

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
        help="the file; with --run, model.onnx (.xml, .pt, .pt2) in its folder unless given",
    )
    parser.add_argument(
        "--pictures",
        nargs="+",
        metavar="PATH",
        help="image files and folders to compare on, the first four; unless given, generated ones",
    )


def run(args: argparse.Namespace) -> int:
    from PIL import Image

    from ..data.reading import read_picture
    from ..export.formats import require
    from ..export.proof import table
    from ..export.write import export
    from ..inference.pictures import find_pictures
    from ..inference.predictor import Predictor, inference_config

    require(args.format)
    if args.output is None:
        if args.run is None:
            raise ValueError("--output FILE is needed without --run")
        args.output = args.run / f"model{SUFFIXES[args.format]}"
    files = find_pictures(args.pictures) if args.pictures else []
    take_run(args)
    opts = [*args.opts, "MODEL.DEVICE", "cpu"]
    cfg, notes = inference_config(args.config_file, opts, of_run=args.run is not None)
    print("\n".join(notes))
    predictor = Predictor(cfg)
    print(f"weights: {predictor.weights}")
    pictures = [
        Image.fromarray(read_picture(file, "RGB", predictor.value_range)) for file in files[:4]
    ]
    rows = export(cfg, predictor.model, predictor.classes, args.output, args.format, pictures)
    print(f"\n{table(rows)}\n\n{args.output}: finds what the model finds")
    return 0
