"""The scores of many runs as the paper's tables: means, spreads and verdicts."""

import json
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..files.atomic import write_text
from ..reporting.json_files import write_json
from . import published


def summarize(table: int, results: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and spread of every row and of its difference from the baseline, beside the paper's.

    Differences are taken per seed. The verdict per row and metric says whether our difference has
    the same sign as the paper's: ``holds`` or ``reversed`` if it is more than two standard errors
    from 0, else ``open``.
    """
    scores: dict[str, dict[int, Mapping[str, float | None]]] = {}
    for result in results:
        if result["table"] == table:
            scores.setdefault(result["row"], {})[result["seed"]] = result["scores"]
    rows: dict[str, Any] = {}
    for row, (what, _) in published.TABLES[table].items():
        if row not in scores:
            continue
        # A variant such as c_unshared is compared with the row c, all others with the baseline.
        base = row.partition("_")[0] if "_" in row else published.BASELINES[table]
        of_row, of_base = published.published(table, row), published.published(table, base)
        metrics: dict[str, Any] = {}
        for metric in published.METRICS[table]:
            values = _values(scores[row], metric)
            entry: dict[str, Any] = {"ours": _statistics(list(values.values()))}
            if metric in of_row:
                entry["paper"] = of_row[metric]
            if row != base:
                of_ours = _values(scores.get(base, {}), metric)
                shared = sorted(values.keys() & of_ours.keys())
                difference = _statistics([values[seed] - of_ours[seed] for seed in shared])
                entry["difference"] = difference
                if metric in of_row:
                    entry["paper_difference"] = round(of_row[metric] - of_base[metric], 1)
                    entry["verdict"] = _verdict(difference, entry["paper_difference"])
            metrics[metric] = entry
        rows[row] = {
            "what": what,
            "against": base if row != base else None,
            "seeds": sorted(scores[row]),
            "metrics": metrics,
        }
    return {"table": table, "rows": rows}


def _values(by_seed: Mapping[int, Mapping[str, float | None]], metric: str) -> dict[int, float]:
    found = {seed: scores.get(metric) for seed, scores in by_seed.items()}
    return {seed: value for seed, value in found.items() if value is not None}


def _statistics(values: list[float]) -> dict[str, Any]:
    if not values:
        return {"n": 0, "mean": None, "sd": None}
    sd = statistics.stdev(values) if len(values) > 1 else None
    return {"n": len(values), "mean": statistics.mean(values), "sd": sd}


def _verdict(difference: Mapping[str, Any], published: float) -> str:
    if difference["n"] < 2:
        return "open"
    error = difference["sd"] / difference["n"] ** 0.5
    if abs(difference["mean"]) <= 2 * error:
        return "open"
    return "holds" if difference["mean"] * published > 0 else "reversed"


DIFFERENCES = (
    "Differences, seed by seed: mean ± standard deviation, in brackets the paper's. *holds*, "
    "*reversed*: more than two standard errors (± / √seeds) from 0, with the paper's sign or the "
    "other one; *open*: not."
)


def markdown(summary: Mapping[str, Any]) -> str:
    """A table's summary as two Markdown tables: figures, and differences with verdicts."""
    metrics = published.METRICS[summary["table"]]
    head = f"| row | | {' | '.join(metrics)} |\n|{' --- |' * (len(metrics) + 2)}\n"
    figures, differences = head, head
    for row, entry in summary["rows"].items():
        cells = [
            _cell(entry["metrics"][m]["ours"], entry["metrics"][m].get("paper")) for m in metrics
        ]
        figures += f"| {_label(row)} | {entry['what']} | {' | '.join(cells)} |\n"
        if entry["against"] is None:
            continue
        cells = [
            _cell(of["difference"], of.get("paper_difference"), signed=True)
            + (f" {of['verdict']}" if of["difference"]["n"] and "verdict" in of else "")
            for of in (entry["metrics"][m] for m in metrics)
        ]
        differences += (
            f"| {_label(row)} - {_label(entry['against'])} | {entry['what']} | "
            f"{' | '.join(cells)} |\n"
        )
    return f"{figures}{_fewer_seeds(summary)}\n{DIFFERENCES}\n\n{differences}"


def _fewer_seeds(summary: Mapping[str, Any]) -> str:
    """The rows that have not the seeds of all; of those the difference is over common seeds."""
    seeds = {row: entry["seeds"] for row, entry in summary["rows"].items()}
    every = set().union(*seeds.values())
    fewer = [
        f"{_label(row)} has {'seed' if len(of_row) == 1 else 'seeds'} "
        f"{', '.join(map(str, sorted(of_row)))} only"
        for row, of_row in seeds.items()
        if set(of_row) < every
    ]
    return f"\n{'; '.join(fewer)}.\n" if fewer else ""


def _label(row: str) -> str:
    return f"({row})" if "_" not in row else f"({row.replace('_', ', ')})"


def _cell(ours: Mapping[str, Any], published: float | None, signed: bool = False) -> str:
    if ours["mean"] is None:
        return "-"
    sign = "+" if signed else ""
    text = f"{ours['mean']:{sign}.1f}"
    if ours["sd"] is not None:
        text += f" ± {ours['sd']:.1f}"
    return text if published is None else f"{text} ({published:{sign}.1f})"


def write_tables(folder: Path, tables: Iterable[int], scale: str, command: str) -> None:
    """Write ``table{n}.md`` and ``table{n}.json`` from all runs in a results folder; print them.

    Args:
        folder: with ``runs/*.json`` of :class:`fpn_ext.paper.reproduce.Reproduction`.
        tables: numbers of the paper's tables; those without runs are skipped.
        scale, command: name of the scale and the command that made the runs, for the heading.
    """
    results = [json.loads(file.read_text()) for file in sorted(folder.glob("runs/*.json"))]
    for table in tables:
        of_table = [result for result in results if result["table"] == table]
        if not of_table:
            continue
        summary = summarize(table, of_table)
        origin = {
            key: sorted({str(result[key]) for result in of_table})
            for key in ("commit", "hardware", "versions", "iterations", "weights")
        }
        minutes = sum(result["cpu_seconds"] for result in of_table) / 60
        summary["origin"] = {**origin, "command": command, "cpu_minutes": round(minutes)}
        write_json(folder / f"table{table}.json", summary)
        mixed = (
            "The trainings did not all begin with the same weights "
            f"({', '.join(origin['weights'])}): differences may be due to them.\n\n"
        )
        text = (
            f"# Table {table}, scale {scale}\n\n"
            f"    {command}\n\n"
            f"{len(of_table)} trainings of {', '.join(origin['iterations'])} iterations, "
            f"{minutes:.0f} minutes of CPU time, on {'; '.join(origin['hardware'])}; commit "
            f"{', '.join(origin['commit'])}; {'; '.join(origin['versions'])}.\n\n"
            "Mean ± standard deviation over the seeds; in brackets the paper's, on COCO.\n\n"
            f"{mixed if len(origin['weights']) > 1 else ''}"
            f"{markdown(summary)}"
        )
        file = folder / f"table{table}.md"
        write_text(file, text)
        print(f"\n{text}\n(written to {file})")
