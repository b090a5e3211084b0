"""What is installed, what is wrong with it, and the command that fixes it.

    fpn-ext doctor
    fpn-ext doctor --output /where/runs/go --json report.json

Works on a broken installation: it needs only Python's standard library, and probes everything that
may fail (PyTorch, Detectron2, this package) in subprocesses. Exit code: 0 without errors (there may
be warnings), 1 with errors.
"""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from ..reporting.findings import Finding
from . import installation, machine


def examine(output: str | os.PathLike = "output") -> list[Finding]:
    """All findings, in the order of the report.

    Args:
        output: the folder that runs will write to (``OUTPUT_DIR``).
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
        lambda: machine.kernels(package),
        lambda: machine.datasets(package),
        lambda: machine.output_folder(Path(output)),
        machine.shared_memory,
    ]
    return [finding for part in parts for finding in part()]
