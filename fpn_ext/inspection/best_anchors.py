"""The best anchor of a box, without an exhaustive search.

The overlap of a box with an anchor of a given shape is the product of an overlap along x, which
depends only on the anchor's column, and one along y. Each is largest where the centres are nearest
and does not increase with distance, and the IoU increases with the overlap. So among the anchors of
one shape on one level, the best is in the nearest valid column and row, for any sizes.
``tests/test_best_anchors.py`` compares with an exhaustive search.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import (
    ANCHOR_GENERATOR_REGISTRY,
    BACKBONE_REGISTRY,
    build_anchor_generator,
    build_backbone,
)
from torch import nn

from ..data.training_boxes import BoxesAtSides, ResizedBoxes, portions
from ..registries.lookup import look_up

# (height, width) of an image -> (rows, columns) of each level's map.
MapSizes = Callable[[int, int], list[tuple[int, int]]]


@dataclass(frozen=True)
class AnchorLevel:
    """The anchors of one level.

    Attributes:
        name: of its feature map, as in ``MODEL.RPN.IN_FEATURES``.
        stride: in pixels of the network input.
        offset: of the first centre, as a fraction of the stride.
        shapes: (A, 4) float64, the anchors of one location, XYXY around its centre.
    """

    name: str
    stride: float
    offset: float
    shapes: np.ndarray

    @property
    def sizes(self) -> list[float]:
        """Square roots of the distinct areas, ascending."""
        return sorted(set(np.sqrt(np.prod(self._sides(), axis=1)).round(3).tolist()))

    @property
    def aspect_ratios(self) -> list[float]:
        """Distinct height/width ratios, ascending."""
        sides = self._sides()
        return sorted(set((sides[:, 1] / sides[:, 0]).round(3).tolist()))

    def _sides(self) -> np.ndarray:
        return self.shapes[:, 2:] - self.shapes[:, :2]

    def nearest(
        self,
        boxes: np.ndarray,
        map_sizes: np.ndarray,
        image_sizes: np.ndarray,
        boundary_thresh: float = -1,
    ) -> np.ndarray:
        """The anchor of each shape that overlaps each box most.

        Args:
            boxes: (M, 4) XYXY in pixels of the network input.
            map_sizes: (M, 2) rows and columns of this level's feature map of each box's image.
            image_sizes: (M, 2) height and width of the image before padding.
            boundary_thresh: ``MODEL.RPN.BOUNDARY_THRESH``: if 0 or more, anchors that extend that
                far or farther beyond the image are excluded.

        Returns:
            (M, A, 4) XYXY; NaN where no anchor of the shape lies within the boundary.
        """
        columns, rows = (
            self._nearest_along(
                boxes[:, axis, None],
                boxes[:, axis + 2, None],
                map_sizes[:, 1 - axis, None],
                image_sizes[:, 1 - axis, None],
                self.shapes[None, :, [axis, axis + 2]],
                boundary_thresh,
            )
            for axis in (0, 1)
        )
        return np.stack([columns, rows, columns, rows], axis=2) + self.shapes

    def _nearest_along(
        self,
        low: np.ndarray,
        high: np.ndarray,
        count: np.ndarray,
        length: np.ndarray,
        shape: np.ndarray,
        boundary_thresh: float,
    ) -> np.ndarray:
        """(M, A) centres along one axis."""
        middle = (low + high - shape.sum(axis=2)) / 2
        first: np.ndarray = np.zeros_like(middle)
        last = first + count - 1
        if boundary_thresh >= 0:  # as in Boxes.inside_box: >= below, < above
            least = (-boundary_thresh - shape[..., 0]) / self.stride - self.offset
            most = (length + boundary_thresh - shape[..., 1]) / self.stride - self.offset
            first, last = np.maximum(first, np.ceil(least)), np.minimum(last, np.ceil(most) - 1)
        step = np.clip(np.rint(middle / self.stride - self.offset), first, last)
        return np.where(first <= last, (step + self.offset) * self.stride, np.nan)


def iou(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Elementwise IoU of (..., 4) XYXY boxes; 0 for NaN.

    >>> float(iou(np.array([0, 0, 2, 2]), np.array([1, 0, 3, 2])))  # 2 of 6 pixels
    0.3333333333333333
    """
    # Coordinate by coordinate: sums along an axis of two are many times as slow.
    x0, y0, x1, y1 = (boxes[..., axis] for axis in range(4))
    left, top, right, bottom = (others[..., axis] for axis in range(4))
    width = (np.minimum(x1, right) - np.maximum(x0, left)).clip(min=0)
    overlap = width * (np.minimum(y1, bottom) - np.maximum(y0, top)).clip(min=0)
    areas = (x1 - x0) * (y1 - y0) + (right - left) * (bottom - top)
    return np.nan_to_num(overlap / (areas - overlap))


@dataclass(frozen=True)
class Best:
    """Which anchor of each of M boxes is the best.

    Attributes:
        iou: (M,) float64; 0 if no anchor overlaps.
        level: (M,) uint16, its level index; ties go to the finest level.
        shape: (M,) uint16, the index of its shape among those of the level.
    """

    iou: np.ndarray
    level: np.ndarray
    shape: np.ndarray


class AnchorGrid:
    """All anchors of a model, for any image size.

    Args:
        levels: fine to coarse.
        map_sizes: (height, width) of an image -> (rows, columns) of each level's map.
        boundary_thresh: ``MODEL.RPN.BOUNDARY_THRESH``.
    """

    def __init__(
        self, levels: Sequence[AnchorLevel], map_sizes: MapSizes, boundary_thresh: float = -1
    ):
        self.levels = list(levels)
        self.boundary_thresh = boundary_thresh
        self._map_sizes = map_sizes

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "AnchorGrid":
        """The anchors of a config's model; no weights are read.

        Raises:
            ValueError: it has no RPN, or an unsupported kind of anchors; a name is not registered,
                or a level does not exist.
        """
        model = cfg.MODEL
        look_up(BACKBONE_REGISTRY, model.BACKBONE.NAME, "MODEL.BACKBONE.NAME")
        anchors = model.ANCHOR_GENERATOR.NAME
        look_up(ANCHOR_GENERATOR_REGISTRY, anchors, "MODEL.ANCHOR_GENERATOR.NAME")
        cfg = without_weights(cfg)
        if cfg.MODEL.META_ARCHITECTURE not in ("GeneralizedRCNN", "ProposalNetwork"):
            raise ValueError(
                "anchors are those of an RPN (MODEL.META_ARCHITECTURE GeneralizedRCNN or "
                f"ProposalNetwork), got {cfg.MODEL.META_ARCHITECTURE}"
            )
        if cfg.MODEL.PROPOSAL_GENERATOR.NAME == "PrecomputedProposals":
            raise ValueError(
                "MODEL.PROPOSAL_GENERATOR.NAME PrecomputedProposals has no anchors; ask for the "
                "config of the RPN that made the proposals"
            )
        backbone = build_backbone(cfg).eval().to("meta")  # shapes only, no values
        _drop_norms(backbone)
        shapes = backbone.output_shape()
        names = cfg.MODEL.RPN.IN_FEATURES
        missing = [name for name in names if name not in shapes]
        if missing:
            raise ValueError(
                f"MODEL.RPN.IN_FEATURES {list(names)}: {cfg.MODEL.BACKBONE.NAME} gives "
                f"{list(shapes)}, not {missing}"
            )
        generator = build_anchor_generator(cfg, [shapes[name] for name in names])
        return cls(
            levels_of(generator, names),
            _MapSizes(backbone, names, len(cfg.MODEL.PIXEL_MEAN)),
            cfg.MODEL.RPN.BOUNDARY_THRESH,
        )

    def with_levels(self, levels: Sequence[AnchorLevel]) -> "AnchorGrid":
        """The same grids with other anchors."""
        return AnchorGrid(levels, self._map_sizes, self.boundary_thresh)

    def map_sizes(self, image_sizes: np.ndarray) -> list[np.ndarray]:
        """(M, 2) heights and widths of images -> (M, 2) rows and columns for each level."""
        # One number for each size: sorting pairs is slow.
        packed = (image_sizes[:, 0].astype(np.int64) << 32) + image_sizes[:, 1]
        unique, inverse = np.unique(packed, return_inverse=True)
        found = [self._map_sizes(size >> 32, size & 0xFFFFFFFF) for size in unique.tolist()]
        table = np.array(found, dtype=np.int64).reshape(len(unique), len(self.levels), 2)
        return list(table[inverse.reshape(-1)].transpose(1, 0, 2))

    def best(self, resized: ResizedBoxes | BoxesAtSides) -> Best:
        """The best anchor of each box."""
        count = len(resized)
        best = Best(np.zeros(count), np.zeros(count, np.uint16), np.zeros(count, np.uint16))
        for portion in portions(count):
            of_portion = Best(best.iou[portion], best.level[portion], best.shape[portion])
            self._find_best(resized.rows(portion), of_portion)
        return best

    def _find_best(self, rows: ResizedBoxes, best: Best) -> None:
        every = np.arange(len(rows))
        for number, (level, sizes) in enumerate(
            zip(self.levels, self.map_sizes(rows.image_sizes), strict=True)
        ):
            anchors = level.nearest(rows.boxes, sizes, rows.image_sizes, self.boundary_thresh)
            overlaps = iou(rows.boxes[:, None], anchors)
            which = overlaps.argmax(axis=1)
            overlap = overlaps[every, which]
            better = overlap > best.iou
            best.iou[better], best.level[better] = overlap[better], number
            best.shape[better] = which[better]

    def anchors_of(self, best: Best, rows: ResizedBoxes) -> np.ndarray:
        """The anchors themselves: (M, 4) XYXY in pixels of the network input, NaN for none."""
        found = np.full((len(rows), 4), np.nan)
        for number, (level, sizes) in enumerate(
            zip(self.levels, self.map_sizes(rows.image_sizes), strict=True)
        ):
            here = np.flatnonzero((best.level == number) & (best.iou > 0))
            its = rows.rows(here)
            anchors = level.nearest(its.boxes, sizes[here], its.image_sizes, self.boundary_thresh)
            found[here] = anchors[np.arange(len(here)), best.shape[here]]
        return found


def without_weights(cfg: CfgNode) -> CfgNode:
    """A copy of a config whose model is built from random weights: no file is read."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.FPN_EXT.BOTTOM_UP_WEIGHTS = ""
    cfg.MODEL.FPN_EXT.KEEP_PIXELS = True  # they may be those of that file
    return cfg


def padded_size(backbone: Any, height: int, width: int) -> tuple[int, int]:
    """(H, W) of an image alone in its batch, as Detectron2 pads it for a backbone."""
    square = getattr(backbone, "padding_constraints", {}).get("square_size", 0)
    if square:  # Detectron2's main branch only
        height = width = square
    divisor = max(backbone.size_divisibility, 1)
    return math.ceil(height / divisor) * divisor, math.ceil(width / divisor) * divisor


def _drop_norms(module: nn.Module) -> None:
    """Norms leave shapes as they are, and take most of the time of a run on meta tensors."""
    for name, child in module.named_children():
        if type(child) in (nn.BatchNorm2d, FrozenBatchNorm2d):
            setattr(module, name, nn.Identity())
        else:
            _drop_norms(child)


def levels_of(generator: Any, names: Sequence[str]) -> list[AnchorLevel]:
    """The levels of PyramidAnchorGenerator, Detectron2's DefaultAnchorGenerator, or one like them.

    Raises:
        ValueError: unsupported kind of generator.
    """
    needed = ("cell_anchors", "strides", "offset")
    if not all(hasattr(generator, name) for name in needed) or generator.box_dim != 4:
        raise ValueError(
            f"MODEL.ANCHOR_GENERATOR.NAME {type(generator).__name__}: only anchors that are the "
            "same at every location and not rotated can be looked at (PyramidAnchorGenerator, "
            "DefaultAnchorGenerator)"
        )
    cells = [torch.as_tensor(cell).double().cpu().numpy() for cell in generator.cell_anchors]
    return [
        AnchorLevel(name, float(stride), float(generator.offset), cell)
        for name, stride, cell in zip(names, generator.strides, cells, strict=True)
    ]


class _MapSizes:
    """Sizes of a backbone's feature maps, found by running it on meta tensors.

    An image is padded as if alone in its batch. Larger images in the batch only add anchors beyond
    its border.
    """

    def __init__(self, backbone: Any, names: Sequence[str], channels: int):
        self.backbone = backbone
        self.channels = channels
        self.names = list(names)
        self.known: dict[tuple[int, int], list[tuple[int, int]]] = {}

    def __call__(self, height: int, width: int) -> list[tuple[int, int]]:
        padded = padded_size(self.backbone, height, width)
        if padded not in self.known:
            with torch.no_grad():
                maps = self.backbone(torch.zeros(1, self.channels, *padded, device="meta"))
            self.known[padded] = [tuple(maps[name].shape[-2:]) for name in self.names]
        return self.known[padded]
