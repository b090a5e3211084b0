"""Train a config: from MODEL.WEIGHTS, from the last checkpoint, or from a checkpoint's optimizer.

examples:
  fpn-ext train --config-file configs/demo/faster_rcnn_R_18_FPN.yaml
  fpn-ext train --config-file ... --num-gpus 8       # several processes: docs/guides/distributed.md
  fpn-ext train --config-file ... --resume           # go on with an interrupted training
  fpn-ext train --config-file ... --extend MODEL.WEIGHTS output/demo_R_18/model_final.pth \\
      OUTPUT_DIR output/longer
"""

import argparse
import signal

from .options import add_config, add_processes, add_tuning


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    add_tuning(parser)
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
    parser.add_argument(
        "--stop-signal",
        dest="stop_signals",
        action="append",
        default=[],
        type=signal_number,
        metavar="NAME",
        help="a signal that stops training without loss, as SIGTERM, SIGINT and SIGHUP do: e.g. "
        "SIGUSR1, where a batch scheduler warns with it (sbatch --signal=USR1@120)",
    )
    add_processes(parser)
    parser.set_defaults(eval_only=False)


def signal_number(name: str) -> int:
    """The number of a signal that a process can react to; otherwise an argparse error.

    >>> import signal
    >>> signal_number("SIGUSR1") == signal_number("usr1") == signal.SIGUSR1
    True
    """
    full = f"SIG{name.upper().removeprefix('SIG')}"
    if full not in signal.Signals.__members__ or full in ("SIGKILL", "SIGSTOP"):
        raise argparse.ArgumentTypeError(f"{name!r} is no signal that can be reacted to")
    return int(signal.Signals[full])


def run(args: argparse.Namespace) -> None:
    from ..engine.train import start

    start(args)
