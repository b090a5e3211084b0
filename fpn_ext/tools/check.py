"""Check a config before training or evaluation: keys, names, levels, weights, data, schedule.

All that is wrong is said at once, each with what would mend it. `fpn-ext train` makes the same
checks, each before the step that it protects. Exit status: 0 without errors (there may be
warnings), 1 with errors. No image is opened: for these, `fpn-ext data`. The evaluation is
rehearsed on every dataset of DATASETS.TEST: on no detections, and on its own objects as detections,
which must score 100.

examples:
  fpn-ext check --config-file configs/demo/faster_rcnn_R_18_FPN.yaml
  fpn-ext check --config-file ... --eval-only MODEL.WEIGHTS output/demo_R_18/model_final.pth
"""

import argparse

from .options import add_config, add_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument("--eval-only", action="store_true", help="check for an evaluation only")
    parser.add_argument(
        "--num-gpus", type=int, default=1, metavar="N", help="to train on (default: %(default)s)"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    if args.num_gpus < 0:
        raise ValueError(f"--num-gpus must be at least 0, got {args.num_gpus}")
    from ..engine.check_run import examine, quiet
    from ..reporting.findings import conclude

    with quiet():  # the report covers the rest
        findings = examine(args.config_file, args.opts, args.eval_only, args.num_gpus or 1)
    return conclude(findings, args.json)
