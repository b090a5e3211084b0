"""Train two configs with the same seeds: difference and spread of their scores.

The seed fixes the initial weights and the data order. Rounding alone makes two trainings with one
seed end at different scores, so runs are compared as two samples, not in pairs.
"""

import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from ..config.defaults import flat
from ..config.load import load_config, written_keys
from ..config.numerics import resolve_numerics
from ..engine import jobs
from ..engine.finished import is_finished
from ..files.weight_files import local_file
from ..reporting.json_files import plain, write_json
from ..reporting.measuring import markdown_table
from ..reporting.provenance import commit, hardware, versions


def compare_training(
    sides: dict[str, CfgNode],
    files: dict[str, str],
    opts: Sequence[str],
    seeds: Sequence[int],
    folder: Path,
    num_gpus: int = 1,
) -> dict[str, Any]:
    """Train both configs once per seed, and compare the scores.

    Every run is an ``fpn-ext train`` process in ``folder/SIDE/seed_SEED``, with its output in
    ``console.log``. Runs with a ``results.json`` are skipped; interrupted ones resume from their
    last checkpoint.

    Args:
        sides: the configs ``ours`` and ``control``.
        files: the YAML files they were loaded from.
        opts: the ``KEY VALUE ...`` they were loaded with.
        seeds: ``SEED`` of each run.
        folder: for all output.
        num_gpus: per run.

    Returns:
        The input of :func:`markdown`.

    Raises:
        ValueError: a seed is negative (Detectron2 then draws one) or given twice; a run in
            ``folder`` has a different config.
        FileNotFoundError, ConnectionError: the initial weights are not available.
        RuntimeError: a training failed.
    """
    if min(seeds) < 0 or len({*seeds}) < len(seeds):
        raise ValueError(f"--seeds must be different numbers from 0 up, got {list(seeds)}")
    for cfg in sides.values():
        if cfg.MODEL.WEIGHTS:
            local_file(cfg.MODEL.WEIGHTS)  # fail now, not in every run
    runs = [
        _run(side, seed, cfg, files[side], opts, folder, num_gpus)
        for seed in seeds
        for side, cfg in sides.items()
    ]
    check_same_data([folder / side / f"seed_{seed}" for seed in seeds for side in sides])
    return {"seeds": list(seeds), "runs": runs, "scores": spread_rows(runs)}


def _run(
    side: str,
    seed: int,
    cfg: CfgNode,
    file: str,
    opts: Sequence[str],
    folder: Path,
    num_gpus: int,
) -> dict[str, Any]:
    """The contents of a run's ``results.json``, training it first if needed."""
    output = folder / side / f"seed_{seed}"
    _check_config_of_run(output / "config.yaml", cfg, seed)
    if (output / "results.json").is_file():
        print(f"{side}, seed {seed}: done already", file=sys.stderr, flush=True)
        return json.loads((output / "results.json").read_text())

    log = output / "console.log"
    resumed = (output / "last_checkpoint").is_file()
    words = "goes on" if resumed else "begins"
    print(f"{side}, seed {seed}: training {words}, see {log}", file=sys.stderr, flush=True)
    command = ["train", "--config-file", file, "--resume"]
    command += ["--num-gpus", str(num_gpus), *opts, "SEED", str(seed), "OUTPUT_DIR", str(output)]
    began = time.perf_counter()
    if not is_finished(output):  # else it was, and its results were not yet written
        jobs.run(command, log)
    scores = {
        name: json.loads((output / "inference" / name / "results.json").read_text())
        for name in cfg.DATASETS.TEST
    }
    results = {
        "side": side,
        "seed": seed,
        "scores": scores,
        "seconds": round(time.perf_counter() - began, 1),
        "resumed": resumed,
        "commit": commit(),
        "hardware": hardware(cfg.MODEL.DEVICE),
        "versions": versions(),
    }
    write_json(output / "results.json", results)
    return results


def _check_config_of_run(file: Path, cfg: CfgNode, seed: int) -> None:
    """Raise ValueError if an existing run, finished or not, has a different config."""
    if not file.is_file():
        return
    of_run = load_config(str(file))
    resolve_numerics(of_run, written_keys(str(file)))
    wanted, there = plain(flat(cfg) | {"SEED": seed}), plain(flat(of_run))
    different = [
        f"\n  - {key} is {there.get(key)!r} there, {wanted.get(key)!r} now"
        for key in sorted({**wanted, **there})
        if key != "OUTPUT_DIR" and there.get(key) != wanted.get(key)
    ]
    if different:
        raise ValueError(
            f"{file.parent} holds a run of another config; name another --output, or remove it:"
            + "".join(different)
        )


def check_same_data(folders: Sequence[Path]) -> None:
    """Raise ValueError unless the runs were trained and scored on the same data of ``--data``."""
    first, *others = folders
    for name in sorted({file.name for folder in folders for file in _data_of(folder)}):
        for other in others:
            contents = [_content(folder / "data" / name) for folder in (first, other)]
            if contents[0] != contents[1]:
                raise ValueError(
                    f"{first} and {other} are of different data ({name}), as where images or "
                    "annotations changed in between: remove the runs on those of before, or name "
                    "another --output"
                )


def _data_of(folder: Path) -> list[Path]:
    return [f for f in (folder / "data").glob("*.json") if not f.name.endswith("_split.json")]


def _content(file: Path) -> bytes:
    return file.read_bytes() if file.is_file() else b""


def spread_rows(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per score: ``dataset``, ``task``, ``metric``; ``ours`` and ``control``, each with
    ``mean``, ``std`` (of the sample), ``min``, ``max``; ``difference`` of the means and its
    ``standard_error``, sqrt(s1^2 / n1 + s2^2 / n2).

    Values undefined for a single run are None, as are scores that are NaN in some run.
    """
    rows = []
    for dataset, tasks in runs[0]["scores"].items():
        for task, metrics in tasks.items():
            for metric in metrics:
                key = (dataset, task, metric)
                ours, control = (_spread(runs, side, key) for side in ("ours", "control"))
                row = {"dataset": dataset, "task": task, "metric": metric}
                row |= {"ours": ours, "control": control, "difference": None}
                row |= {"standard_error": None}
                if ours and control:
                    row["difference"] = ours["mean"] - control["mean"]
                    if ours["std"] is not None and control["std"] is not None:
                        variances = (s["std"] ** 2 / s["runs"] for s in (ours, control))
                        row["standard_error"] = math.sqrt(sum(variances))
                rows.append(row)
    return rows


def _spread(runs: list[dict[str, Any]], side: str, key: tuple[str, str, str]) -> dict | None:
    dataset, task, metric = key
    values = [
        run["scores"].get(dataset, {}).get(task, {}).get(metric)
        for run in runs
        if run["side"] == side
    ]
    if None in values:
        return None
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "min": min(values),
        "max": max(values),
        "runs": len(values),
    }


def markdown(results: dict[str, Any]) -> str:
    """The sections of the report, from the result of :func:`compare_training`."""
    sections = [
        "## Scores\n\nMean ± standard deviation (lowest to highest); the difference of the means ± "
        "its standard error.",
        markdown_table(
            ["dataset", "", "ours", "control", "difference"],
            [
                [
                    *(row["dataset"], f"{row['task']} {row['metric']}"),
                    *(_spread_text(row["ours"]), _spread_text(row["control"])),
                    _with_error(row["difference"], row["standard_error"]),
                ]
                for row in results["scores"]
            ],
        ),
        "## Runs",
        markdown_table(
            ["", "seed", "seconds", "", "commit", "hardware"],
            [
                [
                    *(run["side"], str(run["seed"]), f"{run['seconds']:.1f}"),
                    "since it went on from a checkpoint" if run["resumed"] else "",
                    *(run["commit"], run["hardware"]),
                ]
                for run in results["runs"]
            ],
        ),
    ]
    for what in ("commit", "hardware", "versions"):
        if len({str(run[what]) for run in results["runs"]}) > 1:
            sections.append(f"**The runs are not all of the same {what}.**")
    return "\n\n".join(sections)


def _spread_text(spread: dict[str, Any] | None) -> str:
    if spread is None:
        return "not a number in every run"
    text = _with_error(spread["mean"], spread["std"])
    return f"{text} ({spread['min']:.3f} to {spread['max']:.3f})" if spread["runs"] > 1 else text


def _with_error(value: float | None, error: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if error is None else f"{value:.3f} ± {error:.3f}"
