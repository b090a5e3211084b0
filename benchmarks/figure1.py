"""Figure 1 of the paper: AP, milliseconds an image and memory of its four, in one table.

    python benchmarks/figure1.py --seeds 1 2 3
    python benchmarks/figure1.py --seeds 1 2 3 --measure-only    # time and memory
    python benchmarks/figure1.py --report-only

(a) an image pyramid, (b) one map, (c) a feature hierarchy without a top-down pathway, with one
stage, (d) the FPN, with two stages and, to set (c) against, with one: configs/paper/figure1/, at
the small scale of fpn_ext.paper.reproduce. (a) is not trained: it is (b)'s detector, with (b)'s
weights. Time is that of all models in turn, in one process, not optimised, and wants an idle
machine; memory is the peak of a process that detects with one of them. Re-running skips completed
runs and resumes an interrupted one.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fpn_ext  # noqa: F401  # before detectron2, where that is not compiled
import level_rules
import torch
from detectron2.modeling import build_model
from fpn_ext.data.datasets import register_datasets
from fpn_ext.engine import jobs
from fpn_ext.engine.trainer import Trainer
from fpn_ext.files.atomic import write_text
from fpn_ext.files.checkpoint import SafeCheckpointer
from fpn_ext.paper.reproduce import CONFIGS, Reproduction, Run, train_all
from fpn_ext.reporting import provenance
from fpn_ext.reporting.json_files import write_json
from fpn_ext.reporting.measuring import markdown_table, measure, peak_memory

PROJECT = Path(__file__).parents[1]
# Each row, what it is, and the row it is compared with.
ROWS = {
    "a": ("(a) image pyramid: (b) on three octaves", "b"),
    "b": ("(b) one map, C5", "d"),
    "c": ("(c) feature hierarchy, one stage", "d_one_stage"),
    "d_one_stage": ("(d) FPN, one stage", ""),
    "d": ("(d) FPN", ""),
}
ONE_STAGE = ("c", "d_one_stage")
IMAGES, ROUNDS = 20, 9  # that are timed


class FigureRun(Run):
    """Row ``row`` of Figure 1."""

    @property
    def name(self) -> str:
        return f"figure1_{self.row}_seed{self.seed}"

    @property
    def file(self) -> Path:
        return CONFIGS / "figure1" / f"{self.row}.yaml"

    @property
    def overlays(self) -> Sequence[str]:
        return ("small_one_stage.yaml",) if self.row in ONE_STAGE else ()

    @property
    def identity(self) -> dict[str, Any]:
        return {"figure": 1, "row": self.row, "seed": self.seed}

    @property
    def trained_as(self) -> "FigureRun":
        """The run whose weights this one has: (b)'s for (a)."""
        return FigureRun(self.table, "b" if self.row == "a" else self.row, self.seed)


def run_of(row: str, seed: int) -> FigureRun:
    return FigureRun(3, row, seed)  # scored as Table 3


def weights_of(reproduction: Reproduction, run: FigureRun) -> Path:
    return reproduction.folder(run.trained_as) / "model_final.pth"


def evaluate(reproduction: Reproduction, run: FigureRun) -> None:
    """Score a run that has another one's weights; its result is written as a training's."""
    if reproduction.result(run):
        return
    cfg, folder = reproduction.config(run), reproduction.folder(run)
    folder.mkdir(parents=True, exist_ok=True)
    config_file = folder / "reproduce.yaml"
    write_text(config_file, reproduction.config_text(run))
    command = ["eval", "--config-file", str(config_file)]
    command += ["MODEL.WEIGHTS", str(weights_of(reproduction, run))]
    seconds = jobs.run(command, folder / "eval.log", threads=1)
    scores_file = folder / "inference" / cfg.DATASETS.TEST[0] / "results.json"
    result = {
        **run.identity,
        "weights_of": run.trained_as.name,
        "scores": json.loads(scores_file.read_text())["bbox"],
        "iterations": cfg.SOLVER.MAX_ITER,
        "cpu_seconds": round(seconds),
        "commit": provenance.commit(),
        "hardware": provenance.hardware("cpu"),
        "versions": provenance.versions(),
        "config_sha256": reproduction.digest(run),
    }
    write_json(reproduction.result_file(run), result)


def detector(reproduction: Reproduction, run: FigureRun) -> tuple[torch.nn.Module, Callable]:
    """A run's trained model, and a function that detects on the timed images."""
    cfg = reproduction.config(run)
    model = build_model(cfg).eval()
    SafeCheckpointer(model).load(str(weights_of(reproduction, run)))
    loader = Trainer.build_test_loader(cfg, cfg.DATASETS.TEST[0])
    batches = list(itertools.islice(loader, IMAGES))

    def detect() -> int:
        with torch.no_grad():
            return sum(len(model(batch)[0]["instances"]) for batch in batches)

    return model, detect


def measured(reproduction: Reproduction, seed: int, arguments: Sequence[str]) -> dict[str, Any]:
    """Time, memory and parameters of every row."""
    torch.set_num_threads(1)
    sides, parameters = {}, {}
    for row in ROWS:
        model, sides[row] = detector(reproduction, run_of(row, seed))
        parameters[row] = sum(p.numel() for p in model.parameters())
    times, _ = measure(sides, ROUNDS)
    rows = {}
    for row in ROWS:
        per_image = [milliseconds / IMAGES for milliseconds in times[row]]
        alone = [sys.executable, __file__, *arguments, "--memory-of", row, "--seeds", str(seed)]
        printed = subprocess.run(alone, check=True, capture_output=True, text=True).stdout
        rows[row] = {
            "ms": statistics.median(per_image),
            "ms_range": [min(per_image), max(per_image)],
            "memory": json.loads(printed.splitlines()[-1]),  # None where it is not known
            "parameters": parameters[row],
        }
    origin = {"commit": provenance.commit(), "hardware": provenance.hardware("cpu")}
    size = reproduction.config(run_of("d", seed)).INPUT.MIN_SIZE_TEST
    return {"rows": rows, "size": size, "images": IMAGES, "seed": seed, **origin}


def markdown(runs: Sequence[dict[str, Any]], cost: dict[str, Any] | None, command: str) -> str:
    """figure1.md; without ``cost``, columns of time and memory are empty."""
    runs = [{**run, "rule": run["row"]} for run in runs]
    shown = [row for row in ROWS if any(row == run["row"] for run in runs)]
    lines, differences = [], []
    for row in shown:
        what, against = ROWS[row]
        of_row = {
            found["metric"]: found
            for found in level_rules.summary(runs, ROWS, against)
            if found["rule"] == row
        }
        columns = [_text(of_row.get(m), "mean", "std", "") for m in level_rules.METRICS]
        lines.append([what, *columns, *_cost_columns(cost, row)])
        if against in shown:
            columns = [
                _text(of_row.get(m), "difference", "standard_error", "+")
                for m in level_rules.METRICS
            ]
            differences.append([f"{what} - {ROWS[against][0]}", *columns])
    kinds = {
        what: ", ".join(sorted({str(run[what]) for run in runs}))
        for what in ("iterations", "commit", "hardware", "seed")
    }
    header = ["", *level_rules.METRICS, "ms an image", "peak MiB", "parameters, M"]
    timed = "Time and memory were not measured."
    if cost:
        timed = (
            f"Milliseconds an image, median (min to max), of {cost['images']} images of "
            f"{cost['size']} px in turn with one thread, and peak memory of a process that detects "
            "on them (in brackets, what it is above the process with the model loaded), on "
            f"{cost['hardware']}, commit {cost['commit']}; models not optimised."
        )
    return f"""# Figure 1

    {command}

`configs/paper/figure1/` at the small scale (`fpn_ext.paper.reproduce`), {kinds["iterations"]}
iterations, seeds {kinds["seed"]}, on {kinds["hardware"]}; commit {kinds["commit"]}.

Box AP in percent, mean ± standard deviation over the seeds. {timed}

{markdown_table(header, lines)}

Differences, seed by seed, mean ± standard error:

{markdown_table(["", *level_rules.METRICS], differences)}
"""


def _text(found: dict[str, Any] | None, value: str, error: str, sign: str) -> str:
    if found is None or found[value] is None:
        return ""
    text = f"{found[value]:{sign}.1f}"
    return text if found[error] is None else f"{text} ± {found[error]:.1f}"


def _cost_columns(cost: dict[str, Any] | None, row: str) -> list[str]:
    if not cost:
        return [""] * 3
    of_row = cost["rows"][row]
    low, high = of_row["ms_range"]
    time = f"{of_row['ms']:.1f} ({low:.1f} to {high:.1f})"
    memory = of_row["memory"]
    peak = f"{memory['peak']:.0f} ({memory['peak'] - memory['before']:.0f})" if memory else ""
    return [time, peak, f"{of_row['parameters'] / 1e6:.2f}"]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], metavar="SEED")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time, a thread each")
    parser.add_argument("--work", type=Path, default=PROJECT / "output/reproduce/small")
    parser.add_argument("--output", type=Path, default=PROJECT / "results/figure1")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--measure-only", action="store_true", help="train nothing")
    only.add_argument("--report-only", action="store_true", help="nor measure anything")
    only.add_argument("--memory-of", choices=list(ROWS), help=argparse.SUPPRESS)
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="overrides, for trials")
    args = parser.parse_intermixed_args(argv)
    work, output = args.work.absolute(), args.output.absolute()
    reproduction = Reproduction("small", work, output, opts=args.opts)
    register_datasets()
    if args.memory_of:
        torch.set_num_threads(1)
        memory = peak_memory(detector(reproduction, run_of(args.memory_of, args.seeds[0]))[1])
        print(json.dumps(memory))
        return 0
    failed: list[str] = []
    if not (args.measure_only or args.report_only):
        wanted = [run_of(row, seed) for seed in args.seeds for row in ROWS if row != "a"]
        reproduction.prepare(wanted[0])
        failed = train_all(reproduction, wanted, args.jobs)
        for seed in args.seeds:
            if weights_of(reproduction, run_of("a", seed)).exists():
                evaluate(reproduction, run_of("a", seed))
    cost_file = output / "cost.json"
    if not (args.report_only or failed):
        seed = args.seeds[0]
        if all(weights_of(reproduction, run_of(row, seed)).exists() for row in ROWS):
            again = ["--work", str(work), "--output", str(output), *args.opts]
            write_json(cost_file, measured(reproduction, seed, again))
        else:
            print(f"time and memory are not measured: {work} lacks models", file=sys.stderr)
    runs = [json.loads(file.read_text()) for file in sorted((output / "runs").glob("*.json"))]
    if not runs:
        raise SystemExit(f"no results in {output / 'runs'}: run without --report-only first")
    cost = json.loads(cost_file.read_text()) if cost_file.exists() else None
    seeds = " ".join(sorted({str(run["seed"]) for run in runs}))
    text = markdown(runs, cost, f"python benchmarks/figure1.py --seeds {seeds}")
    write_text(output / "figure1.md", text)
    print(text)
    if failed:
        print("\n".join(failed), file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
