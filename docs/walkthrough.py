"""Tables of docs/paper/walkthrough.md: what `fpn-ext explain` measures, and results on record."""

import functools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

CONFIG = "configs/detectron2/faster_rcnn_R_50_FPN_1x.yaml"
SIZE = (512, 512)
# The same network from torchvision, which gives its map of stride 2 as well, and P1 on it.
WITH_P1 = ["MODEL.FPN_EXT.BOTTOM_UP", "torchvision/resnet50"]
WITH_P1 += ["MODEL.FPN_EXT.LEVELS", '["p1", "p2", "p3", "p4", "p5", "p6"]']

UNSMOOTHED = (
    "fpn-ext reproduce --table 1 2 --rows c c_unsmoothed --seeds 1 2 3 --results results/unsmoothed"
)
# Where proposals come from: the file of the results, what its config is, options of the training.
RESNET18 = "MODEL.FPN_EXT.BOTTOM_UP torchvision/resnet18"
ON_BCCD = (
    """DATASETS.TRAIN "('bccd_trainval',)" DATASETS.TEST "('bccd_test',)" """
    "MODEL.ROI_HEADS.NUM_CLASSES 3"
)
PROPOSALS = (
    ("selective_search", "Fast R-CNN on selective search", "selective_search.yaml", RESNET18),
    ("rpn", "Faster R-CNN", "pyramid.yaml", f"{RESNET18} {ON_BCCD}"),
)


@functools.cache
def explained(*opts: str) -> Any:
    """`fpn_ext.inspection.explain.Explanation` of the page's config with overrides."""
    import fpn_ext
    from fpn_ext.inspection.explain import explain

    return explain(fpn_ext.load_config(CONFIG, opts), SIZE)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def part(name: str) -> str:
    """A part of the explanation, as a table."""
    return markdown(explained().tables()[name].rows)


def bottom_up() -> str:
    """C1 to C5, by the network that gives all five."""
    rows = [["map", "height x width", "stride", "channels"]]
    for m in explained(*WITH_P1).bottom_up:
        rows.append([m.name, f"{m.height} x {m.width}", str(m.stride), str(m.channels)])
    return markdown(rows)


def cost_of_p1() -> str:
    """Cells, anchors and multiply-adds of P1 beside those of the other levels together."""
    levels = explained(*WITH_P1).anchors
    p1, others = levels[0], levels[1:]
    assert p1.level == "p1"
    rows = [["", "cells", "anchors", "multiply-adds of the RPN head, G"]]

    def row(name: str, of: Sequence[Any]) -> tuple[list[str], list[int]]:
        cells = sum(level.height * level.width for level in of)
        numbers = [cells, sum(level.anchors for level in of)]
        sums = sum(level.multiply_adds for level in of)
        return [name, *(f"{n:,}" for n in numbers), f"{sums / 1e9:.1f}"], [*numbers, sums]

    texts, with_others = row(f"{others[0].level} to {others[-1].level}, together", others)
    own_texts, own = row("p1", [p1])
    rows += [texts, own_texts]
    rows.append(
        [
            "p1, times the others together",
            *(f"{a / b:.2f}" for a, b in zip(own, with_others, strict=True)),
        ]
    )
    return markdown(rows)


def equation() -> str:
    """The level rule in words, and the boxes."""
    return f"By {explained().rule}:\n\n{part('boxes')}"


def ablation(file: Path, rows: Iterable[str], metrics: Sequence[str]) -> str:
    """Rows of a table of `fpn-ext reproduce` beside the row that each is compared with."""
    summary = json.loads(file.read_text())
    lines = [["row", "", *metrics]]
    compared = []
    for name in rows:
        entry = summary["rows"].get(name)
        if entry is None:
            continue
        scores = [entry["metrics"][metric] for metric in metrics]
        label = f"({name.replace('_', ', ')})"
        lines.append([label, entry["what"], *(mean(score["ours"]) for score in scores)])
        if entry["against"] is not None:
            against = f"{label} - ({entry['against'].replace('_', ', ')})"
            differences = [difference(score) for score in scores]
            compared.append([against, entry["what"], *differences])
    origin = summary["origin"]
    seeds = ", ".join(str(seed) for seed in summary["rows"]["c"]["seeds"])
    commits = ", ".join(origin["commit"])
    source = f"../../results/{file.parent.name}/{file.stem}.md"
    about = (
        f"Table {summary['table']} at the small scale, seeds {seeds}, mean ± standard deviation, "
        f"commit {commits} ([all rows]({source})):"
    )
    return f"{about}\n\n{markdown(lines + compared)}"


def mean(score: dict[str, float], sign: str = "") -> str:
    return f"{score['mean']:{sign}.1f} ± {score['sd']:.1f}"


def difference(score: dict[str, Any]) -> str:
    """With the paper's, and what the two say of each other, where the paper has one."""
    ours = mean(score["difference"], "+")
    if "verdict" not in score:
        return ours
    return f"{ours} ({score['paper_difference']:+.1f}) {score['verdict']}"


def unsmoothed(file: Path, metrics: Sequence[str]) -> str:
    """Row (c) with and without the 3x3 convolutions."""
    if not file.is_file():
        return f"Not run yet: `{UNSMOOTHED}`."
    return ablation(file, ("c", "c_unsmoothed"), metrics)


def selective_search(results: Path) -> str:
    """AP on BCCD with proposals of selective search, and with those of an RPN."""
    metrics = ["AP", "AP50", "AP75"]
    rows, after = [["", *metrics]], []
    for name, what, config, options in PROPOSALS:
        file = results / f"{name}.json"
        command = f"python benchmarks/seeds.py --config-file configs/gain/{config}"
        command += f" --json results/selective_search/{name}.json {options}"
        if not file.is_file():
            after.append(f"Not run yet: `{command}`.")
            continue
        record = json.loads(file.read_text())
        boxes = [run["results"]["bccd_test"]["bbox"] for run in record["runs"]]
        seeds = ", ".join(str(run["seed"]) for run in record["runs"])
        scores = [", ".join(f"{box[metric]:.1f}" for box in boxes) for metric in metrics]
        rows.append([f"{what}, seeds {seeds}", *scores])
        where = f"commit {record['commit']} on {record['hardware']}"
        after.append(f"{what}: {where}; continued by `{command}`.")
    return "\n\n".join([*([markdown(rows)] if len(rows) > 1 else []), *after])


def texts(page: Path, results: Path) -> list[tuple[Path, str, str]]:
    """(page, name, text) of every generated part of the page."""
    table1, table2 = (results / f"paper-small/table{n}.json" for n in (1, 2))
    smoothing = results / "unsmoothed"
    return [
        (page, "bottom-up", bottom_up()),
        (page, "merged", part("merged")),
        (page, "levels", part("levels")),
        (page, "p1", cost_of_p1()),
        (page, "anchors", part("anchors")),
        (page, "boxes", equation()),
        (page, "weights", part("weights")),
        (page, "parameters", part("parameters")),
        (page, "parts-box", ablation(table2, "cdef", ("AP", "AP50", "APs"))),
        (page, "parts-rpn", ablation(table1, "cdef", ("AR@100", "AR@1000", "ARs@1000"))),
        (page, "unsmoothed-rpn", unsmoothed(smoothing / "table1.json", ("AR@100", "AR@1000"))),
        (page, "unsmoothed-box", unsmoothed(smoothing / "table2.json", ("AP", "AP50"))),
        (page, "selective-search", selective_search(results / "selective_search")),
        (page, "unshared-rpn", ablation(table1, ("c", "c_unshared"), ("AR@100", "AR@1000"))),
        (page, "unshared-box", ablation(table2, ("c", "c_unshared"), ("AP", "AP50"))),
    ]
