"""Reproduce the paper's tables: train and evaluate every row, compare with the paper's figures.

    fpn-ext reproduce --table 1 2 3 6 --scale small --seeds 1 2 3

A run is one row trained with one seed, by ``fpn-ext train`` on the row's YAML overlaid with the
scale's. Completed runs are skipped: stop at any time and repeat the command to resume. Every run
writes ``runs/<run>.json`` to the results folder; the tables are made from these files only.
"""

import argparse
import hashlib
import json
import shlex
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

from ..config.digest import config_digest
from ..config.load import load_config, written_keys
from ..config.numerics import unresolved_yaml
from ..data.datasets import register_datasets
from ..engine import jobs
from ..engine.finished import is_finished
from ..files.atomic import write_text
from ..files.run_folder import left_by_a_run
from ..reporting import provenance
from ..reporting.json_files import write_json
from . import begun, published
from .scales import CONFIGS, SCALES
from .tables import write_tables

TASKS = {1: "box_proposals", 2: "bbox", 3: "bbox", 6: "mask_proposals"}  # in results.json


@dataclass(frozen=True)
class Run:
    """One training: a table row with a seed.

    What is not a row of Tables 1 to 3 and 6 is a subclass that says where its config is
    (``benchmarks/figure1.py``, ``benchmarks/departures.py``).
    """

    table: int
    row: str
    seed: int

    @property
    def name(self) -> str:
        return f"table{self.table}_{self.row}_seed{self.seed}"

    @property
    def file(self) -> Path:
        """The YAML file, before the scale's is put on it."""
        return CONFIGS / f"table{self.table}" / f"{self.row}.yaml"

    @property
    def overlays(self) -> Sequence[str]:
        """Files in ``configs/paper/scale/`` put on top of the scale's."""
        return ()

    @property
    def times_as_long(self) -> int:
        """How many times the scale's iterations: two where the paper's row has twice as many."""
        return 2 if self.row.endswith("_2x") else 1

    @property
    def opts(self) -> Sequence[str]:
        """``KEY VALUE ...`` overrides of this run."""
        return ()

    @property
    def identity(self) -> dict[str, Any]:
        """What its result is filed under."""
        return {"table": self.table, "row": self.row, "seed": self.seed}

    @property
    def proposals_from(self) -> "Run | None":
        """The run whose RPN proposes for this one: all of Table 2 shares row 1 (c)'s proposals."""
        return Run(1, published.BASELINES[1], self.seed) if self.table == 2 else None


@dataclass
class Reproduction:
    """The runs of one scale: where they are stored, and how to do one.

    Args:
        scale: a name in :data:`SCALES`.
        work: folder for checkpoints, logs and proposals.
        results: folder for the results: runs/*.json and the tables.
        num_gpus: GPUs per training; 0 for the CPU.
        threads: CPU threads per training.
        opts: final ``KEY VALUE ...`` overrides, for trials.
    """

    scale: str
    work: Path
    results: Path
    num_gpus: int = 0
    threads: int = 1
    opts: Sequence[str] = ()

    @property
    def weights(self) -> Path:
        """The initial weights of all runs, unless from the model zoo."""
        return self.work / "pretrained.pth"

    def folder(self, run: Run) -> Path:
        return self.work / run.name

    def proposals(self, run: Run, dataset: str) -> Path:
        return self.folder(run) / "proposals" / f"{dataset}.safetensors"

    def result_file(self, run: Run) -> Path:
        return self.results / "runs" / f"{run.name}.json"

    def config(self, run: Run) -> CfgNode:
        """The run's config: the row's YAML, the scale's, and the run's own settings."""
        scale = SCALES[self.scale]
        row, *overlays = self._files(run)
        cfg = load_config(str(row))
        for overlay in overlays:
            cfg.merge_from_file(str(overlay))
        if scale.overlay:
            cfg.SOLVER.MAX_ITER *= run.times_as_long
            cfg.SOLVER.STEPS = tuple(step * run.times_as_long for step in cfg.SOLVER.STEPS)
            cfg.MODEL.WEIGHTS = str(self.weights)
        else:
            # With fewer than 8 GPUs Detectron2 scales batch, learning rate and schedule together.
            cfg.SOLVER.REFERENCE_WORLD_SIZE = 8
        cfg.MODEL.ANCHOR_GENERATOR.SIZES = [
            [side * scale.anchor_factor for side in of_map]
            for of_map in cfg.MODEL.ANCHOR_GENERATOR.SIZES
        ]
        cfg.MODEL.DEVICE = "cuda" if self.num_gpus else "cpu"
        cfg.SEED = run.seed
        cfg.merge_from_list([*self.opts, *run.opts])
        cfg.OUTPUT_DIR = str(self.folder(run))
        if run.proposals_from:
            for split in ("TRAIN", "TEST"):
                cfg.DATASETS[f"PROPOSAL_FILES_{split}"] = tuple(
                    str(self.proposals(run.proposals_from, name)) for name in cfg.DATASETS[split]
                )
        return cfg

    def config_text(self, run: Run, folder: Path | None = None) -> str:
        """The run's config as YAML, which each of its commands prepares itself.

        Args:
            folder: instead of the run's own.
        """
        cfg = self.config(run)
        cfg.OUTPUT_DIR = str(folder or cfg.OUTPUT_DIR)
        written = {*self.opts[::2], *run.opts[::2]}
        written = written.union(*(written_keys(str(file)) for file in self._files(run)))
        return unresolved_yaml(cfg, written)

    def _files(self, run: Run) -> list[Path]:
        overlay = SCALES[self.scale].overlay_of(run.table)
        overlays = [overlay, *run.overlays] if overlay else run.overlays
        return [run.file, *(CONFIGS / "scale" / name for name in overlays)]

    def digest(self, run: Run) -> str:
        """A hash of the config, independent of file locations."""
        cfg = self.config(run)
        cfg.OUTPUT_DIR = ""
        if SCALES[self.scale].overlay:
            cfg.MODEL.WEIGHTS = ""
        cfg.DATASETS.PROPOSAL_FILES_TRAIN = cfg.DATASETS.PROPOSAL_FILES_TEST = ()
        return config_digest(cfg)

    def result(self, run: Run) -> dict[str, Any] | None:
        """The result of an earlier run, or None.

        Raises:
            ValueError: it was made with a different config.
        """
        file = self.result_file(run)
        if not file.exists():
            return None
        result: dict[str, Any] = json.loads(file.read_text())
        if result["config_sha256"] != self.digest(run):
            raise ValueError(
                f"{file} was made with another config; move it away to train this row again, or "
                "choose other folders with --work and --results"
            )
        return result

    def plan(self, wanted: Iterable[Run]) -> list[Run]:
        """The remaining runs, each after the one that provides its proposals; or a ValueError."""
        todo: list[Run] = []
        for run in wanted:
            begun.check(self.folder(run), run.name, self._weights_digest(), self.digest(run))
            if run in todo or self.result(run):
                continue
            source = run.proposals_from
            if source and source not in todo and not self._has_proposals(source):
                todo.append(source)
            todo.append(run)
        return todo

    def _has_proposals(self, run: Run) -> bool:
        datasets = self._datasets(run)
        return all(self.proposals(run, name).exists() for name in datasets)

    def _datasets(self, run: Run) -> list[str]:
        cfg = self.config(run)
        return [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]

    def prepare(self, run: Run) -> None:
        """Create shared data and pretrained weights before runs start in parallel.

        Raises:
            RuntimeError: pretraining failed; names its log.
        """
        for name in self._datasets(run):
            DatasetCatalog.get(name)
        overlay = SCALES[self.scale].overlay
        if overlay and not self.weights.exists():
            print(f"pretraining {self.weights}", flush=True)
            self.work.mkdir(parents=True, exist_ok=True)
            pretrain = ["pretrain", "--output", str(self.weights)]
            pretrain += ["--config-file", str(CONFIGS / "scale" / overlay)]
            pretrain += ["MODEL.DEVICE", self.config(run).MODEL.DEVICE, *self.opts]
            self._run(pretrain, self.work / "pretrain.log")

    def do(self, run: Run, propose: bool) -> dict[str, Any]:
        """Train, evaluate and, if ``propose``, write proposals; returns the run's result.

        Raises:
            RuntimeError: a command failed; names its log.
        """
        cfg, folder = self.config(run), self.folder(run)
        folder.mkdir(parents=True, exist_ok=True)
        config_file = folder / "reproduce.yaml"
        write_text(config_file, self.config_text(run))
        result = self.result(run)
        if result is None or not is_finished(folder):
            train = ["train", "--config-file", str(config_file)]
            train += ["--num-gpus", str(self.num_gpus)] if self.num_gpus else []
            train += ["--resume"] if left_by_a_run(folder) else []
            weights, config = self._weights_digest(), self.digest(run)
            origin = {
                "continued": (folder / "last_checkpoint").exists(),
                "hardware": provenance.hardware(cfg.MODEL.DEVICE),
                "weights": weights,
                "versions": provenance.versions(),
                "config_sha256": config,
            }
            start = time.time()
            if not is_finished(folder):  # else it was, and its result was not yet written
                # The commit before training: the checkout may change meanwhile.
                begun.begin(folder, provenance.commit(), weights, config)
                begun.trained(folder, self._run(train, folder / "train.log"))
            scores_file = folder / "inference" / cfg.DATASETS.TEST[0] / "results.json"
            result = {
                **run.identity,
                "scores": json.loads(scores_file.read_text())[TASKS[run.table]],
                "iterations": cfg.SOLVER.MAX_ITER,
                "seconds": round(time.time() - start),
                **begun.made_by(folder),
                **origin,
            }
            write_json(self.result_file(run), result)  # marks the run as done
        if propose and not self._has_proposals(run):
            generate = ["proposals", "generate", "--config-file", str(config_file)]
            generate += ["--datasets", *self._datasets(run), "--output", str(folder / "proposals")]
            generate += ["MODEL.WEIGHTS", str(folder / "model_final.pth")]
            self._run(generate, folder / "proposals.log")
        return result

    def _weights_digest(self) -> str:
        """Hash of the pretrained weights; "" for a zoo model, identified by its URL."""
        if not self.weights.exists():
            return ""
        return hashlib.sha256(self.weights.read_bytes()).hexdigest()[:12]

    def _run(self, arguments: list[str], log: Path) -> float:
        return jobs.run(arguments, log, threads=None if self.num_gpus else self.threads)


def train_all(reproduction: Reproduction, wanted: Sequence[Run], at_once: int) -> list[str]:
    """Do the remaining runs, ``at_once`` in parallel; returns the failures."""
    todo = reproduction.plan(wanted)
    proposers = {run.proposals_from for run in todo}
    print(f"{len(set(wanted)) - len(set(todo) & set(wanted))} of {len(set(wanted))} runs are done")
    waiting, failed = list(todo), []
    running: dict[Future[dict[str, Any]], tuple[Run, float]] = {}
    seconds: list[float] = []
    pool = ThreadPoolExecutor(at_once)
    try:
        while waiting or running:
            busy = {run for run, _ in running.values()}
            for run in list(waiting):
                if len(running) == at_once or run.proposals_from in {*waiting, *busy}:
                    continue
                waiting.remove(run)
                busy.add(run)
                future = pool.submit(reproduction.do, run, run in proposers)
                running[future] = (run, time.time())
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                run, begin = running.pop(future)
                try:
                    scores = future.result()["scores"]
                except RuntimeError as error:
                    failed.append(f"{run.name}: {error}")
                    lost = [r for r in waiting if r.proposals_from == run]
                    failed += [f"{r.name}: needs the proposals of {run.name}" for r in lost]
                    waiting = [r for r in waiting if r not in lost]
                    print(failed[-1 - len(lost)], flush=True)
                    continue
                seconds.append(time.time() - begin)
                left = statistics.mean(seconds) * (len(waiting) + len(running)) / at_once
                number = len(todo) - len(waiting) - len(running)
                print(
                    f"[{number}/{len(todo)}] {run.name}: {_figures(run.table, scores)} "
                    f"({seconds[-1] / 60:.1f} min; about {left / 60:.0f} min left)",
                    flush=True,
                )
    finally:
        pool.shutdown(cancel_futures=True)
    return failed


def _figures(table: int, scores: Mapping[str, float | None]) -> str:
    found = {metric: scores.get(metric) for metric in published.METRICS[table]}
    return ", ".join(f"{m} {value:.1f}" for m, value in found.items() if value is not None)


def reproduce(args: argparse.Namespace) -> int:
    """Implements ``fpn-ext reproduce``.

    Returns:
        The exit status: 1 if a run failed.

    Raises:
        ValueError: invalid arguments.
    """
    num_gpus = args.num_gpus
    if num_gpus is None:
        num_gpus = SCALES[args.scale].num_gpus
    if num_gpus > torch.cuda.device_count():
        raise ValueError(
            f"--scale {args.scale} on {num_gpus} GPU(s) asked for, and {torch.cuda.device_count()} "
            "found: --num-gpus 0 trains on the CPU"
        )
    known = {row for table in args.table for row in published.TABLES[table]}
    if unknown := sorted(set(args.rows or ()) - known):
        raise ValueError(f"--rows {' '.join(unknown)}: the tables have {' '.join(sorted(known))}")
    reproduction = Reproduction(
        scale=args.scale,
        work=Path(args.work or f"output/reproduce/{args.scale}").absolute(),
        results=Path(args.results or f"results/paper-{args.scale}").absolute(),
        num_gpus=num_gpus,
        threads=args.threads,
        opts=args.opts,
    )
    wanted = [
        Run(table, row, seed)
        for seed in args.seeds
        for table in args.table
        for row in published.TABLES[table]
        if args.rows is None or row in args.rows
    ]
    failed: list[str] = []
    if not args.report_only:
        register_datasets()
        reproduction.prepare(wanted[0])
        failed = train_all(reproduction, wanted, args.jobs or (1 if num_gpus else 2))
    words = ["fpn-ext", "reproduce", *args.opts, "--table", *map(str, args.table)]
    words += ["--rows", *args.rows] if args.rows else []
    command = shlex.join([*words, "--scale", args.scale, "--seeds", *map(str, args.seeds)])
    write_tables(reproduction.results, args.table, args.scale, command)
    if failed:
        print(f"\n{len(failed)} run(s) failed:\n" + "\n".join(failed), file=sys.stderr)
    return 1 if failed else 0
