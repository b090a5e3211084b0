"""The folder of a training, ``OUTPUT_DIR``: what of a run is in it, and what of it is used.

Nothing in it names the folder, so that it can be moved or copied.
"""

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import yaml

from .safe_yaml import load_yaml

CONFIG = "config.yaml"
RECORD = "finished.json"  # of a finished training: the files that it consists of
# Weights to use, the best first: of the best score, averaged, as trained.
FINISHED = ("model_best.pth", "model_final_ema.pth", "model_final.pth")

_CHECKPOINT = re.compile(r"\w+_\d{7}\.pth")


def config_of(run: Path) -> Path:
    """The config that a run was trained with.

    Raises:
        FileNotFoundError: the folder is none of a training.
    """
    file = run / CONFIG
    if not file.is_file():
        what = "no such folder" if not run.is_dir() else f"no {CONFIG} in this folder"
        raise FileNotFoundError(f"the run {run}: {what}; name the OUTPUT_DIR of a training")
    return file


def weights_of(run: Path) -> Path:
    """The weights of a run to use: of its best score, else averaged, else final, else the last.

    Of a finished training, one that it consists of: averaged weights or a best score of before it
    went on without are none. Nor are final weights of before it went on, while it has not ended.

    Raises:
        FileNotFoundError: there are none.
    """
    there = [name for name in FINISHED if (run / name).is_file()]
    recorded = _recorded(run)
    for name in [name for name in there if name in recorded] or _of_now(run, there):
        return run / name
    numbered = [file for file in run.glob("*.pth") if _CHECKPOINT.fullmatch(file.name)]
    if not numbered:
        raise FileNotFoundError(
            f"the run {run}: no weights in this folder ({', '.join(FINISHED)}, or a checkpoint); "
            "train first, or name them: MODEL.WEIGHTS FILE"
        )
    return max(numbered, key=lambda file: file.stem[-7:])


def _of_now(run: Path, files: list[str]) -> list[str]:
    """Those of an unfinished training that are not of before it went on."""
    tag = run / "last_checkpoint"
    last = tag.read_text(errors="replace").strip() if tag.is_file() else ""
    if not (_CHECKPOINT.fullmatch(last) and (run / last).is_file()):
        return files
    best = FINISHED[0]
    return [best] if best in files and _looks_for_the_best(run) else []


def _looks_for_the_best(run: Path) -> bool:
    try:
        config = load_yaml((run / CONFIG).read_text(), CONFIG)
        return bool(config["TEST"]["FPN_EXT"]["BEST_METRIC"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return False


def _recorded(run: Path) -> list[str]:
    try:
        return [str(name) for name in json.loads((run / RECORD).read_text())["files"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def taken_from(run: Path, opts: Sequence[str] = (), weights: bool = True) -> tuple[str, list[str]]:
    """The config of a run, and overrides that put the model of the run in it.

    Args:
        run: folder of a training.
        opts: ``KEY VALUE ...``, which come after what is taken from the folder.
        weights: also take its weights, unless ``opts`` has MODEL.WEIGHTS.

    Raises:
        FileNotFoundError: the folder is none of a training, or has no weights.
    """
    config = config_of(run)
    taken = ["OUTPUT_DIR", str(run)]
    if weights and "MODEL.WEIGHTS" not in opts[::2]:
        taken += ["MODEL.WEIGHTS", str(weights_of(run))]
    return str(config), [*taken, *opts]


def left_by_a_run(folder: Path) -> str:
    """What a training has left in a folder, in a word or two; "" if nothing.

    Scores, logs and configs alone are none: an evaluation writes them, too. Nor are weights of
    another name, to start from.
    """
    for file in sorted(folder.glob("*.pth"), reverse=True):
        if file.name in FINISHED or _CHECKPOINT.fullmatch(file.name):
            return file.name
    if (folder / "last_checkpoint").is_file():
        return "last_checkpoint"
    metrics = folder / "metrics.json"  # made, and empty, before the first iterations
    return metrics.name if metrics.is_file() and metrics.stat().st_size else ""


def next_free(folder: Path, is_taken: Callable[[Path], bool]) -> Path:
    """A folder, or if that is taken ``folder-2``, ``folder-3``, ... beside it.

    >>> str(next_free(Path("output/mine"), lambda path: path.name in ("mine", "mine-2")))
    'output/mine-3'
    """
    candidate, number = folder, 1
    while is_taken(candidate):
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder that nobody had, as :func:`next_free` names it; removed at the end if still empty.

    It is made at once, so that two commands that begin together have one each.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as run:
    ...     found = Path(run, "predictions")
    ...     with new_folder(found) as first, new_folder(found) as second:
    ...         print(first.name, second.name)
    predictions predictions-2
    """
    while True:
        made = next_free(folder, lambda path: os.path.lexists(path))
        made.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):  # another was faster
            made.mkdir()
            break
    try:
        yield made
    finally:
        with contextlib.suppress(OSError):  # something was written
            made.rmdir()
