"""What is installed here, what is wrong with it, and the command that fixes it.

Works where nothing else does: it needs Python's standard library only, and asks everything that
may fail (PyTorch, Detectron2, this package) in processes of their own. Exit status: 0 without
errors (there may be warnings), 1 with errors.

examples:
  fpn-ext doctor
  fpn-ext doctor --output /where/runs/go --json report.json
  fpn-ext doctor --compile
"""

import argparse
import subprocess
import sys

from .options import add_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", default="output", metavar="FOLDER", help="where runs write (%(default)s)"
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="first compile the kernels in C for this processor, with GCC, into the cache folder",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from ..doctor.examine import examine
    from ..reporting.findings import conclude

    if args.compile:
        # In a process of its own, as it needs PyTorch.
        subprocess.run([sys.executable, "-m", "fpn_ext.kernels.compiled"], check=False)
    return conclude(examine(args.output), args.json)
