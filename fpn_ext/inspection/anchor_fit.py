"""Anchor sizes and aspect ratios that fit the boxes of a dataset.

What matters for an RPN is whether a box has an anchor that is positive by overlap, i.e. with an IoU
of at least the upper one of ``MODEL.RPN.IOU_THRESHOLDS`` (0.7); a higher IoU gains nothing. So the
objective is the mean over boxes of min(best IoU, 0.7): boxes already above do not contribute, and
many boxes of one size do not attract all levels, as they would with mean IoU or k-means. The IoU is
computed on the real anchor grids, not with aligned centres, so a coarse level's large stride counts
against it.

Half of the weight is spread evenly over all boxes, the other half evenly over the groups (COCO's
sizes, classes), so that rare groups are not sacrificed for the last percent of others.

The structure stays that of the paper (Lin et al. 2017, Sec. 4.1): as many sizes per level as
before, by default one, increasing from fine to coarse, and one list of aspect ratios for all
levels. Coordinate ascent: one number at a time is set to the best of its neighbours until no step
helps; starting from the configured anchors, and from quantiles of the boxes' sizes and shapes.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..data.training_boxes import BoxesAtSides, ResizedBoxes
from ..modeling.anchors import cell_anchors
from .best_anchors import AnchorGrid, AnchorLevel, iou

MOST_BOXES = 5000  # used; larger datasets are subsampled evenly
WIDE_STEPS = 2.0 ** (np.arange(-12, 13) / 8)
FINE_STEPS = 2.0 ** (np.arange(-6, 7) / 32)
MOST_SWEEPS = 20
MEAN_IOU_WEIGHT = 1e-3  # breaks ties of the thresholded IoU
LEAST_GAIN = 1e-4


@dataclass(frozen=True)
class Fit:
    """Sizes of each level, fine to coarse, and the aspect ratios of all.

    Attributes:
        sizes: in pixels of the network input, one ascending list per level.
        aspect_ratios: heights over widths, ascending.
    """

    sizes: list[list[float]]
    aspect_ratios: list[float]

    def levels(self, like: Sequence[AnchorLevel]) -> list[AnchorLevel]:
        """These anchors on the given levels."""
        return [
            AnchorLevel(
                level.name,
                level.stride,
                level.offset,
                np.array(cell_anchors(sizes, self.aspect_ratios), dtype=np.float64),
            )
            for level, sizes in zip(like, self.sizes, strict=True)
        ]


def fit_anchors(
    grid: AnchorGrid,
    resized: ResizedBoxes | BoxesAtSides,
    groups: Iterable[np.ndarray] = (),
    threshold: float = 0.7,
) -> Fit | None:
    """Sizes and aspect ratios fitted to boxes; None if none beat the configured ones.

    Args:
        grid: the configured anchors.
        resized: the boxes.
        groups: (M,) masks of boxes; half of the weight is spread evenly over the groups.
        threshold: the IoU from which an anchor is positive.
    """
    count = len(resized)
    used = np.linspace(0, count - 1, min(count, MOST_BOXES)).round().astype(np.int64)
    rows = replace(resized.rows(used), weights=_balanced(resized.weights, groups, used))
    search = _Search(grid, rows, threshold)
    starts = [_configured(grid), _quantiles(grid, rows)]
    best = max((search.climb(start) for start in starts), key=search.value)
    rounded = Fit(
        [[float(max(round(size), 1)) for size in sizes] for sizes in best.sizes],
        [round(ratio, 2) for ratio in best.aspect_ratios],
    )
    best_iou = grid.best(rows).iou
    return rounded if search.value(rounded) > search.value_of(best_iou) + LEAST_GAIN else None


def _balanced(weights: np.ndarray, groups: Iterable[np.ndarray], used: np.ndarray) -> np.ndarray:
    """The weights of the rows that are used; ``weights`` and ``groups`` are those of all."""
    by_group = [mask[used] * weights[used] / weights[mask].sum() for mask in groups if mask.any()]
    by_box = weights[used] / weights.sum()
    return by_box + np.mean(by_group, axis=0) if by_group else by_box


def _configured(grid: AnchorGrid) -> Fit:
    ratios = max((level.aspect_ratios for level in grid.levels), key=len)
    return _in_order([level.sizes for level in grid.levels], ratios)


def _quantiles(grid: AnchorGrid, resized: ResizedBoxes) -> Fit:
    like = _configured(grid)
    sides = resized.boxes[:, 2:] - resized.boxes[:, :2]
    count = sum(map(len, like.sizes))
    sizes = np.quantile(np.sqrt(sides.prod(axis=1)), (np.arange(count) + 0.5) / count).tolist()
    shares = (np.arange(len(like.aspect_ratios)) + 0.5) / len(like.aspect_ratios)
    ratios = np.quantile(sides[:, 1] / sides[:, 0], shares).tolist()
    return _in_order([[sizes.pop(0) for _ in of_level] for of_level in like.sizes], ratios)


def _in_order(sizes: Sequence[Sequence[float]], ratios: Sequence[float]) -> Fit:
    """Sizes sorted to increase over the levels, keeping the number per level."""
    ascending = sorted(size for of_level in sizes for size in of_level)
    return Fit([[ascending.pop(0) for _ in of_level] for of_level in sizes], sorted(ratios))


class _Search:
    """Hill climbing over anchors, caching the IoU of every box with each."""

    def __init__(self, grid: AnchorGrid, resized: ResizedBoxes, threshold: float):
        self.levels = grid.levels
        self.boundary_thresh = grid.boundary_thresh
        self.resized = resized
        self.map_sizes = grid.map_sizes(resized.image_sizes)
        self.threshold = threshold

    def value(self, fit: Fit) -> float:
        return self.value_of(self._best_iou(self._table(*_flat(fit), fit.aspect_ratios)))

    def value_of(self, best_iou: np.ndarray) -> float:
        """The objective, from the (M,) IoU of every box with its best anchor."""
        gain = np.minimum(best_iou, self.threshold) + MEAN_IOU_WEIGHT * best_iou
        return float(np.average(gain, weights=self.resized.weights))

    def climb(self, fit: Fit) -> Fit:
        """Improve ``fit`` by changing one number at a time."""
        levels, sizes = _flat(fit)
        ratios = list(fit.aspect_ratios)
        table = self._table(levels, sizes, ratios)
        for sweep in range(MOST_SWEEPS):
            before = self.value_of(self._best_iou(table))
            steps = WIDE_STEPS if sweep % 2 == 0 else FINE_STEPS
            for n, level in enumerate(levels):
                below, above = [0.0, *sizes][n], [*sizes, math.inf][n + 1]
                trials = (
                    (size, self._table([level], [size], ratios))
                    for size in sizes[n] * steps
                    if below < size < above
                )
                sizes[n] = self._choose(table, (slice(n, n + 1),), sizes[n], trials)
            for n, ratio in enumerate(ratios):
                trials = ((r, self._table(levels, sizes, [r])) for r in ratio * steps)
                ratios[n] = self._choose(table, (slice(None), slice(n, n + 1)), ratio, trials)
            if sweep % 2 and self.value_of(self._best_iou(table)) < before + LEAST_GAIN:
                break
        remaining = list(sizes)
        return Fit([[remaining.pop(0) for _ in of_level] for of_level in fit.sizes], sorted(ratios))

    def _choose(
        self,
        table: np.ndarray,
        where: tuple[slice, ...],
        number: float,
        trials: Iterable[tuple[float, np.ndarray]],
    ) -> float:
        """The best of a number and its candidates; updates its part of the table."""
        part = table[where].copy()
        table[where] = 0.0
        others = self._best_iou(table)
        value = self.value_of(np.maximum(others, self._best_iou(part)))
        for tried, its_part in trials:
            its_value = self.value_of(np.maximum(others, self._best_iou(its_part)))
            if its_value > value:
                number, part, value = float(tried), its_part, its_value
        table[where] = part
        return number

    def _table(
        self, levels: Sequence[int], sizes: Sequence[float], ratios: Sequence[float]
    ) -> np.ndarray:
        """(S, R, M): IoU of every box with its best anchor of each size and each ratio."""
        rows, parts = self.resized, []
        for number, size in zip(levels, sizes, strict=True):
            like = self.levels[number]
            shapes = np.array(cell_anchors([size], ratios), dtype=np.float64)
            level = AnchorLevel(like.name, like.stride, like.offset, shapes)
            anchors = level.nearest(
                rows.boxes, self.map_sizes[number], rows.image_sizes, self.boundary_thresh
            )
            parts.append(iou(rows.boxes[:, None], anchors).T)
        return np.stack(parts)

    @staticmethod
    def _best_iou(table: np.ndarray) -> np.ndarray:
        best: np.ndarray = table.max(axis=(0, 1))
        return best


def _flat(fit: Fit) -> tuple[list[int], list[float]]:
    """The level index of each size, and the sizes."""
    pairs = [(number, size) for number, sizes in enumerate(fit.sizes) for size in sizes]
    return [number for number, _ in pairs], [size for _, size in pairs]
