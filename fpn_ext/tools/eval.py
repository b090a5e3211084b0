"""Evaluate a checkpoint on DATASETS.TEST; scores go to OUTPUT_DIR/inference/DATASET/results.json.

Where that holds other scores, a copy of them stays: results-1.json, results-2.json, ...

examples:
  fpn-ext eval --run output/demo
  fpn-ext eval --config-file configs/demo/faster_rcnn_R_18_FPN.yaml \\
      MODEL.WEIGHTS output/demo_R_18/model_final.pth
  fpn-ext eval --config-file ... --resume            # OUTPUT_DIR's last checkpoint
"""

import argparse

from .options import add_config, add_json, add_processes, add_tuning, take_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser, run=True)
    add_tuning(parser)
    parser.add_argument(
        "--resume", action="store_true", help="evaluate OUTPUT_DIR's last checkpoint"
    )
    add_json(parser)
    add_processes(parser)
    parser.set_defaults(eval_only=True, extend=False, new_folder=False)


def run(args: argparse.Namespace) -> None:
    from ..engine.train import start

    take_run(args)
    start(args)
