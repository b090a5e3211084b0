"""Where two widely copied implementations depart from the paper, each departure by a name.

=====================  ===============  =================================
departure              easy-fpn         jwyang/fpn.pytorch
=====================  ===============  =================================
no 3x3 on P5           the same         in ``JwyangPyramid``
3x3 in the recursion   -                ``SmoothedRecursionPyramid``
bilinear upsampling    -                ``BilinearPyramid``
all of these           -                ``JwyangPyramid``
ln for log2 in Eq. 1   -                ``NaturalLogRule``
rounding in Eq. 1      -                ``RoundedRule``
both                   -                ``RoundedNaturalLogRule``
limits per level       ``PerLevelRPN``  -
=====================  ===============  =================================

"No 3x3 on P5" is ``UnsmoothedTopPyramid``. The sources are ``model.py`` and
``rpn/region_proposal_network.py`` of github.com/potterhsu/easy-fpn.pytorch (commit 9f5816f) and
``lib/model/fpn/fpn.py`` of github.com/jwyang/fpn.pytorch (commit 97fb94f). What else they do
differently can be said in Detectron2's keys: ``configs/variants/voc/``.
"""

import math
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from detectron2.config import configurable
from detectron2.modeling import BACKBONE_REGISTRY, PROPOSAL_GENERATOR_REGISTRY
from detectron2.structures import Boxes, Instances
from torch import nn

from ..modeling.fpn import FeaturePyramid
from ..modeling.level_rules import LEVEL_RULE_REGISTRY, PaperRule
from ..modeling.rpn import PyramidRPN
from .between_levels import check_several
from .upsampling import BilinearPyramid


@BACKBONE_REGISTRY.register()
class UnsmoothedTopPyramid(FeaturePyramid):
    """:class:`FeaturePyramid` without a 3x3 convolution on the coarsest level: P5 = 1x1(C5).

    The paper appends one "on each merged map" (Sec. 3) "to reduce the aliasing effect of
    upsampling"; P5 is not merged with anything, and easy-fpn.pytorch and fpn.pytorch leave it out.
    A top block that reads P5 reads the 1x1 convolution's output. Arguments, keys and parameter
    names are FeaturePyramid's, less ``fpn_output{k}`` of the coarsest level.
    """

    @configurable
    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        _leave_out_top_output(self)


@BACKBONE_REGISTRY.register()
class SmoothedRecursionPyramid(FeaturePyramid):
    """:class:`FeaturePyramid` with the 3x3 convolutions inside the recursion.

    The map that is upsampled is the level itself, P_k = 3x3(1x1(C_k) + up(P_{k+1})); in the paper
    it is the merged map before its 3x3 convolution. P2 is three convolutions further from C5.
    Arguments, keys and parameter names are FeaturePyramid's; checkpoints of either load into the
    other.

    Raises:
        ValueError: as FeaturePyramid; a single level.
    """

    @configurable
    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        check_several(self._out_features[: len(self.in_features)], type(self).__name__)

    def levels_on_maps(self, maps: list[torch.Tensor]) -> list[torch.Tensor]:
        """As :meth:`FeaturePyramid.levels_on_maps`, each level made of the next coarser one."""
        levels: list[torch.Tensor] = []
        coarser: torch.Tensor | None = None
        for lateral, output in zip(self.laterals, self.outputs):  # noqa: B905 (TorchScript)
            merged = lateral(maps.pop())
            if coarser is not None:
                merged = self.top_down(merged, coarser)
            coarser = output(merged)
            levels.insert(0, coarser)
        return levels


@BACKBONE_REGISTRY.register()
class JwyangPyramid(SmoothedRecursionPyramid, BilinearPyramid):
    """The pyramid of jwyang's fpn.pytorch.

    Three departures at once: the 3x3 convolutions are inside the recursion
    (:class:`SmoothedRecursionPyramid`), there is none on the coarsest level
    (:class:`UnsmoothedTopPyramid`), and upsampling is bilinear
    (:class:`~fpn_ext.variants.upsampling.BilinearPyramid`).

    Raises:
        ValueError: as FeaturePyramid; a single level; a ``fuse_type`` other than ``"sum"``.
    """

    @configurable
    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        _leave_out_top_output(self)


def _leave_out_top_output(pyramid: FeaturePyramid) -> None:
    top = pyramid.outputs[0]
    for name in [name for name, child in pyramid.named_children() if child is top]:
        delattr(pyramid, name)
    pyramid.outputs = [nn.Identity(), *pyramid.outputs[1:]]


@LEVEL_RULE_REGISTRY.register()
class NaturalLogRule(PaperRule):
    """Eq. 1 with the natural logarithm: k = floor(k0 + ln(sqrt(w h) / 224)).

    A level is a factor of e = 2.718 in size instead of 2: P4 gets boxes of 224 to 609 px. Arguments
    and errors are PaperRule's.

    >>> sides = torch.tensor([82.0, 83.0, 223.0, 224.0, 608.0, 609.0])
    >>> boxes = torch.stack([0 * sides, 0 * sides, sides, sides], dim=1)
    >>> NaturalLogRule([4, 8, 16, 32], 224, 4)(boxes).tolist()
    [0, 1, 1, 2, 2, 3]
    """

    def bounds(self) -> list[float]:
        """Minimum box size in pixels for each map but the finest."""
        return [self.canonical_box_size * math.exp(k - self.canonical_level) for k in self.firsts]

    def forward(self, boxes: torch.Tensor) -> torch.Tensor:
        """(R, 4) XYXY boxes -> (R,) int64 map indices."""
        boxes = boxes.to(torch.promote_types(boxes.dtype, torch.float32))
        size = torch.sqrt((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))
        level = torch.floor(self.canonical_level + torch.log(size / self.canonical_box_size))
        level = torch.clamp(level, min=self.min_level, max=self.max_level)
        level = torch.nan_to_num(level, nan=float(self.min_level))  # a box without an area
        return self._index_of(level.to(torch.int64))


@LEVEL_RULE_REGISTRY.register()
class RoundedNaturalLogRule(NaturalLogRule):
    """The rule of jwyang's fpn.pytorch: k = round(4 + ln(sqrt(w h) / 224)).

    P4 gets boxes of 136 to 369 px. (There a box of corners x1, x2 is x2 - x1 + 1 px wide, and half
    a level is rounded to the even one; here it is x2 - x1 px, and half a level is rounded up.)

    >>> sides = torch.tensor([49.9, 50.0, 135.8, 135.9, 369.3, 369.4])
    >>> boxes = torch.stack([0 * sides, 0 * sides, sides, sides], dim=1)
    >>> RoundedNaturalLogRule([4, 8, 16, 32], 224, 4)(boxes).tolist()
    [0, 1, 1, 2, 2, 3]
    """

    def __init__(self, strides: Sequence[float], canonical_box_size: float, canonical_level: int):
        # round(x) is floor(x + 1/2), and half a level is a factor of sqrt(e).
        super().__init__(strides, canonical_box_size / math.sqrt(math.e), canonical_level)


@PROPOSAL_GENERATOR_REGISTRY.register()
class PerLevelRPN(PyramidRPN):
    """:class:`PyramidRPN` whose limit on proposals holds for each level, as in easy-fpn.pytorch.

    NMS runs within each level in both. PyramidRPN then keeps the ``MODEL.RPN.POST_NMS_TOPK_*``
    best of all levels together; this keeps as many of each level, up to 5000 of P2 to P6 for 1000.
    Levels do not compete. Arguments and parameter names are PyramidRPN's.
    """

    def predict_proposals(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[torch.Tensor],
        pred_anchor_deltas: list[torch.Tensor],
        image_sizes: list[tuple[int, int]],
    ) -> list[Instances]:
        """As the parent's, at most ``post_nms_topk`` of each level; highest score first."""
        of_levels = []
        levels = zip(anchors, pred_objectness_logits, pred_anchor_deltas, strict=True)
        for i, (level_anchors, logits, deltas) in enumerate(levels):
            found = super().predict_proposals([level_anchors], [logits], [deltas], image_sizes)
            for proposals in found if self.levels else ():
                level = torch.full((len(proposals),), self.levels[i], device=logits.device)
                proposals.proposal_level = level
            of_levels.append(found)
        together = [Instances.cat(list(of_image)) for of_image in zip(*of_levels, strict=True)]
        return [p[p.objectness_logits.argsort(descending=True)] for p in together]

    def __prepare_scriptable__(self) -> NoReturn:
        raise ValueError(
            "PerLevelRPN cannot be scripted; choose MODEL.PROPOSAL_GENERATOR.NAME PyramidRPN, "
            "which has the same parameters"
        )
