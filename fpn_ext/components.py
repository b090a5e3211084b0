"""Every module that registers a component with Detectron2.

Importing this one is what ``import fpn_ext`` comes to: :mod:`fpn_ext.registration` imports it as
soon as Detectron2's registries are there, which may be half-way through the import of
``detectron2.engine``; so nothing here needs more of Detectron2 than its models.
"""

# ruff: noqa: E402, F401

from . import _d2_compat

_d2_compat.apply()

import detectron2.modeling  # the registries, before anything of ours

from .modeling.anchors import PyramidAnchorGenerator
from .modeling.fpn import FeaturePyramid
from .modeling.roi_heads import ChunkedROIHeads, PyramidROIHeads
from .modeling.rpn import PyramidRPN
from .variants.ablations import BottomUpPyramid, FinestLevelPyramid, TopDownPyramid
from .variants.all_levels import AllLevelsROIHeads
from .variants.bifpn import BiFPN
from .variants.lateral_norms import NormalizedLateralPyramid
from .variants.path_aggregation import PathAggregationPyramid
from .variants.unshared import UnsharedROIHeads, UnsharedRPNHead
from .variants.upsampling import BilinearPyramid, LearnedUpsamplingPyramid
from .variants.varied_anchors import VariedAnchorsRPNHead
