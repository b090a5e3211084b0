"""Write the generated parts of the documents: config keys, the commands' --help, tables of results.

    python docs/generate.py          # rewrite them; `make docs` does
    python docs/generate.py --check  # exit status 1 if one of them is out of date

A page is written by a person except between its markers `<!-- generated: NAME -->` and
`<!-- end -->`. The text there is committed, for readers on the forge; tests/test_docs.py checks
that it is current. The Python API is not written here: Sphinx reads the docstrings as it builds.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
REFERENCE = PROJECT / "docs/reference"
RESULTS = PROJECT / "results"
SPEED, SPEED_PAGE = RESULTS / "speed-cpu", PROJECT / "docs/evidence/speed.md"
YOUR_DATA = PROJECT / "docs/start/your_data.md"
EVIDENCE_PAGE = PROJECT / "docs/evidence/evidence.md"
HELP_WIDTH = "100"

# The package beside this file, whichever is installed, and this folder's modules.
sys.path[:0] = [str(PROJECT), str(PROJECT / "docs")]

import evidence_tables  # noqa: E402
import measured_tables  # noqa: E402
import paper_tables  # noqa: E402
import speed_tables  # noqa: E402
import walkthrough  # noqa: E402


def declared() -> list[Any]:
    """Every key: `fpn_ext.keys.Key`."""
    import fpn_ext

    fpn_ext.get_cfg()  # imports the components that declare them
    from fpn_ext.keys import declared_keys

    return declared_keys()


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|")


def declared_in(name: str) -> str:
    """The file that declares a key."""
    files = sorted((PROJECT / "fpn_ext").rglob("*.py"))
    text = f'declare(\n    "{name}",'
    (file,) = (file for file in files if text in file.read_text())
    return str(file.relative_to(PROJECT))


def key_tables(keys: Iterable[Any]) -> str:
    """A table for each node of the config, keys in the order given."""
    nodes: dict[str, list[Any]] = {}
    for key in keys:
        nodes.setdefault(key.name.rpartition(".")[0], []).append(key)
    parts = []
    for node, members in nodes.items():
        rows = [
            f"## {node}",
            "",
            "| key | type | default | meaning | read by | declared in |",
            "| --- " * 6 + "|",
        ]
        for key in members:
            columns = [
                f"`{key.name.rpartition('.')[2]}`",
                key.kind,
                f"`{cell(repr(key.default))}`",
                cell(key.comment),
                ", ".join(
                    f"`{reader}`" if reader[0].isupper() else reader for reader in key.readers
                ),
                f"`{declared_in(key.name)}`",
            ]
            rows.append(f"| {' | '.join(columns)} |")
        parts.append("\n".join(rows))
    return "\n\n".join(parts)


def command_help() -> str:
    """Each verb's --help."""
    from fpn_ext.__main__ import VERBS

    os.environ["COLUMNS"] = HELP_WIDTH
    parts = []
    for name, verb in VERBS.items():
        text = "\n".join(line.rstrip() for line in verb.parser().format_help().strip().splitlines())
        parts.append(f"## fpn-ext {name}\n\n{cell(verb.summary)}\n\n```text\n{text}\n```")
    return "\n\n".join(parts)


def seeds_in_words(file: Path) -> str:
    """A sentence on the trainings in a file of benchmarks/seeds.py."""
    record = json.loads(file.read_text())
    (dataset,) = record["runs"][0]["results"]
    boxes = [run["results"][dataset]["bbox"] for run in record["runs"]]

    def numbers(metric: str) -> str:
        return ", ".join(f"{box[metric]:.1f}" for box in boxes)

    seeds = ", ".join(str(run["seed"]) for run in record["runs"])
    seconds = [f"{run['seconds']:.0f}" for run in record["runs"]]
    span = " to ".join(dict.fromkeys((min(seconds, key=float), max(seconds, key=float))))
    return (
        f"Seeds {seeds}: box AP {numbers('AP')}, AP50 {numbers('AP50')} on `{dataset}`; "
        f"{span} seconds each, training and evaluation, on "
        f"{where(record)}."
    )


def where(record: dict[str, Any]) -> str:
    """Machine, threads, instructions, torch and commit of a record."""
    settings = [f"`{name}={value}`" for name, value in record.get("environment", {}).items()]
    what = [record["hardware"], *settings, f"torch {record['versions']['torch'].split('+')[0]}"]
    return f"{', '.join(what)} (commit {record['commit']})"


def seeds_table(file: Path) -> str:
    """The same as a table, a row for each training, with CPU time."""
    record = json.loads(file.read_text())
    rows = [["seed", "dataset", "box AP", "AP50", "AP75", "seconds", "CPU seconds"], ["---"] * 7]
    for run in record["runs"]:
        for dataset, results in run["results"].items():
            scores = [f"{results['bbox'][metric]:.1f}" for metric in ("AP", "AP50", "AP75")]
            times = [f"{run[key]:.0f}" for key in ("seconds", "cpu_seconds")]
            rows.append([str(run["seed"]), f"`{dataset}`", *scores, *times])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    source = file.relative_to(PROJECT)
    name = f"[{source}]({'../' * 2}{source})"
    return f"On {where(record)}; {name}, by `benchmarks/seeds.py`:\n\n{table}"


def busy_table(file: Path) -> str:
    """What another busy process costs a training, from a file of benchmarks/busy_machine.py."""
    record = json.loads(file.read_text())
    rows = [["OpenMP's threads wait", "idle, s a step", "busy, s a step", "busy / idle"]]
    rows.append(["---"] * 4)
    for side in record["sides"]:
        low, high = side["busy_over_idle_range"]
        ratio = f"{side['busy_over_idle']:.2f} ({low:.2f} to {high:.2f})"
        times = (f"{side[key]:.3f}" for key in ("idle_s", "busy_s"))
        rows.append([side["side"], *times, ratio])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return (
        f"{record['hardware']}, {record['threads']} threads, {record['busy_processes']} busy "
        f"process, {record['rounds']} rounds, commit {record['commit']}; median (min to max):\n\n"
        f"{table}"
    )


def matrix(results: Path, short: bool = False) -> str:
    """A table of what the suite was run with: a row for each file of tests/matrix.py.

    Args:
        results: the folder of the files; without any, nothing is claimed.
        short: without flags, commit and names, and without runs of a part of the suite.
    """
    cells = [json.loads(file.read_text()) for file in sorted(results.glob("*.json"))]
    cells = [cell for cell in cells if cell["whole"] or not short]
    if not cells:
        return "No run of the whole suite is recorded."
    cells.sort(key=lambda cell: (numbers(cell["python"]), numbers(cell["torch"]), cell["name"]))
    rows = [short_row(cell) if short else full_row(cell) for cell in cells]
    return "\n".join(
        f"| {' | '.join(row)} |" for row in ([*rows[0]], ["---"] * len(rows[0]), *_values(rows))
    )


def _values(rows: list[dict[str, str]]) -> list[list[str]]:
    return [[cell(value) for value in row.values()] for row in rows]


def numbers(version: str) -> list[int]:
    """[2, 11, 0] of "2.11.0+cu130"."""
    return [int(number) for number in version.partition("+")[0].split(".") if number.isdigit()]


def short_row(run: dict[str, Any]) -> dict[str, str]:
    """A run of the suite, by the heads of its columns."""
    failed = run["failed"] + run["errors"]
    return {
        "Python": run["python"],
        "torch": run["torch"].partition("+")[0],
        "Detectron2": f"{run['detectron2']}, {'compiled' if run['compiled'] else 'uncompiled'}",
        "vector instructions": run["capability"],
        "passed": str(run["passed"]),
        "failed": str(failed),
        "skipped": str(run["skipped"]),
    }


def full_row(run: dict[str, Any]) -> dict[str, str]:
    """The same, with where it was run and what failed."""
    row = short_row(run)
    if run["detectron2_commit"]:
        row["Detectron2"] += f", {run['detectron2_commit']}"
    if run["overrides"]:
        settings = (f"`{name}={value}`" for name, value in run["overrides"].items())
        row["vector instructions"] += f" ({', '.join(settings)})"
    if "detectron2_tests" in run:
        theirs = run["detectron2_tests"]
        row["Detectron2"] += (
            f"; its own tests: {theirs['passed']} passed, {theirs['failed']} failed"
        )
    what = [f"`{run['command']}`"] if not run["whole"] else []
    return {
        "run": run["name"],
        **row,
        "processor": f"{run['processor']} ({' '.join(run['flags'])})",
        "commit": f"{run['commit']}{' with changes' if run['dirty'] else ''}, {run['date']}",
        "remarks": "; ".join([*what, *(f"`{name}`" for name in run["failures"])]),
    }


def exporters() -> str:
    """What `--data` reads of each tool's files, from benchmarks/exporters/run.py."""
    results = json.loads((PROJECT / "results/exporters/exporters.json").read_text())
    lines = [
        "| tool | format | declared | read | off by, pixels | crowd region | said |",
        "| --- " * 7 + "|",
    ]
    for row in results["rows"]:
        said = row.get("message") or "; ".join([*row["wrong"], *row["said"]])
        said = said.partition(" Needed:")[0]
        said = re.sub(r" \(first: [^()]*(\([^()]*\))?[^()]*\)", "", said)
        off = f"{row['max_difference']:g}" if "max_difference" in row else ""
        declared = f"`{row['declared']}`" if row["declared"] else ""
        columns = [row["tool"], row["format"], declared, row["verdict"], off]
        lines.append(f"| {' | '.join([*columns, row.get('crowd', ''), cell(said)])} |")
    return "\n".join(lines)


def export_table(folder: Path) -> str:
    """Scores of exported detectors beside PyTorch's, from benchmarks/export_ap.py."""
    records = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    records = [record for record in records if "exported" in record]
    lines = [
        "| model | dataset | file | AP, file | AP, PyTorch | largest difference of a box, px |",
        "| --- " * 6 + "|",
    ]
    for record in records:
        for name, of_file in record["exported"].items():
            form, _, bits = name.partition(", ")
            what = f"`{form}`, {bits}" if bits else f"`{form}`"
            apart = of_file.get("largest_difference_px")
            off = "" if apart is None else f"{apart:.1e}"  # in eight bits boxes are not compared
            for task, score in of_file["scores"].items():
                lines.append(
                    f"| {record['model']} | `{record['dataset']}` | {what}, {task} | {score:.2f} "
                    f"| {record['pytorch'][task]:.2f} | {off} |"
                )
    return "\n".join([*lines, "", *dict.fromkeys(map(where, records))])


def deployment_table(file: Path) -> str:
    """Speed of exported detectors, from benchmarks/deployment.py; without, nothing is claimed."""
    from fpn_ext.reporting.measuring import ratio_text

    if not file.exists():
        return "No measurement is recorded."
    record = json.loads(file.read_text())
    lines = ["| size | side | ms | times Detectron2 in PyTorch |", "| --- " * 4 + "|"]
    for row in record["rows"]:
        lines.append(f"| {row['size']} | {row['side']} | {row['ms']:.1f} | {ratio_text(row)} |")
    left_out = [f"Left out: {side}: {cell(why)}." for side, why in record["left_out"].items()]
    versions = record["versions"]
    runtimes = ", ".join(f"{name} {versions[name]}" for name in ("onnxruntime", "openvino"))
    about = (
        f"{where(record)}, {record['threads']} threads, {runtimes}, {record['rounds']} rounds; "
        "median (min to max):"
    )
    return "\n".join([about, "", *lines, *([""] if left_out else []), *left_out])


def generated() -> dict[Path, str]:
    """Every page with generated parts, as it should be."""
    texts = [
        (REFERENCE / "keys.md", "keys", key_tables(declared())),
        (REFERENCE / "commands.md", "commands", command_help()),
        (PROJECT / "README.md", "measured", speed_tables.summary(SPEED)),
        *(
            (SPEED_PAGE, f"{what}{kind}", make(SPEED, kind))
            for kind in speed_tables.KINDS
            for what, make in (
                ("", speed_tables.inference_table),
                ("training-", speed_tables.training_table),
            )
        ),
        (SPEED_PAGE, "networks", speed_tables.networks_table(SPEED)),
        (SPEED_PAGE, "memory-kept", speed_tables.kept_table(SPEED / "amx/memory_kept.json")),
        (SPEED_PAGE, "memory-amx", speed_tables.memory_table(SPEED, "amx")),
        (SPEED_PAGE, "memory", speed_tables.memory_table(SPEED, "avx512")),
        (SPEED_PAGE, "memory-amd", speed_tables.memory_table(SPEED, "avx512-amd")),
        (SPEED_PAGE, "predict", speed_tables.predict_words(SPEED)),
        (SPEED_PAGE, "layers", speed_tables.layers_tables(SPEED)),
        (SPEED_PAGE, "targets", speed_tables.targets_table(SPEED)),
        (PROJECT / "README.md", "matrix", matrix(PROJECT / "results/matrix", short=True)),
        (PROJECT / "README.md", "demo", seeds_in_words(RESULTS / "demo/seeds.json")),
        (PROJECT / "docs/start/exporters.md", "exporters", exporters()),
        (PROJECT / "docs/start/install.md", "matrix", matrix(PROJECT / "results/matrix")),
        (
            PROJECT / "docs/start/first_training.md",
            "demo",
            seeds_table(RESULTS / "demo/seeds.json"),
        ),
        (
            PROJECT / "docs/start/first_training.md",
            "demo-avx2",
            seeds_table(RESULTS / "demo/seeds_avx2.json"),
        ),
        (PROJECT / "docs/guides/deploying.md", "export", export_table(RESULTS / "export")),
        (
            PROJECT / "docs/guides/deploying.md",
            "deployment",
            deployment_table(SPEED / "avx512/deployment.json"),
        ),
        (YOUR_DATA, "bccd", seeds_table(RESULTS / "start/bccd.json")),
        (YOUR_DATA, "small-objects", seeds_table(RESULTS / "start/small_objects.json")),
        (EVIDENCE_PAGE, "deeppcb", evidence_tables.deeppcb_table(RESULTS / "deeppcb")),
        (EVIDENCE_PAGE, "gain", evidence_tables.gain_in_words(RESULTS / "gain")),
        (EVIDENCE_PAGE, "gain-deeppcb", evidence_tables.gain_table(RESULTS / "gain", "DeepPCB")),
        (EVIDENCE_PAGE, "gain-bccd", evidence_tables.gain_table(RESULTS / "gain", "BCCD")),
        (PROJECT / "README.md", "gain", evidence_tables.gain_for_readme(PROJECT)),
        (
            PROJECT / "docs/paper/reproducing.md",
            "figure1",
            evidence_tables.benchmark_table(RESULTS, "figure1"),
        ),
        (
            PROJECT / "docs/guides/variants.md",
            "departures",
            evidence_tables.benchmark_table(RESULTS, "departures"),
        ),
        (EVIDENCE_PAGE, "continued", evidence_tables.generated_images(RESULTS)),
        (SPEED_PAGE, "busy", busy_table(RESULTS / "busy/busy.json")),
        (
            PROJECT / "docs/evidence/reliability.md",
            "at-scale",
            evidence_tables.at_scale_table(RESULTS / "at_scale/at_scale.json"),
        ),
        *walkthrough.texts(PROJECT / "docs/paper/walkthrough.md", RESULTS),
        *paper_tables.texts(PROJECT, RESULTS),
        *measured_tables.texts(PROJECT, RESULTS),
    ]
    pages: dict[Path, str] = {}
    for page, name, text in texts:
        begin, end = f"<!-- generated: {name} -->", "<!-- end -->"
        before, _, rest = pages.get(page, page.read_text()).partition(begin)
        if end not in rest:
            raise ValueError(f"{page} has no {begin} with an {end} after it")
        pages[page] = f"{before}{begin}\n\n{text}\n\n{end}{rest.partition(end)[2]}"
    return pages


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; say what is stale")
    check = parser.parse_args().check
    stale = {page: text for page, text in generated().items() if page.read_text() != text}
    for page, text in stale.items():
        if check:
            print(f"{page} is out of date: python docs/generate.py", file=sys.stderr)
        else:
            page.write_text(text)
            print(f"wrote {page}")
    return bool(stale) and check


if __name__ == "__main__":
    sys.exit(main())
