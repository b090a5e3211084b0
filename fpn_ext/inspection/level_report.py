"""How many ground-truth boxes of a dataset are pooled from each pyramid level, by size and class.

    fpn-ext levels --config-file configs/demo/faster_rcnn_R_18_FPN.yaml
    fpn-ext levels --config-file ... --dataset bccd_trainval --json levels.json \\
        --output out MODEL.FPN_EXT.CANONICAL_BOX_SIZE 224

The boxes are resized as in training and assigned to levels by MODEL.FPN_EXT.LEVEL_RULE
(Detectron2's RoI heads: Eq. 1 with 224 and 4). A level with few boxes learns little; shift them by
MODEL.FPN_EXT.CANONICAL_BOX_SIZE, CANONICAL_LEVEL or LEVEL_RULE. With several sizes in
INPUT.MIN_SIZE_TRAIN every box counts at each, weighted by how often training draws it. Proposals,
which are pooled as well, are not counted.

Exit code: 0 if the report was made, 2 for invalid arguments, config or data.
"""

import argparse
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from detectron2.config import CfgNode
from matplotlib.figure import Figure

from ..config.level_table import level_rule
from ..data.training_boxes import TrainingBoxes, portions, resize, training_sides
from ..names import aligned
from . import reports


@dataclass(frozen=True)
class LevelReport:
    """How the boxes are spread over the levels.

    Attributes:
        levels: names of the pooled feature maps, fine to coarse.
        counts: number of boxes per level, for all boxes, COCO's sizes and each class, weighted by
            how often training draws each size.
        rule: name of the level rule.
        bounds: min box size in pixels for each level but the finest.
        measure: the definition of box size.
        sides: shorter sides in training and how often each is drawn.
        images: number of images.
        left_out: boxes excluded from training, by reason.
    """

    levels: list[str]
    counts: dict[str, list[float]]
    rule: str
    bounds: list[float]
    measure: str
    sides: dict[int, float]
    images: int
    left_out: dict[str, int]

    def as_json(self) -> dict[str, Any]:
        """The report as plain values for :func:`json.dumps`."""
        return {
            "images": self.images,
            "boxes": round(sum(self.counts["all"])),
            "left_out": self.left_out,
            "sides": [{"side": side, "share": share} for side, share in self.sides.items()],
            "rule": self.rule,
            "measure": self.measure,
            "bounds": self.bounds,
            "levels": self.levels,
            "counts": {
                name: [round(count, 6) for count in counts] for name, counts in self.counts.items()
            },
        }

    def __str__(self) -> str:
        sides = ", ".join(f"{side or 'as it is'}" for side in self.sides)
        left_out = [f"{count} {reason}" for reason, count in self.left_out.items() if count]
        bounds = ", ".join(
            f"{name} from {bound:.4g} px"
            for name, bound in zip(self.levels[1:], self.bounds, strict=True)
        )
        rows = [["", "boxes", *self.levels]]
        for name, counts in self.counts.items():
            total = sum(counts)
            cells = [f"{n:.0f} ({100 * n / total:.0f}%)" if total else "-" for n in counts]
            rows.append([name, f"{total:.0f}", *cells])
        boxes = f"{sum(self.counts['all']):.0f} boxes"
        about = f"{self.images} images, {boxes}; shorter side {sides} px"
        if left_out:
            about += f"; left out: {', '.join(left_out)}"
        return "\n".join(
            [
                about,
                f"{self.rule}, by the {self.measure} of a box: {bounds or 'one level'}",
                "",
                aligned(rows),
            ]
        )


def report_levels(cfg: CfgNode, found: TrainingBoxes) -> LevelReport:
    """Count boxes by the level from which a config's RoI heads pool them.

    Raises:
        ValueError: the heads pool from no level, or from all; or no box has an area.
    """
    rule = level_rule(cfg)
    if rule is None:
        raise ValueError(
            "boxes are put on levels by RoI heads that pool each from one map, of a stride that "
            f"its name tells; got MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE}, "
            f"MODEL.ROI_HEADS.NAME {cfg.MODEL.ROI_HEADS.NAME} and IN_FEATURES "
            f"{cfg.MODEL.ROI_HEADS.IN_FEATURES}"
        )
    resized = resize(found, cfg)
    if not len(resized):
        raise ValueError(f"none of the {len(found.corners)} boxes has an area")
    levels = list(cfg.MODEL.ROI_HEADS.IN_FEATURES)
    numbers = np.empty(len(resized), dtype=np.uint16)
    for portion in portions(len(resized)):
        boxes = torch.from_numpy(resized.rows(portion).boxes).float()  # float32, as the pooler's
        numbers[portion] = rule(boxes).numpy()
    counts = {}
    for name, mask in found.groups().items():
        rows = mask[resized.index]
        weights = resized.shares[resized.side[rows]]
        counts[name] = np.bincount(numbers[rows], weights, minlength=len(levels)).tolist()
    return LevelReport(
        levels=levels,
        counts=counts,
        rule=type(rule).__name__,
        bounds=[float(bound) for bound in rule.bounds()],
        measure=rule.measure,
        sides=training_sides(cfg),
        images=len(found.image_ids),
        left_out={"crowd regions": found.crowds, "without area": resized.without_area()},
    )


def draw_report(report: LevelReport) -> Figure:
    """Bar chart of boxes per level, stacked by class."""
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    by_class = {n: c for n, c in report.counts.items() if n.startswith("class ")}
    bottom = np.zeros(len(report.levels))
    for name, counts in (by_class or {"all": report.counts["all"]}).items():
        axes.bar(report.levels, counts, bottom=bottom, label=name.removeprefix("class "))
        bottom += counts
    if 1 < len(by_class) <= 20:
        axes.legend(fontsize="small")
    axes.set(ylabel="ground-truth boxes", title=f"pooled from, by {report.rule}")
    axes.grid(axis="y", alpha=0.3)
    return figure


def run(args: argparse.Namespace) -> None:
    """Implements ``fpn-ext levels``."""
    reports.run(args, report_levels, draw_report, "levels.png")
