"""Tables of docs/paper/reproducing.md: the paper's figures, and those of the small scale."""

import json
import statistics
from pathlib import Path
from typing import Any

from fpn_ext.reporting.measuring import markdown_table

# What shows why a row's sign is not the paper's.
NEW = "--work output/reproduce/{0} --output results/{0}"  # with pretrained.pth of the others
LONGER = 'fpn-ext reproduce SOLVER.MAX_ITER 1200 SOLVER.STEPS "(900,)" ' + NEW.format("longer")
CONTEXT = "fpn-ext reproduce --scale small-context"
OTHER_224 = "fpn-ext reproduce MODEL.FPN_EXT.CANONICAL_BOX_SIZE {} --table 2 --rows {} {}"
COARSER, FINER = (
    OTHER_224.format(size, rows, NEW.format(folder))
    for size, rows, folder in ((28, "c f", "coarser"), (224, "c", "finer"))
)
# What, folder in results/, row of Table 2 there, and its command.
POOLED = [
    ("two levels coarser than (c)", "coarser", "c", COARSER),
    (
        "Eq. 1's level, as (c)",
        "unsmoothed",
        "c",
        f"fpn-ext reproduce --table 2 --rows c {NEW.format('unsmoothed')}",
    ),
    ("a level finer than (c)", "finer", "c", FINER),
    ("P2 alone, (f)", "coarser", "f", COARSER),
]

# What the rows (d) and (e) leave out.
PATHWAYS = {"e": "the lateral connections", "d": "the top-down pathway"}

# Seconds an iteration on 8 V100 of the same detectors, from Detectron2's MODEL_ZOO.md.
ZOO_SECONDS = {1: ("RPN", 0.186), 2: ("Fast R-CNN", 0.140), 3: ("Faster R-CNN", 0.210)}


def small_scale(results: Path) -> dict[int, dict[str, Any]]:
    """The summaries of Tables 1 to 3 that `fpn-ext reproduce` wrote, by number."""
    return {n: json.loads((results / f"table{n}.json").read_text()) for n in (1, 2, 3)}


def trainings(results: Path) -> str:
    """How many, from which seeds, in what time and where."""
    summaries = small_scale(results).values()
    seeds = [row["seeds"] for summary in summaries for row in summary["rows"].values()]
    minutes = sum(summary["origin"]["cpu_minutes"] for summary in summaries)
    hardware, commits = (
        ", ".join(sorted({name for summary in summaries for name in summary["origin"][key]}))
        for key in ("hardware", "commit")
    )
    names = ", ".join(str(seed) for seed in sorted({s for of_row in seeds for s in of_row}))
    return (
        f"{sum(map(len, seeds))} trainings, seeds {names}: {minutes} minutes of CPU time on "
        f"{hardware}, commit {commits}."
    )


def scores(results: Path, table: int) -> str:
    """Mean and standard deviation of every row, with the paper's figures in brackets."""
    from fpn_ext.paper.tables import markdown

    return markdown(small_scale(results)[table]).partition("\n\nDifferences")[0]


def verdicts(results: Path) -> dict[str, int]:
    """How many differences from row (c) hold, are reversed or open."""
    counts = dict.fromkeys(("holds", "reversed", "open"), 0)
    for summary in small_scale(results).values():
        for row in summary["rows"].values():
            for score in row["metrics"].values():
                if "verdict" in score:
                    counts[score["verdict"]] += 1
    return counts


def verdicts_in_words(results: Path, page: Path) -> str:
    """The same as a sentence, with links from a page; shorter in the README."""
    counts = verdicts(results)
    total = sum(counts.values())
    if page.name == "README.md":
        without = {
            row: small_scale(results)[2]["rows"][row]["metrics"]["AP"]["verdict"] for row in "de"
        }
        shown, not_shown = (
            [part for row, part in PATHWAYS.items() if (without[row] == "holds") is wanted]
            for wanted in (True, False)
        )
        return (
            "[Tables 1 to 3 of the paper](docs/paper/reproducing.md) were run at a small scale on "
            f"generated images: {counts['holds']} of {total} differences have the paper's sign, "
            f"{counts['reversed']} the opposite, {counts['open']} are open. For the detector they "
            f"show what {' and '.join(shown) or 'neither pathway'} are worth"
            + (f", and do not show it for {' and '.join(not_shown)}." if not_shown else ".")
        )
    links = ", ".join(f"[Table {n}](../../results/paper-small/table{n}.md)" for n in (1, 2, 3))
    return (
        f"Of the {total} differences from row (c) that the paper has too, {counts['holds']} have "
        f"its sign by more than two standard errors, {counts['reversed']} the other one, "
        f"{counts['open']} are open ({links})."
    )


def unshared(results: Path) -> str:
    """What heads that levels do not share cost."""
    summaries = small_scale(results)
    found = []
    for table, metric in ((1, "AR@100"), (2, "AP")):
        score = summaries[table]["rows"]["c_unshared"]["metrics"][metric]["difference"]
        found.append(f"{metric} {score['mean']:+.1f} ± {score['sd']:.1f} (Table {table})")
    return (
        "Heads that levels do not share, for which the paper prints no figures, against shared "
        f"ones: {', '.join(found)}. Each sees fewer boxes."
    )


def hours(project: Path) -> str:
    """How long a row of each table takes on 8 V100, by Detectron2's published speeds."""
    import fpn_ext

    parts = []
    for table, (name, seconds) in ZOO_SECONDS.items():
        cfg = fpn_ext.load_config(str(project / f"configs/paper/table{table}/c.yaml"))
        iterations = cfg.SOLVER.MAX_ITER
        parts.append(
            f"{name} about {iterations * seconds / 3600:.0f} h ({iterations:,} x {seconds:.2f} s)"
        )
    return f"A row on the pyramid: {', '.join(parts)}."


def windows_table() -> str:
    """Objects and masks of each window of segmentation proposals, as configured for the paper."""
    import fpn_ext

    fpn_ext.get_cfg()  # before Detectron2, which the windows' module imports
    from fpn_ext.levels import name_of, stride_of
    from fpn_ext.modeling.mask_windows import OF_WINDOW, WindowGrid

    rows = []
    for level in range(2, 7):
        grids = [WindowGrid(stride_of(level), window, 1, 1) for window in OF_WINDOW]
        sizes = [f"{size:.4g}" for grid in grids for size in (grid.scale, grid.side)]
        rows.append([name_of(level).upper(), *sizes])
    heads = [f"{what} of {w}x{w}, px" for w in OF_WINDOW for what in ("objects", "masks")]
    return markdown_table(["level", *heads], rows)


def mask_proposals(results: Path) -> str:
    """Table 6 at the small scale."""
    file = results / "table6.json"
    if not file.is_file():
        return "Not run yet: `fpn-ext reproduce --scale small --table 6 --seeds 1 2 3`."
    from fpn_ext.paper.tables import markdown

    summary = json.loads(file.read_text())
    origin = summary["origin"]
    seeds = sorted({seed for row in summary["rows"].values() for seed in row["seeds"]})
    about = (
        f"Seeds {', '.join(map(str, seeds))}: {origin['cpu_minutes']} minutes of CPU time on "
        f"{', '.join(origin['hardware'])}, commit {', '.join(origin['commit'])}; mean ± standard "
        "deviation, in brackets the paper's:"
    )
    return f"{about}\n\n{markdown(summary)}"


def context(folder: Path) -> str:
    """What row (c) recognises of objects without their surroundings (benchmarks/context.py)."""
    records = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    if not records:
        run = "output/reproduce/small/table2_c_seed1"
        return (
            f"Not run yet: `python benchmarks/context.py --config-file {run}/reproduce.yaml "
            f"--weights {run}/model_final.pth --json results/context/table2_c_seed1.json`."
        )
    margins = list(records[0]["rows"][0]["recognised"])
    rows = []
    for of_size in zip(*(record["rows"] for record in records), strict=True):
        shares = [[row["recognised"][margin] for row in of_size] for margin in margins]
        cells = [f"{statistics.mean(s):.1f} ({min(s):.1f} to {max(s):.1f})" for s in shares]
        rows.append([of_size[0]["size"], str(of_size[0]["objects"]), *cells])
    heads = ["the whole image" if margin == "all" else f"{margin} px" for margin in margins]
    made = sorted({f"commit {r['commit']} on {r['hardware']}" for r in records})
    return (
        f"{markdown_table(['objects', 'of them', *heads], rows)}\n\n"
        f"Percent of the objects, mean (least to largest) of {len(records)} trainings; "
        f"{', '.join(made)}."
    )


def changed(folder: Path, table: int, command: str) -> str:
    """The rows of a table beside row (c) under settings that are not the table's."""
    file = folder / f"table{table}.json"
    if not file.is_file():
        return f"Not run yet: `{command}`."
    from fpn_ext.paper.tables import markdown

    summary = json.loads(file.read_text())
    origin, rows = summary["origin"], summary["rows"]
    seeds = ", ".join(map(str, sorted({seed for row in rows.values() for seed in row["seeds"]})))
    about = (
        f"Seeds {seeds}, commit {', '.join(origin['commit'])} on {', '.join(origin['hardware'])}, "
        f"`{origin['command']}`:"
    )
    return f"{about}\n\n{markdown(summary)}"


def resolutions(results: Path) -> str:
    """Fast R-CNN on the pyramid with Eq. 1's 224 changed, and on P2 alone."""
    from fpn_ext.paper.published import METRICS

    lines, missing = [], []
    commits, hardware = set(), set()
    for what, folder, row, command in POOLED:
        file = results / folder / "table2.json"
        if not file.is_file():
            missing.append(f"Not run yet: `{command}`.")
            continue
        summary = json.loads(file.read_text())
        scores = [summary["rows"][row]["metrics"][metric]["ours"] for metric in METRICS[2]]
        seeds = ", ".join(map(str, sorted(summary["rows"][row]["seeds"])))
        lines.append([what, seeds, *(f"{of['mean']:.1f} ± {of['sd']:.1f}" for of in scores)])
        commits |= set(summary["origin"]["commit"])
        hardware |= set(summary["origin"]["hardware"])
    if not lines:
        return "\n\n".join(missing)
    table = markdown_table(["boxes pooled from", "seeds", *METRICS[2]], lines)
    commands = "; ".join(f"`{command}`" for *_, command in POOLED[:3])
    after = f"Commit {', '.join(sorted(commits))} on {', '.join(sorted(hardware))}: {commands}."
    return "\n\n".join([table, after, *missing])


def published_table(table: int) -> str:
    """The paper's figures for the rows of one of its tables that have a config."""
    from fpn_ext.paper.published import PUBLISHED, TABLES, published

    rows = []
    for row, (what, _) in TABLES[table].items():
        figures = [str(value) for value in published(table, row).values()]
        rows.append([f"`configs/paper/table{table}/{row}.yaml`", what, *figures])
    return markdown_table(["config", "", *PUBLISHED[table]], rows)


def texts(project: Path, results: Path) -> list[tuple[Path, str, str]]:
    """(page, name, text) of every generated part."""
    page, readme = project / "docs/paper/reproducing.md", project / "README.md"
    small = results / "paper-small"
    return [
        (page, "trainings", trainings(small)),
        *((page, f"scores-{table}", scores(small, table)) for table in (1, 2, 3)),
        (page, "verdicts", verdicts_in_words(small, page)),
        (
            project / "docs/evidence/evidence.md",
            "small-scale",
            verdicts_in_words(small, page),
        ),
        (readme, "verdicts", verdicts_in_words(small, readme)),
        (page, "unshared", unshared(small)),
        (page, "context", context(results / "context")),
        (page, "resolutions", resolutions(results)),
        *(
            (page, f"longer-{n}", changed(results / "longer", n, f"{LONGER} --table {n}"))
            for n in (1, 2)
        ),
        *(
            (
                page,
                f"context-{n}",
                changed(results / "paper-small-context", n, f"{CONTEXT} --table {n}"),
            )
            for n in (1, 2, 3)
        ),
        (page, "windows", windows_table()),
        (page, "table6", published_table(6)),
        (page, "table6-small", mask_proposals(small)),
        (page, "hours", hours(project)),
    ]
