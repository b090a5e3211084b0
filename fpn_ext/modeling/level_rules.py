"""Rules for the level a box is pooled from: Eq. 1 of the paper, and others by name.

``MODEL.FPN_EXT.LEVEL_RULE`` names the rule of PyramidROIHeads. Pooling from all levels at once is
not a rule but a separate class (:mod:`fpn_ext.variants.all_levels`).
"""

import itertools
import math
from collections.abc import Sequence

import torch
from detectron2.utils.registry import Registry
from torch import nn

from ..levels import check_fine_to_coarse, level_of, nearest_level

LEVEL_RULE_REGISTRY = Registry("LEVEL_RULE")
LEVEL_RULE_REGISTRY.__doc__ = """
Rules that map boxes to levels: nn.Modules called with (R, 4) boxes, XYXY in pixels of the network
input, that return (R,) int64 indices of feature maps, fine to coarse, 0 for the finest.

Constructed with ``(strides, canonical_box_size, canonical_level)``. For the level table, ``bounds``
gives the minimum box size of each map but the finest, and ``measure`` names the size measured.
"""


def assign_levels(
    boxes: torch.Tensor,
    min_level: int,
    max_level: int,
    canonical_box_size: float = 224,
    canonical_level: int = 4,
) -> torch.Tensor:
    """The pyramid level k each box is pooled from: Eq. 1 of the paper, clamped.

    k = floor(k0 + log2(sqrt(w h) / 224)), k0 = 4: a 224x224 box, the ImageNet crop size, goes to
    the level of a ResNet's C4, a box half as wide one level finer. The paper does not say what
    happens beyond the pyramid's levels; as is common, k is clamped to the nearest one.

    Args:
        boxes: (R, 4) XYXY in pixels of the network input.
        min_level: finest level available.
        max_level: coarsest level available.
        canonical_box_size: the 224 of Eq. 1, in pixels.
        canonical_level: k0.

    Returns:
        (R,) int64 levels in [min_level, max_level]. A box of zero, negative or NaN area
        gets ``min_level``.

    >>> sides = torch.tensor([0.0, 112.0, 223.99, 224.0, 448.0, 1e6])
    >>> assign_levels(torch.stack([0 * sides, 0 * sides, sides, sides], dim=1), 2, 5).tolist()
    [2, 3, 3, 4, 5, 5]
    """
    # log2(0) is -inf and clamps to min_level; NaN means negative or NaN area.
    level = torch.floor(_exact_level(boxes, canonical_box_size, canonical_level))
    level = torch.clamp(level, min=min_level, max=max_level)
    return torch.nan_to_num(level, nan=float(min_level)).to(torch.int64)


def _exact_level(boxes: torch.Tensor, box_size: float, level: int) -> torch.Tensor:
    """k0 + log2(sqrt(w h) / 224), which Eq. 1 rounds down."""
    boxes = boxes.to(torch.promote_types(boxes.dtype, torch.float32))
    width = boxes[:, 2] - boxes[:, 0]
    height = boxes[:, 3] - boxes[:, 1]
    size = torch.sqrt(width * height)
    return level + torch.log2(size / box_size)


@LEVEL_RULE_REGISTRY.register()
class PaperRule(nn.Module):
    """Eq. 1 (:func:`assign_levels`). Boxes of a level missing between two go to the nearest one,
    on a tie to the finer.

    Args:
        strides: of the maps, fine to coarse, powers of two.
        canonical_box_size: the 224 of Eq. 1, in pixels.
        canonical_level: k0.

    Raises:
        ValueError: strides not from fine to coarse, or several of which one is not a power of
            two, for which Eq. 1 has no level.

    >>> sides = torch.tensor([50.0, 120.0, 230.0, 450.0])
    >>> boxes = torch.stack([0 * sides, 0 * sides, sides, sides], dim=1)
    >>> PaperRule([4, 16, 32], 224, 4)(boxes).tolist()  # P3 is missing: P2 takes over
    [0, 0, 1, 2]
    """

    measure = "side"
    taken_over: list[int]  # TorchScript cannot infer it if empty

    def __init__(self, strides: Sequence[float], canonical_box_size: float, canonical_level: int):
        super().__init__()
        check_fine_to_coarse(strides)
        try:
            levels = [level_of(stride) for stride in strides]
        except ValueError as error:
            if len(strides) > 1:
                raise ValueError(
                    f"{error}; {type(self).__name__} names levels by it. Choose "
                    "MODEL.FPN_EXT.LEVEL_RULE StrideRule, for any strides"
                ) from None
            levels = [nearest_level(strides[0])]
        self.canonical_box_size = float(canonical_box_size)
        self.canonical_level = canonical_level
        self.min_level = levels[0]
        self.max_level = levels[-1]
        # First level of each map but the finest; levels in between go to the map before.
        self.firsts = [(a + b) // 2 + 1 for a, b in itertools.pairwise(levels)]
        self.taken_over = [
            k for k in range(self.min_level + 1, self.max_level + 1) if k not in self.firsts
        ]

    def bounds(self) -> list[float]:
        """Minimum box size in pixels for each map but the finest."""
        return [self.canonical_box_size * 2.0 ** (k - self.canonical_level) for k in self.firsts]

    def forward(self, boxes: torch.Tensor) -> torch.Tensor:
        """(R, 4) XYXY boxes -> (R,) int64 map indices."""
        return self._map_of(boxes)

    def _map_of(self, boxes: torch.Tensor) -> torch.Tensor:
        level = assign_levels(
            boxes, self.min_level, self.max_level, self.canonical_box_size, self.canonical_level
        )
        return self._index_of(level)

    def _index_of(self, level: torch.Tensor) -> torch.Tensor:
        """(R,) int64 levels from the finest to the coarsest -> (R,) int64 map indices."""
        index = level - self.min_level
        for k in self.taken_over:
            index = index - (level >= k).to(torch.int64)
        return index


@LEVEL_RULE_REGISTRY.register()
class RoundedRule(PaperRule):
    """Eq. 1 rounded to the nearest level instead of down: a box of 159 to 316 px goes to P4,
    instead of one of 224 to 448 px. (jwyang's fpn.pytorch rounds, too, and has another logarithm:
    :class:`~fpn_ext.variants.peers.RoundedNaturalLogRule`.)
    """

    def __init__(self, strides: Sequence[float], canonical_box_size: float, canonical_level: int):
        # round(x) is floor(x + 1/2), and half a level is a factor of sqrt(2).
        super().__init__(strides, canonical_box_size / math.sqrt(2), canonical_level)


@LEVEL_RULE_REGISTRY.register()
class LongerSideRule(PaperRule):
    """Eq. 1 with the box's longer side in place of sqrt(w h), as FCOS (Tian et al. 2019, Sec. 3.2)
    assigns objects by their largest distance: elongated boxes go to coarser levels.
    """

    measure = "longer side"

    def forward(self, boxes: torch.Tensor) -> torch.Tensor:
        """(R, 4) XYXY boxes -> (R,) int64 map indices."""
        boxes = boxes.to(torch.promote_types(boxes.dtype, torch.float32))
        side = torch.maximum(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]).clamp(min=0)
        return self._map_of(torch.stack((0 * side, 0 * side, side, side), dim=1))


@LEVEL_RULE_REGISTRY.register()
class StrideRule(nn.Module):
    """The coarsest map on which a box still spans as many cells as Eq. 1 requires; any strides.

    A 224 px box spans 14 cells of P4 (k0 = 4), and Eq. 1 picks the coarsest level on which a box
    spans at least as many. With consecutive powers of two as strides this equals Eq. 1; boxes too
    small for any map go to the finest.

    Args:
        strides: of the maps in pixels, fine to coarse.
        canonical_box_size: the 224 of Eq. 1, in pixels.
        canonical_level: k0.

    >>> sides = torch.tensor([80.0, 168.0, 335.0, 336.0])
    >>> boxes = torch.stack([0 * sides, 0 * sides, sides, sides], dim=1)
    >>> StrideRule([6, 12, 24], 224, 4)(boxes).tolist()  # 14 cells: of 6, 12 or 24 px
    [0, 1, 1, 2]
    """

    measure = "side"
    ratios: list[float]  # TorchScript cannot infer it if empty
    firsts: list[float]

    def __init__(self, strides: Sequence[float], canonical_box_size: float, canonical_level: int):
        super().__init__()
        check_fine_to_coarse(strides)
        self.canonical_box_size = float(canonical_box_size)
        self.canonical_level = canonical_level
        self.ratios = [stride / 2.0**canonical_level for stride in strides[1:]]
        # Same arithmetic as forward, so that a box exactly at a bound counts as beyond it.
        self.firsts = (canonical_level + torch.log2(torch.tensor(self.ratios))).tolist()

    def bounds(self) -> list[float]:
        """Minimum box size in pixels for each map but the finest."""
        return [self.canonical_box_size * ratio for ratio in self.ratios]

    def forward(self, boxes: torch.Tensor) -> torch.Tensor:
        """(R, 4) XYXY boxes -> (R,) int64 map indices."""
        level = _exact_level(boxes, self.canonical_box_size, self.canonical_level)
        index = torch.zeros_like(level, dtype=torch.int64)
        for first in self.firsts:
            index = index + (level >= first).to(torch.int64)  # False for NaN
        return index
