"""Every module that registers a component or declares a config key.

Importing this one is what ``import fpn_ext`` comes to: :mod:`fpn_ext.registration` imports it once
Detectron2's registries are there, and so does every room whose modules need them.
"""

# ruff: noqa: E402, F401

from . import _d2_compat

_d2_compat.apply()

import detectron2.modeling  # the registries, before anything of ours

from .bottom_up import freezing
from .bottom_up.build import resolve_bottom_up
from .config.check import check_config
from .config.defaults import add_fpn_ext_config, get_cfg
from .config.level_keys import resolve_levels
from .config.level_table import level_table
from .config.load import load_config
from .config.prepare import prepare
from .engine import best, ema, repeatable, steps, validation_loss
from .evaluation import recall
from .modeling.anchors import PyramidAnchorGenerator
from .modeling.fpn import FeaturePyramid
from .modeling.level_rules import assign_levels
from .modeling.pooler import LevelMappedROIPooler
from .modeling.roi_heads import ChunkedROIHeads, PyramidROIHeads
from .modeling.rpn import PyramidRPN
from .modeling.top_blocks import Subsample
from .speed import folded_norms, winograd_training
from .speed.optimize import optimize_for_inference
from .variants.ablations import (
    BottomUpPyramid,
    FinestLevelPyramid,
    TopDownPyramid,
)
from .variants.all_levels import AllLevelsROIHeads
from .variants.bifpn import BiFPN
from .variants.lateral_norms import NormalizedLateralPyramid
from .variants.path_aggregation import PathAggregationPyramid
from .variants.unshared import UnsharedROIHeads, UnsharedRPNHead
from .variants.upsampling import BilinearPyramid, LearnedUpsamplingPyramid
from .variants.varied_anchors import VariedAnchorsRPNHead
