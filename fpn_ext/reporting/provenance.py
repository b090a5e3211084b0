"""Provenance of figures: commit, hardware and versions, for every report that states figures."""

import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch

from .. import _d2_compat

PACKAGES = ("torchvision", "numpy", "pycocotools", "fvcore")


def commit() -> str:
    """The project's commit, with ``-dirty`` if modified; "" outside its git checkout."""
    here = Path(__file__)
    # If installed inside another project's checkout, this file is untracked.
    if _output("git", "ls-files", here.name, folder=here.parent) != here.name:
        return ""
    return _output("git", "describe", "--always", "--dirty", folder=here.parent)


def hardware(device: str = "cpu") -> str:
    """Name of the GPU, or of the CPU with its number of cores: ``2 x AMD EPYC``.

    Args:
        device: as in ``MODEL.DEVICE``: cpu, cuda, cuda:1.
    """
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    if sys.platform == "darwin":
        name = _output("sysctl", "-n", "machdep.cpu.brand_string") or name
    elif Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        if names:
            name = f"{len(names)} x {names[0]}"
    return name


def versions() -> dict[str, str]:
    """Versions of Python, Detectron2 and the packages that affect results, by name.

    >>> list(versions())
    ['python', 'detectron2', 'torch', 'torchvision', 'numpy', 'pycocotools', 'fvcore']
    """
    # Not importlib's: an uncompiled Detectron2 has no metadata.
    kind = "compiled" if _d2_compat.has_compiled_operators() else "uncompiled"
    return {
        "python": platform.python_version(),
        "detectron2": f"{_d2_compat.version(_d2_compat.detectron2_folder())}, {kind}",
        "torch": torch.__version__,  # with build tag: +cu126, +cpu
        **{package: version(package) for package in PACKAGES},
    }


def _output(*command: str, folder: Path | None = None) -> str:
    """A command's output; "" if it fails or is not installed."""
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=folder).stdout.strip()
    except FileNotFoundError:
        return ""


def command_line() -> str:
    """The command that started this process, as one would type it."""
    name = Path(sys.argv[0]).name
    words = ["fpn-ext"] if name in ("__main__.py", "fpn-ext") else ["python", name]
    return shlex.join([*words, *sys.argv[1:]])
