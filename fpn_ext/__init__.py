"""Feature Pyramid Networks (Lin et al., CVPR 2017) for Detectron2, written from the paper.

``import fpn_ext`` registers, by these names for YAML:

===========================  ==================================================
registry                     names
===========================  ==================================================
BACKBONE_REGISTRY            ``FeaturePyramid``; of the paper's ablations
                             ``BottomUpPyramid``, ``TopDownPyramid``,
                             ``FinestLevelPyramid``; of other papers
                             ``PathAggregationPyramid``, ``BiFPN``,
                             ``BilinearPyramid``,
                             ``LearnedUpsamplingPyramid``,
                             ``NormalizedLateralPyramid``
ANCHOR_GENERATOR_REGISTRY    ``PyramidAnchorGenerator``
PROPOSAL_GENERATOR_REGISTRY  ``PyramidRPN``
RPN_HEAD_REGISTRY            ``UnsharedRPNHead``, ``VariedAnchorsRPNHead``
ROI_HEADS_REGISTRY           ``PyramidROIHeads``, ``ChunkedROIHeads``,
                             ``UnsharedROIHeads``, ``AllLevelsROIHeads``
===========================  ==================================================

and does nothing else, except on an uncompiled Detectron2 v0.6, which it makes importable
(``fpn_ext/_d2_compat.py``; import ``fpn_ext`` before ``detectron2`` there).
"""

import sys

# `python -m fpn_ext.doctor` imports this file first, and must run where nothing below can.
if not any(argument.endswith("fpn_ext.doctor") for argument in sys.orig_argv):
    from . import _d2_compat

    _d2_compat.apply()

    from .ablations import BottomUpPyramid, FinestLevelPyramid, TopDownPyramid
    from .all_levels import AllLevelsROIHeads
    from .anchors import PyramidAnchorGenerator
    from .bifpn import BiFPN
    from .bottom_ups import resolve_bottom_up
    from .config import (
        add_fpn_ext_config,
        check_config,
        check_weights,
        get_cfg,
        load_config,
        resolve_device,
    )
    from .fpn import FeaturePyramid
    from .lateral_norms import NormalizedLateralPyramid
    from .level_keys import level_table, resolve_levels
    from .level_rules import assign_levels
    from .optimize import optimize_for_inference
    from .path_aggregation import PathAggregationPyramid
    from .pooler import LevelMappedROIPooler
    from .roi_heads import ChunkedROIHeads, PyramidROIHeads
    from .rpn import PyramidRPN
    from .top_blocks import Subsample
    from .unshared import UnsharedROIHeads, UnsharedRPNHead
    from .upsampling import BilinearPyramid, LearnedUpsamplingPyramid
    from .varied_anchors import VariedAnchorsRPNHead

__all__ = [
    "AllLevelsROIHeads",
    "BiFPN",
    "BilinearPyramid",
    "BottomUpPyramid",
    "ChunkedROIHeads",
    "FeaturePyramid",
    "FinestLevelPyramid",
    "LearnedUpsamplingPyramid",
    "LevelMappedROIPooler",
    "NormalizedLateralPyramid",
    "PathAggregationPyramid",
    "PyramidAnchorGenerator",
    "PyramidROIHeads",
    "PyramidRPN",
    "Subsample",
    "TopDownPyramid",
    "UnsharedROIHeads",
    "UnsharedRPNHead",
    "VariedAnchorsRPNHead",
    "add_fpn_ext_config",
    "assign_levels",
    "check_config",
    "check_weights",
    "get_cfg",
    "level_table",
    "load_config",
    "optimize_for_inference",
    "resolve_bottom_up",
    "resolve_device",
    "resolve_levels",
]
