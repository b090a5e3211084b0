"""Draw ground truth beside detections for several test images, and the curves of a training.

With --run, --output is that folder.

examples:
  fpn-ext contact-sheet --run output/demo
  fpn-ext contact-sheet --config-file configs/demo/faster_rcnn_R_18_FPN.yaml --output out \\
      MODEL.WEIGHTS output/demo_R_18/model_final.pth
"""

import argparse

from .options import add_config, add_detections, add_output, output_of_run, take_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser, run=True)
    add_output(parser, "the pictures", required=False)
    parser.add_argument("--num-images", type=int, default=12, metavar="N", help="(%(default)s)")
    add_detections(parser)


def run(args: argparse.Namespace) -> None:
    from pathlib import Path

    from ..inference.predictor import load_inference_config
    from ..inspection.contact_sheet import contact_sheet, draw_curves
    from ..reporting.drawn import write_picture

    output_of_run(args, "")
    take_run(args)
    cfg = load_inference_config(args.config_file, args.opts)
    sheet = args.output / "contact_sheet.png"
    picture = contact_sheet(cfg, args.num_images, args.min_score, args.label_levels)
    write_picture(picture, sheet)
    print(f"wrote {sheet}")
    metrics = Path(cfg.MODEL.WEIGHTS).parent / "metrics.json"  # of the training that they are of
    if metrics.is_file():
        draw_curves(metrics, args.output / "curves.png")
        print(f"wrote {args.output / 'curves.png'}, of {metrics}")
