"""What a finished training consists of, and whether one is finished.

A training is more than its iterations: after the last of them come the last evaluation, augmented
evaluation and averaged weights. ``finished.json``, written after all of it, lists the files;
without it ``--resume`` completes what is missing.
"""

import json
from pathlib import Path

from detectron2.config import CfgNode

from ..files.run_folder import RECORD
from ..keys import own_keys
from ..reporting.json_files import write_json


def files_of(cfg: CfgNode) -> list[str]:
    """The files of a finished training, relative to OUTPUT_DIR.

    >>> from fpn_ext import get_cfg
    >>> cfg = get_cfg()
    >>> cfg.DATASETS.TEST = ("photos_val",)
    >>> cfg.SOLVER.FPN_EXT.EMA_DECAY = 0.999
    >>> cfg.TEST.AUG.ENABLED = True
    >>> for name in files_of(cfg):
    ...     print(name)
    model_final.pth
    model_final_ema.pth
    inference/photos_val/results.json
    inference_TTA/photos_val/results.json
    """
    files = ["model_final.pth"]
    if own_keys(cfg, "SOLVER").EMA_DECAY > 0:
        files.append("model_final_ema.pth")
    files += [f"inference/{name}/results.json" for name in cfg.DATASETS.TEST]
    if own_keys(cfg, "TEST").BEST_METRIC:
        files.append("model_best.pth")
    if cfg.TEST.AUG.ENABLED:
        files += [f"inference_TTA/{name}/results.json" for name in cfg.DATASETS.TEST]
    return files


def mark_finished(cfg: CfgNode, iterations: int) -> None:
    """Record that a training has done everything, and which of :func:`files_of` it has.

    What a trainer of the user's does not write (no evaluation, no score that is a number) is not
    missed later.
    """
    folder = Path(cfg.OUTPUT_DIR)
    there = [name for name in files_of(cfg) if (folder / name).is_file()]
    write_json(folder / RECORD, {"iterations": iterations, "files": there})


def mark_unfinished(cfg: CfgNode) -> None:
    """Take the record away, as a training begins or goes on."""
    Path(cfg.OUTPUT_DIR, RECORD).unlink(missing_ok=True)


def is_finished(folder: Path) -> bool:
    """Whether the training in a folder has done everything, and its files are still there."""
    try:
        record = json.loads((folder / RECORD).read_text())
        return all((folder / name).is_file() for name in record["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
