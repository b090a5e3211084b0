"""Train a config: from MODEL.WEIGHTS, from the last checkpoint, or from a checkpoint's optimizer.

examples:
  fpn-ext train --config-file configs/demo/faster_rcnn_R_18_FPN.yaml
  fpn-ext train --config-file ... --num-gpus 8       # several processes: docs/guides/distributed.md
  fpn-ext train --config-file ... --resume           # go on with an interrupted training
  fpn-ext train --config-file ... --extend MODEL.WEIGHTS output/demo/model_final.pth \\
      OUTPUT_DIR output/longer
"""

import argparse

from .options import add_config, add_processes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with everything of OUTPUT_DIR's last checkpoint",
    )
    parser.add_argument(
        "--extend",
        action="store_true",
        help="begin a new schedule with the weights and the optimizer's state of MODEL.WEIGHTS",
    )
    parser.add_argument(
        "--new-folder",
        action="store_true",
        help="where OUTPUT_DIR holds a training, train into OUTPUT_DIR-2 (-3, ...) beside it",
    )
    add_processes(parser)
    parser.set_defaults(eval_only=False)


def run(args: argparse.Namespace) -> None:
    from ..engine.train import start

    start(args)
