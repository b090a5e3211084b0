"""Whether this machine can run it: cores and threads, datasets, disk space and memory.

Needs only Python's standard library.
"""

import os
import shlex
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..reporting.findings import Finding

MEGABYTE = 1024**2
CONTAINER_FILES = ("/.dockerenv", "/run/.containerenv")  # of Docker, of Podman


def cpu(torch: dict[str, Any]) -> Iterable[Finding]:
    cores = usable_cores()
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    threads = torch.get("threads", 0)
    value = f"{cores:g} core(s) to use, {torch.get('cpu', 'unknown')} instructions"
    if wanted and not wanted.isdigit():
        yield Finding("warning", "CPU", f"OMP_NUM_THREADS is {wanted!r}", "unset OMP_NUM_THREADS")
    elif threads > max(1, cores):
        yield Finding(
            "warning",
            "CPU",
            f"{value}, and PyTorch runs {threads} threads: they will wait for each other",
            f"export OMP_NUM_THREADS={max(1, int(cores))}",
        )
    else:
        yield Finding("ok", "CPU", f"{value}, {threads} thread(s)")


def kernels(package: dict[str, Any]) -> Iterable[Finding]:
    """Whether the kernels in C are compiled for this processor."""
    instructions = package.get("kernels")
    if instructions:
        yield Finding("ok", "compiled kernels", f"for {instructions}")
    elif package:
        yield Finding(
            "note",
            "compiled kernels",
            "none: inference on a CPU takes longer, with the same results",
            "fpn-ext doctor --compile",
        )


def usable_cores() -> float:
    """CPU cores this process may use, by affinity and container quota."""
    count = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0)
    count = count or float(os.cpu_count() or 1)
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return min(count, int(quota) / int(period))
    except (OSError, ValueError):  # no cgroup v2, or "max": no quota
        return count


def datasets(package: dict[str, Any]) -> Iterable[Finding]:
    root = Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser()
    source = "DETECTRON2_DATASETS" if "DETECTRON2_DATASETS" in os.environ else "the default"
    there = package.get("there", [])
    value = f"{root} ({source}): {', '.join(there) or 'none there yet'}; demo sets are made on use"
    if source == "DETECTRON2_DATASETS" and not root.is_dir():
        yield Finding(
            "warning",
            "datasets",
            f"{root} ({source}) is no folder",
            f"mkdir -p {shlex.quote(str(root))}, or export DETECTRON2_DATASETS=/where/they/are",
        )
    else:
        yield Finding("ok", "datasets", value)


def output_folder(output: Path) -> Iterable[Finding]:
    folder = next(f for f in (output.absolute(), *output.absolute().parents) if f.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        yield Finding(
            "error",
            "output",
            f"{folder} cannot be written into",
            "put OUTPUT_DIR /somewhere/writable behind the command",
        )
        return
    free = shutil.disk_usage(folder).free
    value = f"{output}: {free // MEGABYTE} MB free"
    if free < 2048 * MEGABYTE:
        yield Finding(
            "warning",
            "output",
            f"{value}; a checkpoint of R-50 FPN takes about 320 MB",
            "put OUTPUT_DIR /where/there/is/room behind the command",
        )
    else:
        yield Finding("ok", "output", value)


def shared_memory() -> Iterable[Finding]:
    if not os.path.isdir("/dev/shm"):
        return  # not Linux
    size = shutil.disk_usage("/dev/shm").total
    value = f"/dev/shm has {size // MEGABYTE} MB"
    if size < 1024 * MEGABYTE:
        yield Finding(
            "warning",
            "shared memory",
            f"{value}: DataLoader workers hand images over in it, and die when it is full",
            f"DATALOADER.NUM_WORKERS 0 behind the command, or {_more_shared_memory()}",
        )
    else:
        yield Finding("ok", "shared memory", value)


def _more_shared_memory() -> str:
    if any(map(os.path.exists, CONTAINER_FILES)):
        return "start this container with --shm-size=8g"
    return "mount -o remount,size=8g /dev/shm (as root)"
