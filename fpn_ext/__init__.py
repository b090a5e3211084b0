"""Feature Pyramid Networks (Lin et al., CVPR 2017) for Detectron2, written from the paper.

``import fpn_ext`` registers these names, for use in YAML:

===========================  ==================================================
registry                     names
===========================  ==================================================
BACKBONE_REGISTRY            ``FeaturePyramid``; the paper's ablations
                             ``BottomUpPyramid``, ``TopDownPyramid``,
                             ``FinestLevelPyramid``; without its 3x3
                             convolutions ``UnsmoothedPyramid``; from other papers
                             ``PathAggregationPyramid``, ``BiFPN``,
                             ``BilinearPyramid``,
                             ``LearnedUpsamplingPyramid``,
                             ``NormalizedLateralPyramid``; from other
                             implementations ``UnsmoothedTopPyramid``,
                             ``SmoothedRecursionPyramid``, ``JwyangPyramid``;
                             Fig. 1(c): ``FeatureHierarchy``
ANCHOR_GENERATOR_REGISTRY    ``PyramidAnchorGenerator``
PROPOSAL_GENERATOR_REGISTRY  ``PyramidRPN``, ``PerLevelRPN``
RPN_HEAD_REGISTRY            ``UnsharedRPNHead``, ``VariedAnchorsRPNHead``
ROI_HEADS_REGISTRY           ``PyramidROIHeads``, ``ChunkedROIHeads``,
                             ``UnsharedROIHeads``, ``AllLevelsROIHeads``
META_ARCH_REGISTRY           ``PyramidMaskProposals``; Fig. 1(a):
                             ``ImagePyramidRCNN``; for (c):
                             ``HierarchyRetinaNet``
===========================  ==================================================

The import is light: components load when Detectron2's models are first imported, or when a name
below is first accessed (:mod:`fpn_ext.registration`). With an uncompiled Detectron2 v0.6, which it
makes importable, ``import fpn_ext`` must precede ``import detectron2``.

Names in ``__all__`` are public; anything else may change.
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
    "Detections",
    "Detector",
    "FeatureHierarchy",
    "FeaturePyramid",
    "FinestLevelPyramid",
    "HierarchyRetinaNet",
    "ImagePyramidRCNN",
    "JwyangPyramid",
    "LearnedUpsamplingPyramid",
    "LevelMappedROIPooler",
    "NormalizedLateralPyramid",
    "PathAggregationPyramid",
    "PerLevelRPN",
    "PyramidAnchorGenerator",
    "PyramidMaskProposals",
    "PyramidROIHeads",
    "PyramidRPN",
    "SmoothedRecursionPyramid",
    "Subsample",
    "TopDownPyramid",
    "UnsharedROIHeads",
    "UnsharedRPNHead",
    "UnsmoothedPyramid",
    "UnsmoothedTopPyramid",
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
