"""Tables of single measurements, each from its file in results/: written by generate.py.

Where a file is missing, its place names the command that writes it.
"""

import json
import statistics
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import backbones
import level_rules
import variants
from evidence_tables import continued, mean_and_range, not_run
from fpn_ext.reporting.measuring import markdown_table, ratio_text

ROI_POOLING = "python benchmarks/roi_pooling.py --rounds 11 --json {file}"
AGREEMENT = (
    "python benchmarks/agreement.py --config-file configs/demo/faster_rcnn_R_18_FPN.yaml "
    "--weights output/demo_R_18/model_final.pth --json {file}"
)


def read(file: Path) -> Any:
    return json.loads(file.read_text())


def or_not_run(file: Path, text: Callable[[Any], str], command: str) -> str:
    """The text made of a file of results, or the command that writes it."""
    if not file.is_file():
        return not_run(command.format(file="/".join(file.parts[file.parts.index("results") :])))
    return text(read(file))


def average_recall(record: dict[str, Any]) -> str:
    """Average recall by pycocotools and by Detectron2's routine."""
    rows = [
        [
            row["metric"],
            *(f"{row[side]:.2f}" for side in ("pycocotools", "Detectron2")),
            f"{round(row['difference'], 2) + 0.0:+.2f}",  # + 0.0: no "-0.00"
        ]
        for row in record["rows"]
    ]
    table = markdown_table(["", "pycocotools", "Detectron2", "difference"], rows)
    return f"Commit {record['commit']}:\n\n{table}"


def evaluation(record: dict[str, Any]) -> str:
    """Time of COCO's evaluation by two libraries."""
    about = record["about"]
    packages = about["versions"]
    rows = [
        [f"{row['side']} {packages[row['side']]}", f"{row['seconds']:.2f}", ratio_text(row)]
        for row in record["sides"]
    ]
    before, after = (about[f"load_average_{when}"] for when in ("before", "after"))
    return (
        f"{about['images']} images x {about['detections_of_an_image']} detections x "
        f"{about['classes']} classes, {about['objects']} objects, on {about['hardware']}, commit "
        f"{about['commit']}, {about['rounds']} rounds, load {before:.1f} before and {after:.1f} "
        "after; median (min to max):\n\n"
        f"{markdown_table(['', 's', 'times pycocotools'], rows)}\n\n"
        f"The 12 numbers differ by at most {record['difference']:g}."
    )


def batches(record: dict[str, Any]) -> str:
    """Inference of one image and two, and every side of training, on a processor with AMX."""
    rows = [
        [
            f"inference, batch {row['batch']}" if part == "inference" else "training step, batch 2",
            row["size"],
            row["side"],
            f"{row['ms']:.0f}",
            ratio_text(row),
        ]
        for part in ("inference", "training")
        for row in record[part]
    ]
    about = record["about"]
    head = ["", "size", "side"]
    return (
        f"{about['processor']} with AMX, {about['threads']} threads, torch {about['torch']}, "
        f"commit {about['commit']}, {about['date']}, {about['rounds']} rounds; median (min to "
        f"max):\n\n{markdown_table([*head, 'ms', 'times Detectron2'], rows)}"
    )


def stages(record: dict[str, Any]) -> str:
    """How far each stage is from Detectron2's on the same inputs."""
    rows = [
        [row["stage"], row["side"], f"{row['difference']:.1e}", f"{row['largest']:.3g}"]
        for row in record["stages"]
        if row.get("difference") is not None
        and row["size"] == "800x1333"
        and row["side"] in ("this project", "optimised")
    ]
    head = ["stage at 800x1333", "side", "largest difference", "largest value"]
    return f"Commit {record['about']['commit']}:\n\n{markdown_table(head, rows)}"


def roi_pooling(record: dict[str, Any]) -> str:
    """RoI pooling against Detectron2's."""
    about = record["about"]
    rows = [
        [
            *(row["case"], row["side"], f"{row['ms']:.0f}", ratio_text(row)),
            f"{row['largest_error']:.1e}",
        ]
        for row in record["rows"]
    ]
    head = ["", "side", "ms", "times Detectron2", "largest difference"]
    height, width = about["size"]
    return (
        f"{about['boxes']} boxes on P2 to P5 of {height}x{width}, {about['channels']} channels, "
        f"{about['bins']}x{about['bins']}; {about['hardware']}, {about['threads']} threads, torch "
        f"{about['torch']}, commit {about['commit']}, {about['rounds']} rounds; median (min to "
        f"max):\n\n{markdown_table(head, rows)}"
    )


def agreement(record: dict[str, Any]) -> str:
    """AP of the same weights with each side's components and numerics."""
    metrics = list(record["rows"][0]["scores"])
    rows = [
        [
            row["side"],
            *("-" if score is None else f"{score:.3f}" for score in row["scores"].values()),
        ]
        for row in record["rows"]
    ]
    return (
        f"`{record['config']}`, {record['hardware']}, commit {record['commit']}:\n\n"
        f"{markdown_table(['', *metrics], rows)}"
    )


def classes(record: dict[str, Any]) -> str:
    """AP by class: mean (least to largest) over the seeds."""
    runs = [box["bbox"] for run in record["runs"] for box in run["results"].values()]
    names = [name.removeprefix("AP-") for name in runs[0] if name.startswith("AP-")]
    rows = [
        [metric, *(mean_and_range([run[metric + of] for run in runs]) for of in columns)]
        for columns in [["", *(f"-{name}" for name in names)]]
        for metric in ("AP", "AP50")
    ]
    seeds = ", ".join(str(run["seed"]) for run in record["runs"])
    minutes = statistics.mean(run["cpu_seconds"] for run in record["runs"]) / 60
    return (
        f"Seeds {seeds}, mean (least to largest); {minutes:.0f} minutes of CPU time each on "
        f"{record['hardware']}, commit {record['commit']}:\n\n"
        f"{markdown_table(['', 'mean of the classes', *names], rows)}"
    )


def anchors(record: dict[str, Any]) -> str:
    """How many boxes have a good anchor, as configured and as suggested."""
    bounds, sides = ("0.3", "0.5", "0.7"), ("configured", "suggested")
    rows = [
        [name.removeprefix("class "), f"{of['boxes']:.0f}"]
        + [f"{100 * record[side]['boxes'][name][bound]:.1f}" for side in sides for bound in bounds]
        for name, of in record["configured"]["boxes"].items()
    ]
    head = ["", "boxes", *bounds, *(f"{bound} suggested" for bound in bounds)]
    return (
        f"{record['images']} photographs with {record['boxes']} boxes; percentage of boxes whose "
        f"best anchor reaches an IoU of:\n\n{markdown_table(head, rows)}"
    )


def suggestion(record: dict[str, Any]) -> str:
    """The suggested anchors, as YAML."""

    def text(numbers: list[float]) -> str:
        return f"[{', '.join(f'{number:g}' for number in numbers)}]"

    levels = record["suggested"]["levels"]
    sizes = ", ".join(text(level["sizes"]) for level in levels)
    ratios = list(dict.fromkeys(text(level["aspect_ratios"]) for level in levels))
    return (
        f"    MODEL:\n      ANCHOR_GENERATOR:\n        SIZES: [{sizes}]\n"
        f"        ASPECT_RATIOS: [{', '.join(ratios)}]"
    )


def levels(record: dict[str, Any]) -> str:
    """How many boxes are pooled from each level."""
    rows = [
        [name.removeprefix("class "), f"{sum(counts):.0f}"]
        + [f"{count:.0f} ({100 * count / sum(counts):.0f}%)" for count in counts]
        for name, counts in record["counts"].items()
    ]
    return markdown_table(["", "boxes", *record["levels"]], rows)


def fuzzing(record: dict[str, Any]) -> str:
    """Inputs of each fuzz test, over the rounds that passed, and which did not."""
    rounds = [of_round for of_round in record["rounds"] if of_round["passed"]]
    counts: Counter[str] = Counter()
    for of_round in rounds:
        counts.update(of_round["inputs"])
    mended = {of_round["seed"]: of_round["commit"] for of_round in rounds}
    faults = [
        f"seed {of_round['seed']} found a fault in {of_round['commit']}, and "
        + (f"passed in {mended[of_round['seed']]}" if of_round["seed"] in mended else "fails")
        for of_round in record["rounds"]
        if not of_round["passed"]
    ]
    commits = ", ".join(dict.fromkeys(of_round["commit"] for of_round in rounds))
    rows = [[f"`{name}`", f"{count:,}"] for name, count in sorted(counts.items())]
    return (
        f"{counts.total():,} inputs in {len(rounds)} rounds without a failure"
        + "".join(f"; {fault}" for fault in faults)
        + f"; commit {commits}:\n\n{markdown_table(['fuzz test', 'inputs'], rows)}\n\n"
        + continued("make fuzz-million")
    )


def long_run(record: dict[str, Any]) -> str:
    """Resident memory over a long training and many predictions."""
    about, rows = record["about"], []
    for what, unit in (("training", "iterations"), ("prediction", "images")):
        memory, growth = record[what]["resident_mb"], record[what]["growth_mb"]
        number = len(memory) * about["recorded_every"]
        rows.append([what, f"{number} {unit}", f"{memory[0]}", f"{max(memory)}", f"{growth:+.1f}"])
    header = ["", "of random sizes", "MB at first", "MB at most", "MB, last fifth over second"]
    where = f"{about['hardware']}, torch {about['versions']['torch']}, commit {about['commit']}"
    plot = "[plot](../../results/long_run/long_run.png)"
    return f"{where} ({plot}):\n\n{markdown_table(header, rows)}"


def kills(folder: Path) -> str:
    """What trainings that were killed and resumed ended with."""
    records = [read(file) for file in sorted(folder.glob("*.json"))]
    if not records:
        return not_run("python tests/kill_resume.py --kills 20 --json results/kill_resume/FILE")
    rows = [
        [str(r[key]) for key in ("workers", "kills", "while_writing", "runs_to_the_end", "values")]
        + [r["commit"]]
        for r in records
    ]
    head = ["workers", "kills", "while a checkpoint was written", "resumed to the end"]
    return markdown_table([*head, "values, all bit-identical", "commit"], rows)


def networks_in_words(rows: list[dict[str, Any]]) -> str:
    """For the README: how many networks passed."""
    passed = sum(row["outcome"] == "pass" for row in rows)
    return (
        f"[{passed} networks](docs/evidence/backbones.md) of torchvision, timm and Detectron2 are "
        "tested."
    )


def rules(record: dict[str, Any]) -> str:
    """AP with each level rule, and the differences from Eq. 1."""
    scores, differences = level_rules.tables(record["runs"])
    seeds = " ".join(sorted({str(run["seed"]) for run in record["runs"]}))
    commits = ", ".join(sorted({run["commit"] for run in record["runs"]}))
    return (
        f"Box AP, mean ± standard deviation, seeds {seeds}, commit {commits}:\n\n{scores}\n\n"
        f"Differences from `PaperRule`, seed by seed, mean ± standard error:\n\n{differences}"
    )


def texts(project: Path, results: Path) -> list[tuple[Path, str, str]]:
    """(page, name, text) of every generated part."""
    evidence, guides = project / "docs/evidence", project / "docs/guides"
    speed, reliability = evidence / "speed.md", evidence / "reliability.md"
    with_amx = read(results / "speed-cpu/amx/whole_model.json")
    networks = backbones.recorded(results / "backbones")
    supported, unsupported = backbones.tables(networks)
    of_anchors, of_levels = (
        read(results / f"looking/{name}.json") for name in ("anchors", "levels")
    )
    pooled = results / "speed-cpu/avx512/roi_pooling.json"
    agreed = results / "agreement/agreement.json"
    return [
        (
            evidence / "average_recall.md",
            "difference",
            average_recall(read(results / "average_recall/recall_difference.json")),
        ),
        (project / "README.md", "networks", networks_in_words(networks)),
        (evidence / "backbones.md", "tested", backbones.in_words(networks)),
        (evidence / "backbones.md", "supported", supported),
        (evidence / "backbones.md", "unsupported", unsupported),
        (
            evidence / "level_rules.md",
            "rules",
            rules(read(results / "level_rules/level_rules.json")),
        ),
        (speed, "batches", batches(with_amx)),
        (speed, "stages", stages(with_amx)),
        (speed, "roi-pooling", or_not_run(pooled, roi_pooling, ROI_POOLING)),
        (speed, "agreement", or_not_run(agreed, agreement, AGREEMENT)),
        (speed, "evaluation", evaluation(read(results / "evaluation/evaluation.json"))),
        (
            reliability,
            "fuzzing",
            or_not_run(results / "fuzz/fuzz.json", fuzzing, "make fuzz-million"),
        ),
        (
            reliability,
            "long-run",
            or_not_run(results / "long_run/long_run.json", long_run, "make long-run"),
        ),
        (reliability, "kills", kills(results / "kill_resume")),
        (guides / "variants.md", "costs", variants.table()),
        (guides / "looking.md", "anchors", anchors(of_anchors)),
        (guides / "looking.md", "suggestion", suggestion(of_anchors)),
        (guides / "looking.md", "levels", levels(of_levels)),
        (
            project / "docs/start/first_training.md",
            "bccd-classes",
            classes(read(results / "start/bccd.json")),
        ),
    ]
