"""How well a config's anchors fit its training boxes, and which would fit better.

    fpn-ext anchors --config-file configs/demo/faster_rcnn_R_18_FPN.yaml
    fpn-ext anchors --config-file ... --dataset bccd_trainval \\
        --json anchors.json --output out MODEL.ANCHOR_GENERATOR.OFFSET 0.5

For every ground-truth box, resized as in training, finds the best anchor on the grids of the padded
image. Reports the fraction of boxes with a best IoU of at least 0.3, 0.5 and 0.7, by size (COCO's
small, medium and large, of the box in the original image), by class, and by the anchor's level; the
unmatched boxes, with an IoU below the lower one of MODEL.RPN.IOU_THRESHOLDS, which an RPN learns
from their best anchor only, with their images; and sizes and aspect ratios that fit better, with
the same fractions. MODEL.RPN.BOUNDARY_THRESH of 0 or more excludes anchors that extend farther
beyond the image. With several sizes in INPUT.MIN_SIZE_TRAIN every box counts at each, weighted by
how often training draws it. Flips and crops are ignored.

Exit code: 0 if the report was made, 2 for invalid arguments, config or data.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from detectron2.config import CfgNode
from matplotlib.figure import Figure

from ..data.training_boxes import AREAS, BoxesAtSides, TrainingBoxes, resize, training_sides
from ..names import aligned
from . import reports
from .anchor_fit import Fit, fit_anchors
from .best_anchors import AnchorGrid, Best

THRESHOLDS = (0.3, 0.5, 0.7)
ALIKE = 1.25  # sizes of two levels that differ by less say little more than one of them
IMAGES_NAMED = 5  # with unmatched boxes, in the printed report

# Names and (M,) masks of rows. One at a time: of a large dataset, a mask has millions.
Groups = Iterator[tuple[str, np.ndarray]]


@dataclass(frozen=True)
class AnchorReport:
    """The result of :func:`report_anchors`; ``suggested`` is None if nothing fits better."""

    found: TrainingBoxes
    resized: BoxesAtSides
    sides: dict[int, float]
    grid: AnchorGrid
    best: Best
    lower: float
    fit: Fit | None
    suggested: Best | None
    by_name: bool

    def shares(self, best: Best, rows: np.ndarray) -> dict[str, float]:
        """Statistics of the selected rows: ``{"boxes", "0.3", "0.5", "0.7", "mean"}``.

        ``boxes`` is the number of boxes, weighted by how often their size is drawn, the thresholds
        are fractions from 0 to 1 (NaN without boxes), ``mean`` is the mean best IoU.
        """
        weights, overlaps = self.resized.shares[self.resized.side[rows]], best.iou[rows]
        total = weights.sum()
        if not total:
            return {"boxes": 0.0, **dict.fromkeys([*map(str, THRESHOLDS), "mean"], float("nan"))}
        reached = {str(t): float(weights[overlaps >= t].sum() / total) for t in THRESHOLDS}
        return {"boxes": float(total), **reached, "mean": float(weights @ overlaps / total)}

    def groups(self) -> Groups:
        """Names and masks of the rows: all, by size, by class."""
        for name, mask in self.found.groups().items():
            yield name, mask[self.resized.index]

    def by_level(self, best: Best) -> Groups:
        """Names and row masks by level of the best anchor; rows without overlap are in none."""
        for number, level in enumerate(self.grid.levels):
            yield level.name, (best.level == number) & (best.iou > 0)

    def unmatched(self, best: Best) -> list[dict[str, Any]]:
        """Images with unmatched boxes at any size, most such boxes first."""
        matched = np.zeros(len(self.found.corners), dtype=bool)
        matched[self.resized.index[best.iou >= self.lower]] = True
        there = np.zeros_like(matched)
        there[self.resized.index] = True
        images, counts = np.unique(self.found.images[there & ~matched], return_counts=True)
        order = np.argsort(-counts, kind="stable")
        return [
            {"image_id": self.found.image_ids[images[i]], "boxes": int(counts[i])} for i in order
        ]

    def as_json(self) -> dict[str, Any]:
        """The report as plain values for :func:`fpn_ext.reporting.json_files.write_json`."""
        return {
            "images": len(self.found.image_ids),
            "boxes": self.resized.number(),
            "left_out": {"crowd": self.found.crowds, "without_area": self.resized.without_area()},
            "sides": [{"side": side, "share": share} for side, share in self.sides.items()],
            "boundary_thresh": self.grid.boundary_thresh,
            "iou_threshold_unmatched": self.lower,
            "configured": self._side_as_json(self.grid, self.best),
            "suggested": (
                self._side_as_json(self.grid.with_levels(self._fitted()), self.suggested)
                if self.suggested
                else None
            ),
        }

    def _fitted(self) -> list:
        assert self.fit is not None
        return self.fit.levels(self.grid.levels)

    def _side_as_json(self, grid: AnchorGrid, best: Best) -> dict[str, Any]:
        def shares(groups: Groups) -> dict[str, Any]:
            return {
                name: {k: None if v != v else round(v, 6) for k, v in self.shares(best, m).items()}
                for name, m in groups
            }

        return {
            "levels": [
                {
                    "name": level.name,
                    "stride": level.stride,
                    "sizes": level.sizes,
                    "aspect_ratios": level.aspect_ratios,
                }
                for level in grid.levels
            ],
            "boxes": shares(self.groups()),
            "by_level": shares(self.by_level(best)),
            "unmatched": self.unmatched(best),
        }

    def __str__(self) -> str:
        boxes = self.resized.number()
        sides = ", ".join(f"{side or 'as it is'}" for side in self.sides)
        first = f"{len(self.found.image_ids)} images, {boxes} boxes; shorter side {sides} px"
        if self.found.crowds:
            first += f"; left out: {self.found.crowds} crowd regions"
        if without_area := self.resized.without_area():
            first += f"; {without_area} boxes have no area"
        lines = [
            first,
            "",
            "Share of the boxes whose best anchor reaches an IoU of:",
            self._table(self.groups(), *([self.suggested] if self.suggested else [])),
            "",
            "By the level of the best anchor, as configured:",
            self._table(self.by_level(self.best)),
            "",
            self._unmatched_text("anchors as configured", self.best),
        ]
        if self.fit is None:
            return "\n".join([*lines, "", "No sizes and aspect ratios that fit better were found."])
        assert self.suggested is not None
        return "\n".join(
            [
                *lines,
                self._unmatched_text("suggested anchors", self.suggested),
                "",
                "Suggested, in pixels of the network input:",
                self.yaml(),
                *self._alike(),
            ]
        )

    def _alike(self) -> list[str]:
        """A line on neighbouring levels whose suggested sizes are nearly the same."""
        assert self.fit is not None
        sizes = [max(of_level) for of_level in self.fit.sizes]
        names = [level.name for level in self.grid.levels]
        pairs = [
            f"{names[n]} and {names[n + 1]}"
            for n in range(len(sizes) - 1)
            if sizes[n + 1] < ALIKE * sizes[n]
        ]
        if not pairs:
            return []
        return [
            f"{', '.join(pairs)} have nearly the same sizes: few boxes are larger, and the coarser "
            "level adds little."
        ]

    def _table(self, groups: Groups, *compared: Best) -> str:
        """One line per group, with current and compared fractions."""
        marks = ["", *(" suggested" for _ in compared)]
        header = ["", "boxes", *(f"{t:g}{mark}" for mark in marks for t in THRESHOLDS)]
        rows = [header]
        for name, mask in groups:
            shares = [self.shares(best, mask) for best in (self.best, *compared)]
            cells = [cell for its_shares in shares for cell in _percent(its_shares)]
            rows.append([name, f"{shares[0]['boxes']:.0f}", *cells])
        return aligned(rows)

    def _unmatched_text(self, what: str, best: Best) -> str:
        images = self.unmatched(best)
        count = sum(image["boxes"] for image in images)
        # The tables count a box at every side with its share; here it is matched if it is at one.
        at = "" if len(self.sides) == 1 else " at any of the shorter sides"
        text = f"With the {what}, {count} boxes have no anchor of IoU {self.lower:g}{at}"
        if not images:
            return text + "."
        named = ", ".join(f"{i['image_id']} ({i['boxes']})" for i in images[:IMAGES_NAMED])
        more = f" and {len(images) - IMAGES_NAMED} more images (--json lists all)"
        return f"{text}: {named}{more if len(images) > IMAGES_NAMED else ''}"

    def yaml(self) -> str:
        """The suggested keys, for a config file."""
        assert self.fit is not None
        numbers = [[f"{size:g}" for size in sizes] for sizes in self.fit.sizes]
        ratios = ", ".join(f"{ratio:g}" for ratio in self.fit.aspect_ratios)
        lists = [f"[{', '.join(sizes)}]" for sizes in numbers]
        names = [level.name for level in self.grid.levels]
        by_name = ", ".join(f"{n}: {sizes}" for n, sizes in zip(names, lists, strict=True))
        return "\n".join(
            [
                "MODEL:",
                "  ANCHOR_GENERATOR:",
                *([] if self.by_name else [f"    SIZES: [{', '.join(lists)}]"]),
                f"    ASPECT_RATIOS: [[{ratios}]]",
                *(["  FPN_EXT:", f"    ANCHOR_SIZES: {{{by_name}}}"] if self.by_name else []),
            ]
        )


def _percent(shares: dict[str, float]) -> list[str]:
    values = [shares[str(t)] for t in THRESHOLDS]
    return ["-" if value != value else f"{100 * value:.1f}" for value in values]


def report_anchors(cfg: CfgNode, found: TrainingBoxes) -> AnchorReport:
    """Evaluate a config's anchors on boxes, and search for better ones.

    Raises:
        ValueError: the config has no RPN, or no box has an area.
    """
    grid = AnchorGrid.from_config(cfg)
    resized = resize(found, cfg)
    if not len(resized):
        raise ValueError(f"none of the {len(found.corners)} boxes has an area")
    lower, upper = cfg.MODEL.RPN.IOU_THRESHOLDS
    groups = (mask[resized.index] for name, mask in found.groups().items() if name != "all")
    fit = fit_anchors(grid, resized, groups, upper)
    return AnchorReport(
        found=found,
        resized=resized,
        sides=training_sides(cfg),
        grid=grid,
        best=grid.best(resized),
        lower=lower,
        fit=fit,
        suggested=grid.with_levels(fit.levels(grid.levels)).best(resized) if fit else None,
        by_name=bool(cfg.MODEL.FPN_EXT.ANCHOR_SIZES),
    )


def draw_report(report: AnchorReport) -> Figure:
    """Fraction of boxes over the IoU of their best anchor, by size."""
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    thresholds = np.linspace(0, 1, 101)
    colors = dict(zip(("all", *AREAS), ("black", "#d55e00", "#009e73", "#0072b2"), strict=True))
    for name, rows in report.groups():
        if name not in colors:
            continue
        weights = report.resized.shares[report.resized.side[rows]]
        if not len(weights):
            continue
        for best, style in ((report.best, "-"), (report.suggested, "--")):
            if best is not None:
                overlaps = best.iou[rows]
                shares = [100 * weights[overlaps >= t].sum() / weights.sum() for t in thresholds]
                label = name if style == "-" else f"{name}, suggested"
                axes.plot(thresholds, shares, style, color=colors[name], label=label)
    axes.set(xlabel="IoU of the best anchor", ylabel="boxes, percent", xlim=(0, 1), ylim=(0, 102))
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    return figure


def run(args: argparse.Namespace) -> None:
    """Implements ``fpn-ext anchors``."""
    reports.run(args, report_anchors, draw_report, "anchors.png")
