"""What is installed here, what is wrong with it, and the command that mends it.

    python -m fpn_ext.doctor
    python -m fpn_ext.doctor --output /where/runs/go --json report.json

Works where nothing else does: it needs Python's standard library alone, and asks everything that
may fail (PyTorch, Detectron2, this package) in processes of their own. Exit code: 0 without errors
(warnings may be there), 1 with errors.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from . import installation, machine
from .findings import Finding, conclude


def examine(output: str | os.PathLike = "output") -> list[Finding]:
    """Everything that is looked at, in the order of the report.

    Args:
        output: where runs are to write (``OUTPUT_DIR``).
    """
    package, package_fault = installation.probe(installation.PACKAGE_PROBE)
    torch, torch_fault = (package, "") if package else installation.probe(installation.TORCH_PROBE)
    parts: list[Callable[[], Iterable[Finding]]] = [
        installation.python_version,
        installation.packages,
        lambda: installation.torch_import(torch, torch_fault),
        lambda: installation.detectron2(torch),
        lambda: installation.cuda(torch),
        lambda: installation.package(package, package_fault),
        lambda: installation.triton(torch, package),
        lambda: machine.cpu(torch),
        lambda: machine.datasets(package),
        lambda: machine.output_folder(Path(output)),
        machine.shared_memory,
    ]
    return [finding for part in parts for finding in part()]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m fpn_ext.doctor", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--output", default="output", help="where runs write; default: %(default)s")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the findings here")
    args = parser.parse_args(argv)
    findings = examine(args.output)
    return conclude(findings, args.json)


if __name__ == "__main__":
    sys.exit(main())
