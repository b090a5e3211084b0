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

Nothing heavy is imported by it: the components are imported when Detectron2's models first are, or
when one of the names below is asked for (:mod:`fpn_ext.registration`). On an uncompiled Detectron2
v0.6, which it makes importable, ``import fpn_ext`` stands before ``import detectron2``.

What ``__all__`` names is public; anything else may change.
"""

# ruff: noqa: F405

from typing import TYPE_CHECKING, Any

from . import registration

if TYPE_CHECKING:
    from .api import *  # noqa: F403

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
    "get_cfg",
    "level_table",
    "load_config",
    "optimize_for_inference",
    "prepare",
    "resolve_bottom_up",
    "resolve_levels",
]

registration.install()


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'fpn_ext' has no attribute {name!r}")
    from . import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
