"""Anchors of one scale per pyramid level (Lin et al. 2017, Sec. 4.1).

Because the RPN head slides over all levels, a level needs anchors of one scale only: areas
32^2 .. 512^2 on P2 .. P6, each with aspect ratios 1:2, 1:1, 2:1.
"""

import collections
import math
import numbers
from collections.abc import Callable, Mapping, Sequence

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import ANCHOR_GENERATOR_REGISTRY
from detectron2.structures import Boxes
from torch import nn

from ..exporting import records_a_graph
from ..keys import declare, own_keys
from ..levels import map_name

declare(
    "MODEL.FPN_EXT.ANCHOR_SIZES",
    {},
    "Anchor sizes by level, e.g. {p2: [32], p3: [64, 90], ...}, in the place of "
    "MODEL.ANCHOR_GENERATOR.SIZES; {} for those.",
    "PyramidAnchorGenerator",
)

# Anchor sets cached per module. One for an 800x1333 image takes 4 MB; with more input sizes
# (multi-scale training) the least recently used set is recomputed.
MAX_CACHED_GRIDS = 16


@ANCHOR_GENERATOR_REGISTRY.register()
class PyramidAnchorGenerator(nn.Module):
    """Anchors centred on every location of every level, the same set at all locations of a level.

    An anchor of size s and aspect ratio a (height / width) has area s^2: width sqrt(s^2 / a) and
    height a times that. Anchors at row i, column j of a level with stride t are centred at
    ((j + offset) t, (i + offset) t).

    Args:
        sizes: square roots of the anchor areas in pixels of the network input, one list per level,
            e.g. ``[[32], [64], [128], [256], [512]]``. A single list, nested or flat, serves all
            levels. Or a mapping by level, ``{"p2": [32], "p3": [64], ...}``; levels without a
            stride in ``strides`` are ignored.
        aspect_ratios: height / width, one list per level or a single list for all.
        strides: stride of each level in pixels, fine to coarse.
        offset: centre of the first anchor as a fraction of the stride, in [0, 1). As in Detectron2,
            0.5 by keyword and 0.0 from a config (``MODEL.ANCHOR_GENERATOR.OFFSET``).

    Raises:
        ValueError: neither one list nor one per level; an empty list; a size or ratio that is not
            a positive number; ``offset`` outside [0, 1).

    >>> generator = PyramidAnchorGenerator(
    ...     sizes=[[32], [64]], aspect_ratios=[[0.5, 1.0, 2.0]], strides=[4, 8], offset=0.0)
    >>> generator.num_anchors
    [3, 3]
    >>> p2, p3 = generator([torch.zeros(1, 256, 2, 2), torch.zeros(1, 256, 1, 1)])
    >>> p2.tensor.shape, p3.tensor[1].tolist()
    (torch.Size([12, 4]), [-32.0, -32.0, 32.0, 32.0])
    """

    box_dim: torch.jit.Final[int] = 4

    @configurable
    def __init__(
        self,
        *,
        sizes: Sequence[Sequence[float]] | Sequence[float] | Mapping[str, Sequence[float]],
        aspect_ratios: Sequence[Sequence[float]] | Sequence[float],
        strides: Sequence[float],
        offset: float = 0.5,
    ):
        super().__init__()
        self.strides = [float(stride) for stride in strides]
        if not self.strides or not all(math.isfinite(t) and t > 0 for t in self.strides):
            raise ValueError(f"strides must be positive numbers of pixels, got {list(strides)}")
        if not 0.0 <= offset < 1.0:
            raise ValueError(
                f"MODEL.ANCHOR_GENERATOR.OFFSET must be at least 0 and below 1, got {offset}"
            )
        self.offset = float(offset)
        if isinstance(sizes, Mapping):
            sizes = _of_levels(sizes, self.strides)
        # Plain numbers, not buffers: anchors stay float32 when the model is cast.
        self.cell_anchors = [
            cell_anchors(level_sizes, level_ratios)
            for level_sizes, level_ratios in zip(
                _per_level(sizes, self.strides, "SIZES"),
                _per_level(aspect_ratios, self.strides, "ASPECT_RATIOS"),
                strict=True,
            )
        ]
        self.cache = _LeastRecentlyUsed(MAX_CACHED_GRIDS)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: list[ShapeSpec]) -> dict:
        return {
            "sizes": dict(own_keys(cfg).ANCHOR_SIZES) or cfg.MODEL.ANCHOR_GENERATOR.SIZES,
            "aspect_ratios": cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS,
            "strides": [shape.stride for shape in input_shape],
            "offset": cfg.MODEL.ANCHOR_GENERATOR.OFFSET,
        }

    @property
    @torch.jit.unused
    def num_anchors(self) -> list[int]:
        """Anchors per location on each level, fine to coarse; 3 each in the paper's FPN."""
        return [len(anchors) for anchors in self.cell_anchors]

    @property
    @torch.jit.unused
    def num_cell_anchors(self) -> list[int]:
        """Detectron2's other name for :attr:`num_anchors`."""
        return self.num_anchors

    def forward(self, features: list[torch.Tensor]) -> list[Boxes]:
        """Anchors of every level; of the maps, only sizes and device are used.

        Args:
            features: (N, C, H_i, W_i) maps of the configured levels, fine to coarse.

        Returns:
            One Boxes per level, (H_i W_i A_i, 4) float32 XYXY in pixels of the network input,
            ordered by row, column, anchor (sizes outermost). Anchors across the border are kept
            (paper, Sec. 4.1). The tensors are shared with later calls: do not modify them.

        Raises:
            ValueError: the numbers of maps and levels differ.
        """
        if len(features) != len(self.strides):
            raise ValueError(
                f"anchors are configured for {len(self.strides)} levels, got {len(features)} "
                "feature maps; MODEL.RPN.IN_FEATURES and the strides must belong together"
            )
        if torch.jit.is_scripting():
            return [Boxes(level_anchors) for level_anchors in self._grid_anchors(features)]
        return self._cached_anchors(features)

    @torch.jit.unused
    def _cached_anchors(self, features: list[torch.Tensor]) -> list[Boxes]:
        if records_a_graph():
            # Sizes are symbolic there, not cache keys.
            return [Boxes(level_anchors) for level_anchors in self._grid_anchors(features)]
        key = (features[0].device, *[f.shape[2:] for f in features])
        anchors = self.cache.get(key, lambda: self._grid_anchors(features))
        return [_boxes(level_anchors) for level_anchors in anchors]

    def _grid_anchors(self, features: list[torch.Tensor]) -> list[torch.Tensor]:
        grid_anchors: list[torch.Tensor] = []
        for feature, stride, cell in zip(  # noqa: B905 (TorchScript)
            features, self.strides, self.cell_anchors
        ):
            height, width = feature.shape[-2:]
            x = _centres(width, stride, self.offset, feature.device)
            y = _centres(height, stride, self.offset, feature.device)
            centre_y, centre_x = torch.meshgrid(y, x, indexing="ij")
            centres = torch.stack((centre_x, centre_y, centre_x, centre_y), dim=-1)  # (H, W, 4)
            boxes = torch.tensor(cell, dtype=torch.float32, device=feature.device)  # (A, 4)
            grid_anchors.append((centres[:, :, None, :] + boxes).reshape(-1, 4))
        return grid_anchors


def _boxes(tensor: torch.Tensor) -> Boxes:
    # Boxes(tensor) without its conversions and checks, which would dominate the time.
    boxes = Boxes.__new__(Boxes)
    boxes.tensor = tensor
    return boxes


class _LeastRecentlyUsed:
    """Cache of recent anchor grids. A separate class, which TorchScript ignores."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.entries: collections.OrderedDict[tuple, list[torch.Tensor]] = collections.OrderedDict()

    def get(self, key: tuple, make: Callable[[], list[torch.Tensor]]) -> list[torch.Tensor]:
        if key not in self.entries:
            # A tensor created in inference mode could not be used in training.
            with torch.inference_mode(False):
                self.entries[key] = make()
            if len(self.entries) > self.capacity:
                self.entries.popitem(last=False)
        self.entries.move_to_end(key)
        return self.entries[key]


def cell_anchors(sizes: Sequence[float], aspect_ratios: Sequence[float]) -> list[list[float]]:
    """The anchors of one location, XYXY around (0, 0): for each size, for each ratio.

    >>> cell_anchors([32], [1.0, 4.0])
    [[-16.0, -16.0, 16.0, 16.0], [-8.0, -32.0, 8.0, 32.0]]
    """
    anchors = []
    for size in sizes:
        for ratio in aspect_ratios:
            width = math.sqrt(size**2 / ratio)
            height = ratio * width
            anchors.append([-width / 2, -height / 2, width / 2, height / 2])
    return anchors


def _centres(count: int, stride: float, offset: float, device: torch.device) -> torch.Tensor:
    # In float64, so that an offset such as 0.3 is rounded once.
    steps = torch.arange(count, dtype=torch.float64, device=device)
    return (steps * stride + offset * stride).to(torch.float32)


def _per_level(
    values: Sequence[Sequence[float]] | Sequence[float], strides: Sequence[float], key: str
) -> list[list[float]]:
    """One list of positive numbers per level; a single list is repeated for all."""
    yaml_key = f"MODEL.ANCHOR_GENERATOR.{key}"
    needed = (
        f"{yaml_key} needs one list of positive numbers per level (e.g. [[32], [64]] for two "
        "levels) or a single list for all levels"
    )
    lists: list = [values] if _is_positive_list(values) else list(values)
    if not lists or not all(_is_positive_list(v) for v in lists):
        raise ValueError(f"{needed}, got {values}")
    if len(lists) not in (1, len(strides)):
        raise ValueError(
            f"{needed}; got {len(lists)} lists {values} for {len(strides)} levels with strides "
            f"{[int(s) if s == int(s) else s for s in strides]}: change {yaml_key} or "
            "MODEL.RPN.IN_FEATURES"
        )
    per_level = [[float(number) for number in v] for v in lists]
    return per_level * len(strides) if len(per_level) == 1 else per_level


def _of_levels(
    sizes: Mapping[str, Sequence[float]], strides: Sequence[float]
) -> list[Sequence[float]]:
    names = [map_name(stride) for stride in strides]
    if any(name not in sizes for name in names):
        raise ValueError(
            f"MODEL.FPN_EXT.ANCHOR_SIZES needs a list of sizes for each of the levels {names}, "
            f"got {dict(sizes)}"
        )
    return [sizes[name] for name in names]


def _is_positive_list(value: object) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and len(value) > 0
        and all(_is_positive(number) for number in value)
    )


def _is_positive(number: object) -> bool:
    return (
        isinstance(number, numbers.Real)  # NumPy's numbers, too
        and not isinstance(number, bool)
        and math.isfinite(number)
        and float(number) > 0
    )
