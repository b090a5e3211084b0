"""An analysis as images, and as one HTML file that needs no other."""

import argparse
import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..files.atomic import replacing, write_text
from ..reporting.drawn import png_of
from ..reporting.json_files import write_json
from ..reporting.provenance import command_line, versions
from .analysis import OVERLAP, RECALLS, WHAT, Analysis
from .analysis_inputs import analyses_of

REPORT = "analysis.html"
DPI = 110
MOST_CURVES = 12  # classes with a curve of their own
# What the words of the tables mean; docs/guides/analyzing.md has more.
TERMS = {
    "AP, AP50": "COCO's average precision, over IoUs from 0.5 to 0.95 and at 0.5",
    "AR": "COCO's average recall: the share of objects found, over the same IoUs",
    "IoU": "of two boxes or masks, the area of the intersection over that of the union; 1 if they "
    "are equal. For keypoints the OKS takes its place",
    "OKS": "COCO's object keypoint similarity: 1 if every keypoint is exact, and less the farther "
    "they are off, measured by the object's size",
    "best F1": "the highest harmonic mean of precision and recall at an IoU of 0.5",
    "from score": "counting the detections of this score and higher; beside the best F1, the "
    "score that gives it: a good --min-score to predict with",
    "classification": "a detection on an object of another class, at an IoU of 0.5 or more",
    "localisation": "a detection beside an object of its class, at an IoU of 0.1 to 0.5",
    "both": "a detection beside an object of another class, at an IoU of 0.1 to 0.5",
    "duplicate": "a detection of an object that a better one has found",
    "background": "a detection where there is no object, at an IoU below 0.1; among the rows of "
    "the confusion matrix, what is no object",
    "missed": "an object that no detection has",
    "cost in AP50": "what AP50 would gain if no error were of this type",
}
MOST_LABELS = 40  # classes named at the confusion matrix
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em;
  color: #222; background: #fff }
h1, h2, h3 { font-weight: 600; line-height: 1.25 }
h2 { margin-top: 2em; font-size: 1.3em }
h3 { margin-top: 2em; font-size: 1.1em }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .2em .8em; border-bottom: 1px solid #ddd; text-align: right; font-weight: 400 }
td:first-child, th:first-child { text-align: left }
th { color: #666 }
img { max-width: 100%; display: block; margin: 1em 0 }
.wide { overflow-x: auto }
footer { margin-top: 3em; color: #666; font-size: .85em }
"""


def run(args: argparse.Namespace) -> None:
    """Implements ``fpn-ext analyze``.

    Raises:
        FileNotFoundError, TypeError, ValueError: invalid arguments, files or config.
    """
    analyses = analyses_of(args)
    print("\n\n\n".join(map(str, analyses.values())))
    if args.json:
        write_json(args.json, {task: report.as_json() for task, report in analyses.items()})
    if args.output:
        write_report(analyses, args.output)
        print(f"\nwrote {args.output / REPORT} and its images")
    else:
        print(f"\n--output FOLDER writes figures, and {REPORT} with all of this in one page")


def write_report(analyses: Mapping[str, Analysis], folder: Path) -> None:
    """Write every image as a PNG file, and all of them with all tables in ``analysis.html``.

    Args:
        analyses: by task, with which the names of the images begin.
    """
    images = {
        task: {name: png_of(figure, DPI) for name, figure in figures(analysis).items()}
        for task, analysis in analyses.items()
    }
    for task, of_task in images.items():
        for name, content in of_task.items():
            with replacing(folder / f"{task}_{name}.png") as stream:
                stream.write(content)
    write_text(folder / REPORT, html_report(analyses, images))


def figures(analysis: Analysis) -> dict[str, Figure]:
    """The images by name, those that the analysis has something for."""
    drawn = {
        "precision_recall": _precision_recall,
        "scores": _scores,
        "confusion": _confusion,
        "errors": _errors,
        "levels": _levels,
        "false_positives": _false_positives,
    }
    has_objects = analysis.everything.objects > 0
    left_out = {
        *(() if has_objects else ("precision_recall", "scores", "errors", "levels")),
        *(() if analysis.levels else ("levels",)),
        *(() if analysis.errors else ("errors",)),
        *(() if analysis.empty_images else ("false_positives",)),
    }
    result = {}
    for name, draw in drawn.items():
        if name not in left_out:
            side = min(4 + 0.3 * len(analysis.names), 14) if name == "confusion" else 0
            figure = Figure(figsize=(side + 1, side) if side else (6.5, 4), layout="constrained")
            draw(analysis, figure.add_subplot())
            result[name] = figure
    return result


def label(name: str) -> str:
    r"""A class's name as Matplotlib shows it: no formulas, and no name that it hides.

    >>> label("_5 $"), label("cat")
    (' _5 \\$', 'cat')
    """
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def _precision_recall(analysis: Analysis, axes: Axes) -> None:
    axes.plot(RECALLS, analysis.everything.precision, color="black", lw=2, label="mean")
    classes = [report for report in analysis.classes if report.objects]
    for report in classes if len(classes) <= MOST_CURVES else ():
        axes.plot(RECALLS, report.precision, lw=1, label=label(report.name))
    axes.set(xlabel="recall", ylabel="precision", ylim=(0, 1.02))
    axes.set(title=f"at {OVERLAP[analysis.task]} of 0.5")
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)


def _scores(analysis: Analysis, axes: Axes) -> None:
    scores = [point["score"] for point in analysis.by_score]
    for name, shown in (("f1", "F1"), ("precision", "precision"), ("recall", "recall")):
        values = [point[name] for point in analysis.by_score]
        axes.plot(scores, values, label=shown, drawstyle="steps-pre")
    if best := analysis.everything.best:
        axes.axvline(best["score"], color="black", lw=1, ls=":", label="best F1")
    axes.set(xlabel="detections from this score on", title="all classes", ylim=(0, 1.02))
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)


def _confusion(analysis: Analysis, axes: Axes) -> None:
    counts = np.array(analysis.confusion, dtype=np.float64)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if len(counts) <= MOST_LABELS:
        columns, rows = ([label(n) for n in names] for names in (analysis.columns, analysis.names))
        axes.set_xticks(range(len(columns)), columns, rotation=90)
        axes.set_yticks(range(len(rows)), rows)
    if len(counts) <= MOST_CURVES:
        for i, j in np.argwhere(counts > 0):
            color = "white" if shares[i, j] > 0.5 else "black"
            axes.text(j, i, f"{counts[i, j]:.0f}", ha="center", va="center", color=color)
    axes.set(xlabel="detected as", ylabel="object", title=f"from score {analysis.min_score:.3f}")


def _errors(analysis: Analysis, axes: Axes) -> None:
    errors = analysis.errors or {}
    axes.bar(list(errors), [100 * error["cost"] for error in errors.values()])
    for i, error in enumerate(errors.values()):
        axes.text(i, 100 * error["cost"], f"{error['count']:.0f}", ha="center", va="bottom")
    axes.tick_params(axis="x", labelsize="small")
    axes.set(ylabel="cost in AP50", title="errors by type, and their number")


def _levels(analysis: Analysis, axes: Axes) -> None:
    levels = [level for level in analysis.levels or () if level.objects]
    axes.bar([level.level for level in levels], [100 * level.ap for level in levels])
    for i, level in enumerate(levels):
        axes.text(i, 100 * level.ap, f"{level.objects} objects", ha="center", va="bottom")
    axes.set(ylabel="AP", title="by the pyramid level of an object's box")


def _false_positives(analysis: Analysis, axes: Axes) -> None:
    scores, rates = zip(*analysis.false_positives, strict=True)
    axes.plot(scores, rates, marker="o")
    axes.set(
        xlabel="detections from this score on",
        ylabel="false positives per image",
        title=f"{analysis.empty_images} images without objects",
    )
    axes.grid(alpha=0.3)


# Image -> beginning of the title of the table that it stands by.
PLACES = {
    "precision_recall": "classes",
    "scores": "classes",
    "levels": "pyramid levels",
    "errors": "errors",
    "confusion": "confusion",
    "false_positives": "false positives",
}


def html_report(analyses: Mapping[str, Analysis], images: Mapping[str, Mapping[str, bytes]]) -> str:
    """The report as one HTML page, with the images in it and nothing loaded from elsewhere.

    Args:
        analyses: by task, at least one.
        images: by task, PNG files by their names in :func:`figures`.
    """
    title = f"Analysis of {next(iter(analyses.values())).title}"
    parts = [f"<h1>{html.escape(title)}</h1>"]
    for task, analysis in analyses.items():
        parts += _html_analysis(analysis, images.get(task, {}))
    terms = "".join(f"<dt>{html.escape(t)}</dt><dd>{html.escape(m)}</dd>" for t, m in TERMS.items())
    parts.append(f"<h2>words</h2><dl>{terms}</dl>")
    made_with = ", ".join(f"{name} {version}" for name, version in versions().items())
    parts.append(
        f"<footer><code>{html.escape(command_line())}</code><br>{html.escape(made_with)}</footer>"
    )
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body>\n{body}\n</body></html>\n"
    )


def _html_analysis(analysis: Analysis, images: Mapping[str, bytes]) -> list[str]:
    all_ = analysis.everything
    parts = [
        f"<h2>{WHAT[analysis.task]}</h2>",
        f"<p>{analysis.images} images, {all_.objects} objects, {all_.detections} detections. "
        "Scores are in percent.</p>",
        *(f"<p>{html.escape(note)}</p>" for note in analysis.notes()),
    ]
    for heading, rows in analysis.tables().items():
        parts.append(f"<h3>{html.escape(heading)}</h3>")
        for name, place in PLACES.items():
            if heading.startswith(place) and name in images:
                data = base64.b64encode(images[name]).decode("ascii")
                alt = f"{WHAT[analysis.task]}: {name}"
                parts.append(f'<img alt="{alt}" src="data:image/png;base64,{data}">')
        parts.append(_html_table(rows))
    return parts


def _html_table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows

    def line(cells: Sequence[str], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{html.escape(c)}</{tag}>' for c in cells)}</tr>"

    lines = [line(head, "th"), *(line(row, "td") for row in body)]
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'
