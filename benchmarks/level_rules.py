"""Which level a box is pooled from: a Faster R-CNN trained with every rule, in one table.

    python benchmarks/level_rules.py --seeds 1 2 3
    python benchmarks/level_rules.py SOLVER.MAX_ITER 900 --only PaperRule LongerSideRule --seeds 4

It is row (c) of Table 3 at the small scale of fpn_ext.paper.reproduce, with its pretrained weights.
Every rule and seed is a training of its own, in a process of fpn-ext train. Its scores are kept in
one JSON file, so that the script goes on where it stopped; level_rules.md and level_rules.json are
written from all that were run with the same overrides. Rules are compared seed by seed: the seed
fixes the first weights and the order of the images.
"""

import argparse
import json
import math
import shlex
import shutil
import statistics
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fpn_ext.data.datasets import register_datasets
from fpn_ext.engine import jobs
from fpn_ext.paper.reproduce import Reproduction, Run
from fpn_ext.reporting.json_files import write_json
from fpn_ext.reporting.measuring import markdown_table
from fpn_ext.reporting.provenance import commit, hardware, versions

PROJECT = Path(__file__).parents[1]
SCALE, ROW = "small", (3, "c")
METRICS = ("AP", "AP50", "APs", "APm", "APl")
ALL = ["MODEL.ROI_HEADS.NAME", "AllLevelsROIHeads", "MODEL.FPN_EXT.LEVEL_FUSION"]
RULES: dict[str, list[str]] = {
    "PaperRule": [],
    "RoundedRule": ["MODEL.FPN_EXT.LEVEL_RULE", "RoundedRule"],
    "LongerSideRule": ["MODEL.FPN_EXT.LEVEL_RULE", "LongerSideRule"],
    "all levels, max": [*ALL, "max"],
    "all levels, sum": [*ALL, "sum"],
}
BASELINE = "PaperRule"


def reproduction(rule: str, opts: Sequence[str], work: Path) -> Reproduction:
    return Reproduction(SCALE, work, work, opts=[*opts, *RULES[rule]])


def name_of(rule: str, seed: int) -> str:
    return f"{rule.replace(', ', '_').replace(' ', '_')}_seed_{seed}"


def trained(rule: str, seed: int, opts: Sequence[str], work: Path) -> dict[str, Any]:
    """The scores of one training, in percent, and what they came from."""
    of_rule, run = reproduction(rule, opts, work), Run(*ROW, seed)
    cfg = of_rule.config(run)
    folder = work / "level_rules" / name_of(rule, seed)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config_file = folder / "begin.yaml"
    config_file.write_text(of_rule.config_text(run, folder))
    arguments = ["train", "--config-file", str(config_file)]
    seconds = jobs.run(arguments, folder / "console.log", threads=1)
    scores_file = folder / "inference" / cfg.DATASETS.TEST[0] / "results.json"
    scores = json.loads(scores_file.read_text())
    return {
        "rule": rule,
        "seed": seed,
        "opts": list(opts),
        "scores": {metric: scores["bbox"].get(metric) for metric in METRICS},
        "iterations": cfg.SOLVER.MAX_ITER,
        "cpu_seconds": round(seconds),
        "commit": commit(),
        "hardware": hardware(),
        "versions": versions(),
    }


def summary(
    runs: Sequence[dict[str, Any]], rules: Iterable[str] = tuple(RULES), baseline: str = BASELINE
) -> list[dict[str, Any]]:
    """A row for each rule and metric: ``mean``, ``std``, ``seeds``, and ``difference`` from the
    baseline, the mean over the seeds that both were run with, with its ``standard_error``.
    """
    found = {(run["rule"], run["seed"]): run["scores"] for run in runs}
    rows = []
    for rule in rules:
        seeds = sorted(seed for name, seed in found if name == rule)
        for metric in METRICS if seeds else ():
            values = {seed: found[rule, seed][metric] for seed in seeds}
            if any(value is None for value in values.values()):
                continue  # nothing was found, or there is no object of that size
            others = {s: found.get((baseline, s), {}).get(metric) for s in seeds}
            pairs = [
                values[s] - others[s] for s in seeds if rule != baseline and others[s] is not None
            ]
            rows.append(
                {
                    "rule": rule,
                    "metric": metric,
                    "seeds": seeds,
                    "mean": statistics.fmean(values.values()),
                    "std": statistics.stdev(values.values()) if len(values) > 1 else None,
                    "difference": statistics.fmean(pairs) if pairs else None,
                    "standard_error": (
                        statistics.stdev(pairs) / math.sqrt(len(pairs)) if len(pairs) > 1 else None
                    ),
                }
            )
    return rows


def tables(
    runs: Sequence[dict[str, Any]], rules: Iterable[str] = tuple(RULES), baseline: str = BASELINE
) -> tuple[str, str]:
    """Scores, and differences from the baseline, as Markdown."""
    rows = {(row["rule"], row["metric"]): row for row in summary(runs, rules, baseline)}
    metrics = [metric for metric in METRICS if any(metric == m for _, m in rows)]
    rules = [rule for rule in rules if any(rule == run["rule"] for run in runs)]
    scores = [
        [
            rule,
            str(sum(rule == run["rule"] for run in runs)),
            *(_with_error(rows.get((rule, metric)), "mean", "std", "") for metric in metrics),
        ]
        for rule in rules
    ]
    differences = [
        [
            rule,
            *(
                _with_error(rows.get((rule, metric)), "difference", "standard_error", "+")
                for metric in metrics
            ),
        ]
        for rule in rules
        if rule != baseline
    ]
    return (
        markdown_table(["", "seeds", *metrics], scores),
        markdown_table(["", *metrics], differences),
    )


def markdown(runs: Sequence[dict[str, Any]], command: str) -> str:
    """level_rules.md."""
    scores, differences = tables(runs)
    kinds = {
        what: ", ".join(sorted({str(run[what]) for run in runs}))
        for what in ("iterations", "commit", "hardware")
    }
    return f"""# Which level a box is pooled from

    {command}

Row (c) of Table 3 at the small scale (`fpn_ext.paper.reproduce`), {kinds["iterations"]} iterations,
trained with each of them; on {kinds["hardware"]}; commit {kinds["commit"]}.
What they are: [levels](../../docs/guides/levels.md). On these levels StrideRule is PaperRule.

Box AP in percent, mean ± standard deviation over the seeds:

{scores}

Differences from {BASELINE}, seed by seed, mean ± standard error:

{differences}
"""


def _with_error(row: dict[str, Any] | None, value: str, error: str, sign: str) -> str:
    if row is None or row[value] is None:
        return ""
    text = f"{row[value]:{sign}.1f}"
    return text if row[error] is None else f"{text} ± {row[error]:.1f}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--only", nargs="+", default=list(RULES), choices=list(RULES))
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time, a thread each")
    parser.add_argument("--work", type=Path, default=PROJECT / "output/reproduce" / SCALE)
    parser.add_argument("--output", type=Path, default=PROJECT / "results/level_rules")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="overrides of the config")
    args = parser.parse_args(argv)
    opts, work = args.opts, args.work.absolute()
    runs_folder = args.output / "runs"
    runs_folder.mkdir(parents=True, exist_ok=True)
    register_datasets()
    reproduction(BASELINE, opts, work).prepare(Run(*ROW, 1))

    def do(rule: str, seed: int) -> None:
        file = runs_folder / f"{name_of(rule, seed)}.json"
        if file.exists() and json.loads(file.read_text())["opts"] == opts:
            print(f"{rule}, seed {seed}: done already", flush=True)
            return
        run = trained(rule, seed, opts, work)
        write_json(file, run)
        print(f"{rule}, seed {seed}: AP {run['scores']['AP']}", flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        # Seed by seed: an interrupted script has pairs.
        list(pool.map(do, args.only * len(args.seeds), sorted(args.seeds * len(args.only))))
    every = [json.loads(file.read_text()) for file in sorted(runs_folder.glob("*.json"))]
    runs = [run for run in every if run["opts"] == opts]
    seeds = sorted({str(run["seed"]) for run in runs})
    command = shlex.join(["python", "benchmarks/level_rules.py", *opts, "--seeds", *seeds])
    (args.output / "level_rules.md").write_text(markdown(runs, command))
    content = {"command": command, "rows": summary(runs), "runs": runs}
    write_json(args.output / "level_rules.json", content)
    print(args.output / "level_rules.md")


if __name__ == "__main__":
    main()
