"""What a training of a reproduction was made with, kept in its folder from its beginning.

A training may be stopped and continued, by another commit, or be finished and its result lost. What
its result says of it, weights, config, commits and CPU time, is therefore of all who trained.
"""

import json
from pathlib import Path
from typing import Any

from ..files.run_folder import left_by_a_run
from ..reporting.json_files import write_json

FILE = "begun.json"
UNKNOWN = "unknown"  # the commits of a folder from before they were kept


def read(folder: Path) -> dict[str, Any]:
    """What the folder of a training says; empty where none has begun."""
    file = folder / FILE
    if not (file.is_file() and left_by_a_run(folder)):
        return {}
    record: dict[str, Any] = json.loads(file.read_text())
    return record


def begin(folder: Path, commit: str, weights: str = "", config: str = "") -> None:
    """Before a training, or its continuation by ``commit``.

    Args:
        weights, config: digests of the initial weights and of the config.
    """
    record: dict[str, Any] = {"weights": weights, "config": config}
    record |= {"commits": [], "cpu_seconds": 0.0}
    if left_by_a_run(folder):
        record |= {"commits": [UNKNOWN], **read(folder)}
    record["commits"] = list(dict.fromkeys([*record["commits"], commit]))
    write_json(folder / FILE, record)


def check(folder: Path, name: str, weights: str, config: str) -> None:
    """Raise ValueError if run ``name`` was begun from other weights, or with another config."""
    then = {"weights": weights, "config": config, **read(folder)}
    if then["weights"] != weights:
        raise ValueError(
            f"pretrained.pth, the initial weights of all rows, was replaced after {name} began in "
            f"{folder.parent}: SHA-256 {then['weights'] or 'none'} then, {weights or 'none'} now. "
            "Put it back, or choose other folders with --work and --output"
        )
    if then["config"] != config:
        raise ValueError(
            f"{folder} holds a training of {name} with another config (SHA-256 {then['config']}, "
            f"not {config}): choose another folder with --work"
        )


def trained(folder: Path, cpu_seconds: float) -> None:
    """After a training: add its CPU time."""
    record = json.loads((folder / FILE).read_text())
    write_json(folder / FILE, {**record, "cpu_seconds": record["cpu_seconds"] + cpu_seconds})


def made_by(folder: Path) -> dict[str, Any]:
    """``commit``, all that trained, and ``cpu_seconds``, of those that were not killed."""
    record = json.loads((folder / FILE).read_text()) if (folder / FILE).is_file() else {}
    commits = record.get("commits", [UNKNOWN])
    return {"commit": ", ".join(commits), "cpu_seconds": round(record.get("cpu_seconds", 0))}
