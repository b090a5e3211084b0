"""Every module that registers a component with Detectron2.

:mod:`fpn_ext.registration` imports this module as soon as Detectron2's registries exist, possibly
halfway through the import of ``detectron2.engine``; so nothing here may import more of Detectron2
than its models.
"""

# ruff: noqa: E402, F401

from . import _d2_compat

_d2_compat.apply()

import detectron2.modeling  # the registries, before our components

from .modeling.anchors import PyramidAnchorGenerator
from .modeling.fpn import FeaturePyramid
from .modeling.mask_proposals import PyramidMaskProposals
from .modeling.roi_heads import ChunkedROIHeads, PyramidROIHeads
from .modeling.rpn import PyramidRPN
from .variants.ablations import (
    BottomUpPyramid,
    FinestLevelPyramid,
    TopDownPyramid,
    UnsmoothedPyramid,
)
from .variants.all_levels import AllLevelsROIHeads
from .variants.bifpn import BiFPN
from .variants.detectron2_pyramid import Detectron2Pyramid
from .variants.hierarchy import FeatureHierarchy, HierarchyRetinaNet
from .variants.image_pyramid import ImagePyramidRCNN
from .variants.lateral_norms import NormalizedLateralPyramid
from .variants.path_aggregation import PathAggregationPyramid
from .variants.peers import (
    JwyangPyramid,
    PerLevelRPN,
    SmoothedRecursionPyramid,
    UnsmoothedTopPyramid,
)
from .variants.unshared import UnsharedROIHeads, UnsharedRPNHead
from .variants.upsampling import BilinearPyramid, LearnedUpsamplingPyramid
from .variants.varied_anchors import VariedAnchorsRPNHead
