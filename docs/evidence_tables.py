"""Tables of evidence.md and reliability.md, written into them by generate.py.

Each is made of what there is in results/; of what has not been run, its place says so, and how.
"""

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).parents[1]
sys.path.insert(0, str(PROJECT / "benchmarks"))

import gain  # noqa: E402
from fpn_ext.reporting.measuring import markdown_table  # noqa: E402

# What others published of DeepPCB, each by a protocol of its own.
PUBLISHED = [
    ["the publication of the data set (Tang et al., 2019), pairs of images", "", "98.6", ""],
    ["Faster R-CNN, a benchmark of 2025, 50 epochs, pretrained, own anchors", "96.9", "", ""],
    ["YOLOv11, the same benchmark", "96.4", "", ""],
    ["DETR, the same benchmark", "93.2", "", ""],
]
SIDES = {"one_map": "C4", "pyramid": "P2 to P6"}
BOXES = {
    "AP": "AP",
    "AP50": "AP50",
    "AP75": "AP75",
    "APsmall": "APs",
    "APmedium": "APm",
    "APlarge": "APl",
    "ARsmall": "ARs",
}
UNTRAINED = 1.0  # an AP below this on both sides says nothing of either


def not_run(command: str) -> str:
    return f"Not run yet: `{command}`."


def continued(command: str) -> str:
    return f"Continued by `{command}`."


def mean_and_range(found: Sequence[float | None]) -> str:
    """Mean (least to largest); one value alone; nothing where no object has that size."""
    values = [value for value in found if value is not None]
    if not values:
        return ""
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.1f} to {max(values):.1f})"


def deeppcb_table(results: Path) -> str:
    """Ours and Detectron2's components from the same seeds, beside published figures."""
    config = "configs/deeppcb/faster_rcnn_efficientnet_lite0_FPN"
    rows = [["detector", "AP50", "AP at IoU 0.33", "AP (0.5 to 0.95)"]]
    said = []
    for file, name in (("ours", "this project"), ("builtin", "Detectron2's components")):
        path = results / f"{file}.json"
        suffix = "" if file == "ours" else "_builtin"
        command = (
            f"python benchmarks/seeds.py --config-file {config}{suffix}.yaml --json "
            f"results/deeppcb/{file}.json"
        )
        if not path.is_file():
            said.append(not_run(command))
            continue
        record = json.loads(path.read_text())
        boxes = [run["results"]["deeppcb_test"]["bbox"] for run in record["runs"]]
        seeds = ", ".join(str(run["seed"]) for run in record["runs"])
        scores = [mean_and_range([box[m] for box in boxes]) for m in ("AP50", "AP33", "AP")]
        of = "seeds" if len(boxes) > 1 else "seed"
        rows.append([f"{name}, {of} {seeds}", *scores])
        hours = statistics.mean(run["cpu_seconds"] for run in record["runs"]) / 3600
        said.append(
            f"`{config}{suffix}.yaml`: {hours:.1f} hours of CPU time a seed on "
            f"{record['hardware']}, commit {record['commit']}. AP50 by class: {by_class(boxes)}. "
            f"{continued(command)}"
        )
    return f"{markdown_table(rows[0], [*rows[1:], *PUBLISHED])}\n\n" + "\n\n".join(said)


def by_class(boxes: list[dict[str, float]]) -> str:
    """AP50 of each class, the mean of several trainings, the highest first."""
    names = [key.removeprefix("AP50-") for key in boxes[0] if key.startswith("AP50-")]
    means = {name: statistics.mean(box[f"AP50-{name}"] for box in boxes) for name in names}
    ranked = sorted(means.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {value:.1f}" for name, value in ranked)


def gain_table(results: Path, data: str) -> str:
    """A row a network: on one map and with the pyramid, and what that costs."""
    command = f'python benchmarks/gain.py --data "$DETECTRON2_DATASETS" --datasets {data}'
    rows = [row for row in gain.summary(results) if row["data"] == data]
    if not rows:
        return not_run(command)
    costs = {}
    if (results / "cost.json").is_file():
        record = json.loads((results / "cost.json").read_text())
        costs = {(row["network"], row["side"]): row for row in record["rows"]}
    lines = [["network", "map", *BOXES.values(), "parameters, M", "ms an image", "MiB"]]
    for row in rows:
        for side, name in SIDES.items():
            scores = row["scores"][side]
            cells = [mean_and_range([score[metric] for score in scores]) for metric in BOXES]
            cost = costs.get((row["network"], side))
            about = ["", "", ""]
            if cost:
                memory = cost["above_model_mib"]
                about = [f"{cost['parameters'] / 1e6:.1f}", f"{cost['ms']:.0f}"]
                about.append("" if memory is None else f"{memory:.0f}")
            lines.append([row["network"] if side == "one_map" else "", name, *cells, *about])
    after = [f"{runs_on_record(results, data=[data])} {continued(command)}"]
    if costs:
        after.append(
            f"Time of an image of {record['size']} with random weights, the median of "
            f"{record['rounds']} rounds, and memory above the loaded model: commit "
            f"{record['commit']} on {record['hardware']}, `python benchmarks/gain.py --cost`."
        )
    else:
        after.append(f"Parameters and time: {not_run('python benchmarks/gain.py --cost')}")
    return "\n\n".join([markdown_table(lines[0], lines[1:]), *after])


def gain_in_words(results: Path) -> str:
    """For how many networks the pyramid is better, by how much, and for which it is not."""
    by_data = measured(results)
    if not by_data:
        return not_run('python benchmarks/gain.py --data "$DETECTRON2_DATASETS"')
    said = [" ".join([gain_on(data, rows), *exceptions(rows)]) for data, rows in by_data.items()]
    return "\n\n".join(said)


def measured(results: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of each dataset that has some."""
    rows = gain.summary(results)
    by_data = {data: [row for row in rows if row["data"] == data] for data in gain.DATA}
    return {data: rows for data, rows in by_data.items() if rows}


def mean_score(row: dict[str, Any], side: str, metric: str) -> float:
    return statistics.mean(scores[metric] for scores in row["scores"][side])


def added(row: dict[str, Any], metric: str) -> float:
    return mean_score(row, "pyramid", metric) - mean_score(row, "one_map", metric)


def learns(row: dict[str, Any]) -> bool:
    return max(mean_score(row, side, "AP") for side in SIDES) >= UNTRAINED


def gain_on(data: str, rows: list[dict[str, Any]]) -> str:
    """What the pyramid adds on one dataset, over the networks that learn in the schedule."""
    trained = [row for row in rows if learns(row)]
    if not trained:
        return f"{data}: no network learns anything in this schedule."
    seeds = sorted({seed for row in trained for seed in row["seeds"]})
    least = min(len(row["seeds"]) for row in trained)
    of_each = f"{least} of seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else "one seed"
    said = []
    for metric in ("AP", "AP50", "AP75"):
        found = [added(row, metric) for row in trained]
        said.append(
            f"{metric} is higher for {sum(more > 0 for more in found)} ({min(found):+.1f} to "
            f"{max(found):+.1f}, {statistics.median(found):+.1f} in the median)"
        )
    by_size = ", ".join(
        f"{BOXES[metric]} {statistics.median(added(row, metric) for row in trained):+.1f}"
        for metric in ("APsmall", "APmedium", "APlarge")
    )
    return (
        f"{data}, {of_each} a network: with the pyramid, of {len(trained)} networks "
        f"{', '.join(said)}; by size of the objects, in the median, {by_size}."
    )


def exceptions(rows: list[dict[str, Any]]) -> list[str]:
    """Sentences: the networks whose AP is not higher, those that learn nothing, the missing."""
    lists = {
        "AP is not higher for": [
            f"{row['network']} ({added(row, 'AP'):+.1f})"
            for row in rows
            if learns(row) and added(row, "AP") <= 0
        ],
        f"Not counted, with an AP below {UNTRAINED:.0f} either way:": [
            row["network"] for row in rows if not learns(row)
        ],
        "Not measured yet:": [n for n in gain.NETWORKS if n not in {r["network"] for r in rows}],
    }
    return [f"{said} {', '.join(names)}." for said, names in lists.items() if names]


def gain_for_readme(project: Path) -> str:
    """The figure and the gain in words, once there are runs; a link."""
    link = "[The gain on real images](docs/evidence/evidence.md)"
    by_data = measured(project / "results/gain")
    if not (by_data and (project / "docs/images/gain.png").is_file()):
        return f"{link}, network by network: not run yet."
    picture = "![AP on one map and with the pyramid, network by network](docs/images/gain.png)"
    return "\n\n".join([picture, f"{link}:", *(gain_on(*of_one) for of_one in by_data.items())])


def at_scale_table(file: Path) -> str:
    """CPU time and peak memory of each part of benchmarks/at_scale.py."""
    if not file.is_file():
        return not_run("make at-scale")
    record = json.loads(file.read_text())
    about = record["about"]
    counts = about["images"], about["images"] * about["boxes_of_an_image"]
    images, boxes = (f"{count:,}".replace(",", " ") for count in counts)
    dataset = f"{images} images, {boxes} boxes"
    what_of = {
        "imports": "nothing: the imports alone",
        "matching": "anchors and 10 000 objects on an image matched, this project",
        "matching-detectron2": "the same, Detectron2",
        "data": f"`fpn-ext data`: {dataset}, every picture decoded",
        "levels": f"`fpn-ext levels`: {dataset}, at 6 training sizes",
        "anchors": f"`fpn-ext anchors`: {dataset}, at 6 training sizes",
        "evaluation": f"COCO's AP: {dataset}, as many detections",
        "proposals": "RoI heads: 100 000 proposals on an image",
        "classes": "RoI heads: 1000 classes, 1000 proposals",
    }
    rows = [
        [
            what_of[part["part"]],
            "failed" if part["failed"] else f"{part['cpu_s']:.0f}",
            str(part["peak_mb"]),
        ]
        for part in record["parts"]
    ]
    where = f"{about['hardware']}, torch {about['versions']['torch']}, commit {about['commit']}:"
    return f"{where}\n\n{markdown_table(['', 'CPU s', 'peak MiB'], rows)}"


def runs_on_record(results: Path, **wanted: Sequence[Any]) -> str:
    """How many runs a folder has with these values, by which commits and where."""
    files = [json.loads(file.read_text()) for file in sorted((results / "runs").glob("*.json"))]
    runs = [run for run in files if all(run[key] in of for key, of in wanted.items())]
    if not runs:
        return "No run."
    made = sorted({f"{run['commit']} on {run['hardware']}" for run in runs})
    return f"{len(runs)} runs, commit {', '.join(made)}."


def benchmark_table(results: Path, script: str) -> str:
    """What a benchmark wrote into its table's file, without title and command."""
    file = results / script / f"{script}.md"
    if not file.is_file():
        return not_run(f"python benchmarks/{script}.py --seeds 1 2 3")
    title, _, *paragraphs = file.read_text().strip().split("\n\n")
    assert title.startswith("# "), file
    return "\n\n".join(paragraphs)


def generated_images(results: Path) -> str:
    """What was trained on generated images, and the command that continues each."""
    reproduce, small = "fpn-ext reproduce --scale small --table", results / "paper-small"
    rows = []
    for name, about, files, on_record, command in (
        (
            "Tables 1 to 3",
            "paper/reproducing.md",
            "paper-small/table[123].md",
            runs_on_record(small, table=(1, 2, 3)),
            f"{reproduce} 1 2 3",
        ),
        (
            "Table 6",
            "paper/reproducing.md",
            "paper-small/table6.md",
            runs_on_record(small, table=(6,)),
            f"{reproduce} 6",
        ),
        *(
            (
                name,
                about,
                f"{script}/*.md",
                runs_on_record(results / script),
                f"python benchmarks/{script}.py",
            )
            for name, about, script in (
                ("Figure 1", "paper/reproducing.md", "figure1"),
                ("departures of other implementations", "guides/variants.md", "departures"),
                ("level rules", "guides/levels.md", "level_rules"),
            )
        ),
    ):
        tables = [
            f"[{file.stem}](../../{file.relative_to(results.parent)})"
            for file in sorted(results.glob(files))
        ]
        said = " ".join([on_record, ", ".join(tables)]).strip()
        rows.append([f"[{name}](../{about})", said, f"`{command} --seeds 1 2 3`"])
    return markdown_table(["", "on record", "continued by"], rows)
