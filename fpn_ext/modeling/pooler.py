"""RoI pooling from the pyramid level that matches a box's size (Lin et al. 2017, Sec. 4.2).

Three implementations: ``per_level``, the reference, calls torchvision's operator once per level and
supports everything. Two for RoIAlign are equal to it within float32 rounding: ``weighted_rows``
(fpn_ext/kernels/roi_align_cpu.py) on CPU, several times as fast, and ``fused``
(fpn_ext/kernels/roi_align_cuda.py) on CUDA, one Triton kernel for all levels.
"""

import logging
import math
from collections.abc import Sequence

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes
from torch import nn
from torchvision.ops import roi_align, roi_pool

from ..exporting import records_a_graph
from ..kernels import roi_align_cpu, roi_align_cuda
from ..keys import declare, own_keys
from ..levels import LevelError, nearest_level
from ..names import did_you_mean
from ..registries.lookup import look_up
from .level_rules import LEVEL_RULE_REGISTRY

declare(
    "MODEL.FPN_EXT.CANONICAL_LEVEL",
    4,
    "k0 of Eq. 1: the level from which a box of CANONICAL_BOX_SIZE is pooled.",
    "PyramidROIHeads",
)
declare(
    "MODEL.FPN_EXT.CANONICAL_BOX_SIZE",
    224,
    "The 224 of Eq. 1: side in pixels of the square box that goes to CANONICAL_LEVEL.",
    "PyramidROIHeads",
)
declare(
    "MODEL.FPN_EXT.LEVEL_RULE",
    "PaperRule",
    "Which level a box is pooled from: PaperRule (Eq. 1), RoundedRule, LongerSideRule, "
    "StrideRule (for any strides), NaturalLogRule, RoundedNaturalLogRule, or a registered rule "
    "of your own.",
    "PyramidROIHeads",
)
declare(
    "MODEL.FPN_EXT.NUMERICS",
    "fast",
    "exact: bit-equal to Detectron2 on CPU. fast: equal within rounding error, and quickest on "
    "this processor for this model; the log says what was chosen.",
    "training",
    "inference",
    "PyramidROIHeads",
)
declare(
    "MODEL.FPN_EXT.POOLER_IMPLEMENTATION",
    "auto",
    "How boxes are pooled: per_level (torchvision's operator, bit-equal to Detectron2's "
    "pooler), weighted_rows (RoIAlign on CPU, fast), fused (RoIAlign on CUDA, one Triton "
    "kernel), or auto: the fast one wherever it can be used; with NUMERICS exact, "
    "per_level.",
    "PyramidROIHeads",
)

logger = logging.getLogger(__name__)

IMPLEMENTATIONS = ("auto", "per_level", "weighted_rows", "fused")
POOLER_TYPES = ("ROIAlignV2", "ROIAlign", "ROIPool")

# Larger coordinates, in pixels, are treated as infinite: no input image is this large, and
# RoIAlign's adaptive sampling of such a box would take hours.
MAX_COORDINATE = 2.0**15


class LevelMappedROIPooler(nn.Module):
    """Pools each box from the one level chosen by a rule, by default Eq. 1 of the paper.

    Same arguments, result and order as Detectron2's ROIPooler.

    Degenerate boxes have a defined result: if a coordinate is NaN, infinite or beyond
    ``MAX_COORDINATE``, or if x1 < x0 or y1 < y0, the row is zero and no gradient flows; they
    are counted in ``num_degenerate`` (and, on CPU, logged once). A zero-area box goes to the finest
    level, and a box outside the image is sampled where it lies; both give the same as torchvision's
    operator.

    Args:
        output_size: height and width of the pooled features, one number or two.
        scales: 1 / stride of each level, fine to coarse.
        sampling_ratio: samples per bin and side of RoIAlign; 0 for adaptive (ceil of the bin's
            size). Not used by ROIPool.
        pooler_type: ``"ROIAlignV2"`` (RoIAlign with half-pixel-correct coordinates),
            ``"ROIAlign"`` (without), ``"ROIPool"`` (max pooling on rounded bins, as in the paper).
        canonical_box_size: the 224 of Eq. 1, in pixels of the network input.
        canonical_level: k0 of Eq. 1.
        implementation: ``"per_level"`` (bit-equal to Detectron2's ROIPooler), ``"weighted_rows"``
            (RoIAlign on CPU, else an error), ``"fused"`` (RoIAlign of float32, float16 or bfloat16
            maps on CUDA, with Triton, else an error), or ``"auto"``: the fast one on CPU and CUDA
            if supported, else ``"per_level"``. The keyword's default is ``"per_level"``, bit-equal
            to Detectron2's ROIPooler with the same arguments; a config's
            ``MODEL.FPN_EXT.POOLER_IMPLEMENTATION`` defaults to ``"auto"``.
        level_rule: name in :data:`fpn_ext.modeling.level_rules.LEVEL_RULE_REGISTRY`.

    Raises:
        ValueError: an unknown ``pooler_type``, ``implementation`` or ``level_rule``, levels not
            from fine to coarse, strides the rule does not support, sizes that are not positive.
    """

    num_degenerate: torch.Tensor

    @configurable
    def __init__(
        self,
        output_size: int | Sequence[int],
        scales: Sequence[float],
        sampling_ratio: int,
        pooler_type: str,
        canonical_box_size: float = 224,
        canonical_level: int = 4,
        implementation: str = "per_level",
        level_rule: str = "PaperRule",
    ):
        super().__init__()
        size = (output_size, output_size) if isinstance(output_size, int) else tuple(output_size)
        if len(size) != 2 or not all(isinstance(side, int) and side >= 1 for side in size):
            raise ValueError(
                "POOLER_RESOLUTION must be one or two (height, width) whole numbers of at least "
                f"1, got {output_size}"
            )
        if pooler_type not in POOLER_TYPES:
            raise ValueError(
                f"POOLER_TYPE: {pooler_type!r} is not among the types of this pooler; "
                + did_you_mean(pooler_type, POOLER_TYPES)
            )
        if implementation not in IMPLEMENTATIONS:
            raise ValueError(
                f"MODEL.FPN_EXT.POOLER_IMPLEMENTATION must be one of {IMPLEMENTATIONS}, "
                f"got {implementation!r}"
            )
        if sampling_ratio < 0:
            raise ValueError(
                f"POOLER_SAMPLING_RATIO must be 0 (adaptive) or more, got {sampling_ratio}"
            )
        if not (math.isfinite(canonical_box_size) and canonical_box_size > 0):
            raise ValueError(
                "MODEL.FPN_EXT.CANONICAL_BOX_SIZE must be a positive number of pixels, "
                f"got {canonical_box_size}"
            )
        if not all(scale > 0 for scale in scales):
            raise ValueError(f"scales (1 / stride) must be positive, got {list(scales)}")
        rule = look_up(LEVEL_RULE_REGISTRY, level_rule, "MODEL.FPN_EXT.LEVEL_RULE")
        strides = [_stride(scale) for scale in scales]
        try:
            self.rule = rule(strides, canonical_box_size, canonical_level)
        except ValueError as error:
            raise LevelError(f"MODEL.ROI_HEADS.IN_FEATURES: {error}") from None

        self.output_size = (size[0], size[1])
        self.scales = [float(scale) for scale in scales]
        self.sampling_ratio = sampling_ratio
        self.pooler_type = pooler_type
        self.implementation = implementation
        self.levels = [nearest_level(stride) for stride in strides]
        self.canonical_box_size = float(canonical_box_size)
        self.canonical_level = canonical_level
        self.max_coordinate = MAX_COORDINATE  # TorchScript sees no module constants
        # On the boxes' device, so that counting never synchronises with the GPU.
        self.register_buffer("num_degenerate", torch.zeros((), dtype=torch.int64), persistent=False)

    @classmethod
    def from_config(
        cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec], branch: str = "ROI_BOX_HEAD"
    ) -> dict:
        """``branch`` names the node with the POOLER_* keys, e.g. ``"ROI_MASK_HEAD"``."""
        node, own = cfg.MODEL[branch], own_keys(cfg)
        implementation = own.POOLER_IMPLEMENTATION
        if own.NUMERICS == "exact" and implementation == "auto":
            implementation = "per_level"
        return {
            "output_size": node.POOLER_RESOLUTION,
            "scales": [1.0 / input_shape[name].stride for name in cfg.MODEL.ROI_HEADS.IN_FEATURES],
            "sampling_ratio": node.POOLER_SAMPLING_RATIO,
            "pooler_type": node.POOLER_TYPE,
            "canonical_box_size": own.CANONICAL_BOX_SIZE,
            "canonical_level": own.CANONICAL_LEVEL,
            "implementation": implementation,
            "level_rule": own.LEVEL_RULE,
        }

    def forward(self, x: list[torch.Tensor], box_lists: list[Boxes]) -> torch.Tensor:
        """Pool all boxes of all images.

        Args:
            x: (N, C, H_i, W_i) feature maps of the levels, fine to coarse.
            box_lists: the boxes of each of the N images, XYXY in pixels of the network input.

        Returns:
            (R, C, output height, output width) in the dtype of ``x``: the boxes of the first
            image in order, then those of the second, and so on. R and N may be 0.

        Raises:
            ValueError: the numbers of maps and levels differ, or of box lists and images; maps the
                chosen ``implementation`` does not support.
        """
        if len(x) != len(self.scales):
            raise ValueError(
                f"the pooler is configured for {len(self.scales)} levels, got {len(x)} maps"
            )
        if len(box_lists) != x[0].shape[0]:
            raise ValueError(
                f"got {len(box_lists)} lists of boxes for a batch of {x[0].shape[0]} images"
            )
        if len(box_lists) == 0:
            return x[0].new_zeros((0, x[0].shape[1], self.output_size[0], self.output_size[1]))

        rois = self._to_rois(box_lists)
        if torch.jit.is_scripting():
            return self._pool_per_level(x, rois)
        implementation = self._choose(x)
        if implementation == "per_level":
            return self._pool_per_level(x, rois)
        return self._pool_all_levels(implementation, x, rois)

    def _pool_per_level(self, x: list[torch.Tensor], rois: torch.Tensor) -> torch.Tensor:
        if len(x) == 1:
            return self._pool(x[0], rois, self.scales[0])
        # Each level pools its own boxes; rows are scattered back to the boxes' order.
        #   levels  3 2 3      rows of P2: 1       pooled[1]    <- P2
        #   maps    1 0 1      rows of P3: 0 2     pooled[0, 2] <- P3
        map_index = self.rule(rois[:, 1:])
        pooled = x[0].new_zeros(
            (rois.shape[0], x[0].shape[1], self.output_size[0], self.output_size[1])
        )
        for i, (features, scale) in enumerate(zip(x, self.scales)):  # noqa: B905 (TorchScript)
            rows = torch.nonzero(map_index == i).squeeze(1)
            pooled.index_put_((rows,), self._pool(features, rois[rows], scale))
        return pooled

    @torch.jit.unused
    def _choose(self, x: list[torch.Tensor]) -> str:
        """The implementation for these maps: never ``auto``."""
        if self.implementation == "per_level":
            return "per_level"
        if self.implementation == "auto":
            fast = "fused" if x[0].is_cuda else "weighted_rows"
            return "per_level" if self._obstacle(fast, x) else fast
        obstacle = self._obstacle(self.implementation, x)
        if obstacle:
            raise ValueError(
                f"MODEL.FPN_EXT.POOLER_IMPLEMENTATION {self.implementation} cannot serve "
                f"{obstacle}; auto falls back to per_level there"
            )
        return self.implementation

    @torch.jit.unused
    def _obstacle(self, implementation: str, x: list[torch.Tensor]) -> str | None:
        """What a fast implementation does not support, in words; None if it can be used."""
        if self.pooler_type == "ROIPool":
            return "POOLER_TYPE ROIPool"
        if records_a_graph():
            return "tracing"
        if implementation == "weighted_rows":
            if x[0].device.type != "cpu":
                return "maps on another device than the CPU"
            return None
        if not (x[0].is_cuda or roi_align_cuda.INTERPRETED):
            return "maps on another device than CUDA"
        if x[0].dtype not in roi_align_cuda.DTYPES or any(m.dtype != x[0].dtype for m in x):
            return "maps that are not all float32, all float16 or all bfloat16"
        if len(x) > roi_align_cuda.MOST_LEVELS:
            return f"more than {roi_align_cuda.MOST_LEVELS} levels"
        return roi_align_cuda.missing()

    @torch.jit.unused
    def _pool_all_levels(
        self, implementation: str, x: list[torch.Tensor], rois: torch.Tensor
    ) -> torch.Tensor:
        module = roi_align_cuda if implementation == "fused" else roi_align_cpu
        return module.roi_align(
            x,
            rois.to(torch.promote_types(x[0].dtype, torch.float32)),
            self.rule(rois[:, 1:]),
            self.scales,
            self.output_size,
            self.sampling_ratio,
            self.pooler_type == "ROIAlignV2",
        )

    def assign(self, boxes: torch.Tensor) -> torch.Tensor:
        """The level k each box is pooled from: (R, 4) -> (R,) int64.

        If the map's stride is not a power of two, the nearest level.
        """
        return torch.tensor(self.levels, device=boxes.device)[self.rule(boxes)]

    def _to_rois(self, box_lists: list[Boxes]) -> torch.Tensor:
        """(R, 5) image index and XYXY, with degenerate boxes moved off every map."""
        boxes = torch.cat([b.tensor for b in box_lists], dim=0)
        image_index = torch.cat(
            [torch.full_like(b.tensor[:, :1], i) for i, b in enumerate(box_lists)], dim=0
        )
        degenerate = ~(
            (boxes.abs() <= self.max_coordinate).all(dim=1)  # False for NaN, too
            & (boxes[:, 2] >= boxes[:, 0])
            & (boxes[:, 3] >= boxes[:, 1])
        )
        self.num_degenerate = self.num_degenerate.to(boxes.device) + degenerate.sum()
        if not torch.jit.is_scripting():
            self._report(degenerate)
        # All samples of a box there are outside, for which the operators return zeros.
        nowhere = boxes.new_full((4,), -self.max_coordinate)
        boxes = torch.where(degenerate[:, None], nowhere, boxes)
        return torch.cat((image_index, boxes), dim=1)

    @torch.jit.unused
    def _report(self, degenerate: torch.Tensor) -> None:
        if degenerate.is_cuda or records_a_graph():
            return  # reading the count would stall the GPU; see num_degenerate
        if self.num_degenerate == degenerate.sum() > 0:
            logger.warning(
                "%d of %d boxes to pool are not boxes (NaN, infinite or beyond %d px, or "
                "x1 < x0, y1 < y0); their features are zero. Said once; num_degenerate counts on.",
                int(degenerate.sum()),
                len(degenerate),
                int(MAX_COORDINATE),
            )

    def _pool(self, features: torch.Tensor, rois: torch.Tensor, scale: float) -> torch.Tensor:
        # At least float32: in half precision a coordinate of 1000 px is off by up to 0.5 px, in
        # bfloat16 by up to 4 px.
        dtype = torch.promote_types(features.dtype, torch.float32)
        maps, rois = features.to(dtype), rois.to(dtype)
        if self.pooler_type == "ROIPool":
            pooled = roi_pool(maps, rois, self.output_size, scale)
        else:
            pooled = roi_align(
                maps,
                rois,
                self.output_size,
                scale,
                self.sampling_ratio,
                self.pooler_type == "ROIAlignV2",
            )
        return pooled.to(features.dtype)


class ContiguousROIPooler(LevelMappedROIPooler):
    """:class:`LevelMappedROIPooler` whose result is contiguous, (R, C, H, W) in memory.

    The fast implementations leave the channels of a cell side by side, which saves a head that can
    read that a copy; one that calls ``.view`` needs this one.
    """

    @torch.jit.unused
    def _pool_all_levels(
        self, implementation: str, x: list[torch.Tensor], rois: torch.Tensor
    ) -> torch.Tensor:
        return super()._pool_all_levels(implementation, x, rois).contiguous()


def _stride(scale: float) -> float:
    # 1/stride passes through YAML and Detectron2 as a float: 1 / (1/49) is not 49.
    stride = 1.0 / scale
    return float(round(stride)) if math.isclose(stride, round(stride), rel_tol=1e-6) else stride
