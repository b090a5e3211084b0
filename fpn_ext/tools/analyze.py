"""Say what a detector gets right and wrong: classes, scores, confusions, error types, levels.
With --detections no model is run; --config-file then adds AP by pyramid level.
With --run, --output is analysis in that folder, or analysis-2, ... if there is one already.

examples:
  fpn-ext analyze --run output/demo
  fpn-ext analyze --config-file configs/demo/faster_rcnn_R_18_FPN.yaml --output out \\
      MODEL.WEIGHTS output/demo_R_18/model_final.pth
  fpn-ext analyze --detections coco_instances_results.json --annotations instances_val.json \\
      --output out --json analysis.json
"""

import argparse
import contextlib
from pathlib import Path

from .options import add_config, add_json, add_output, score, take_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser, required=False, run=True)
    parser.add_argument("--dataset", metavar="NAME", help="instead of DATASETS.TEST's first")
    parser.add_argument(
        "--detections", type=Path, metavar="FILE", help="COCO results, instead of running a model"
    )
    parser.add_argument(
        "--annotations", type=Path, metavar="FILE", help="COCO annotations of the --detections"
    )
    parser.add_argument(
        "--task",
        action="append",
        default=[],
        choices=("bbox", "segm", "keypoints"),
        help="analyse boxes, masks or keypoints; may be repeated (default: all that are detected)",
    )
    parser.add_argument(
        "--min-score",
        type=score,
        metavar="S",
        help="of the detections in the confusion matrix (default: the score with the best F1)",
    )
    add_json(parser)
    add_output(parser, "analysis.html and the images", required=False)


def run(args: argparse.Namespace) -> None:
    from ..files.run_folder import new_folder
    from ..inspection.analysis_report import run as report

    take_run(args, weights=not args.detections)
    with contextlib.ExitStack() as stack:
        if args.output is None and args.run is not None:
            args.output = stack.enter_context(new_folder(args.run / "analysis"))
        report(args)
