"""Run ``fpn-ext`` commands in subprocesses, with their output in a file.

A command started here does not outlive the process that started it, however that ends: the system
is asked to send it SIGTERM then, on which a training writes a checkpoint.
"""

import itertools
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ..parent import STARTED_BY


def run(
    arguments: Sequence[str], log: Path, threads: int | None = None, folder: Path | None = None
) -> float:
    """Run ``fpn-ext`` with ``arguments`` and wait for it to end.

    Args:
        arguments: the verb and its arguments, e.g. ``["train", "--config-file", ...]``.
        log: file to append its output to.
        threads: CPU threads for its operators; None for one per core.
        folder: its working directory; None for the current one.

    Returns:
        CPU time in seconds.

    Raises:
        RuntimeError: it failed; names the log and quotes its last lines.
    """
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", STARTED_BY: str(os.getpid())}
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "fpn_ext", *arguments],
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        last = log.read_text(errors="replace").strip().splitlines()[-3:]
        verb = " ".join(itertools.takewhile(lambda word: word[:1] != "-", arguments))
        raise RuntimeError(
            f"fpn-ext {verb} ended with exit status {process.returncode}; see {log}: "
            f"{' | '.join(last)}"
        )
    return usage.ru_utime + usage.ru_stime
