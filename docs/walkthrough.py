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
    commits, source = ", ".join(origin["commit"]), f"../../results/paper-small/{file.stem}.md"
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


def texts(page: Path, results: Path) -> list[tuple[Path, str, str]]:
    """(page, name, text) of every generated part of the page."""
    table1, table2 = (results / f"paper-small/table{n}.json" for n in (1, 2))
    return [
        (page, "bottom-up", bottom_up()),
        (page, "merged", part("merged")),
        (page, "levels", part("levels")),
        (page, "p1", cost_of_p1()),
        (page, "anchors", part("anchors")),
        (page, "boxes", equation()),
        (page, "weights", part("weights")),
        (page, "parameters", part("parameters")),
        (page, "parts-rpn", ablation(table1, "cdef", ("AR@100", "AR@1000", "ARs@1000"))),
        (page, "unshared-rpn", ablation(table1, ("c", "c_unshared"), ("AR@100", "AR@1000"))),
        (page, "unshared-box", ablation(table2, ("c", "c_unshared"), ("AP", "AP50"))),
    ]
