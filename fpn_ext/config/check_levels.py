"""Checks that the levels of pyramid, anchors and pooler are consistent."""

from collections.abc import Iterable

from detectron2.config import CfgNode
from detectron2.modeling import BACKBONE_REGISTRY, PROPOSAL_GENERATOR_REGISTRY

from ..bottom_up.configured_levels import in_features_key
from ..levels import stride_named
from ..registries.architectures import is_architecture, reads_node
from ..registries.lookup import has_pyramid_heads, inherits, is_pyramid
from ..variants.all_levels import FUSIONS
from .level_keys import level_problems, levels_given
from .level_table import level_rule


def configured_level_problems(cfg: CfgNode) -> Iterable[str]:
    """Inconsistencies between the levels of pyramid, anchors and pooler."""
    model = cfg.MODEL
    contradictions = level_problems(cfg)
    for problem in contradictions:
        yield f"{problem} (in Python, call fpn_ext.resolve_levels(cfg))"
    if is_pyramid(cfg) and not contradictions:
        if model.FPN_EXT.BOTTOM_UP == "build_resnet_backbone":
            yield from _resnet_pyramid_problems(cfg)
        elif "/" in model.FPN_EXT.BOTTOM_UP:
            yield from _absent_map_problems(cfg)
        for key, maps in _asked_maps(cfg):
            strides = [stride_named(name) for name in maps]
            if None not in strides and strides != sorted(strides, key=lambda t: t or 0):
                yield f"{key} must go from fine to coarse, got {maps}"
    yield from _rule_problems(cfg)
    yield from _anchor_problems(cfg)
    yield from _channel_problems(cfg)


def _anchor_problems(cfg: CfgNode) -> Iterable[str]:
    model = cfg.MODEL
    anchors = model.ANCHOR_GENERATOR
    has_rpn = reads_node(cfg, "RPN") and inherits(
        PROPOSAL_GENERATOR_REGISTRY, model.PROPOSAL_GENERATOR.NAME, "RPN"
    )
    if not has_rpn and not reads_node(cfg, "RETINANET"):
        return
    node = "RPN" if has_rpn else "RETINANET"
    maps = model[node].IN_FEATURES
    per_map = []
    for key in ("SIZES", "ASPECT_RATIOS"):
        lists = anchors[key]
        if not lists or not isinstance(lists[0], list | tuple):
            continue  # one list for all levels, or invalid and rejected by the generator
        if len(lists) not in (1, len(maps)):
            yield (
                f"MODEL.ANCHOR_GENERATOR.{key} has {len(lists)} lists {lists} for the "
                f"{len(maps)} maps of MODEL.{node}.IN_FEATURES {maps}; it needs one per map, or a "
                "single one"
            )
        elif len({len(level) for level in lists}) > 1:
            per_map.append(key)
    if per_map and has_rpn and model.RPN.HEAD_NAME == "StandardRPNHead":
        yield (
            f"MODEL.ANCHOR_GENERATOR.{' and '.join(per_map)}: StandardRPNHead serves all levels, "
            "so each needs the same number of anchors per location; MODEL.RPN.HEAD_NAME "
            "VariedAnchorsRPNHead takes any"
        )


def _rule_problems(cfg: CfgNode) -> Iterable[str]:
    own = cfg.MODEL.FPN_EXT
    if not (has_pyramid_heads(cfg) and reads_node(cfg, "ROI_HEADS")):
        return
    if own.LEVEL_FUSION not in FUSIONS:
        yield f"MODEL.FPN_EXT.LEVEL_FUSION must be one of {FUSIONS}, got {own.LEVEL_FUSION!r}"
    try:
        level_rule(cfg)
    except ValueError as error:
        if "fine to coarse" not in str(error):  # reported for the key already
            yield str(error)


def _channel_problems(cfg: CfgNode) -> Iterable[str]:
    """Heads shared by all levels on maps that each have another number of channels."""
    name = cfg.MODEL.BACKBONE.NAME
    if not inherits(BACKBONE_REGISTRY, name, "FeatureHierarchy"):
        return
    why = f"one head for all levels cannot read the maps of {name}, which have the bottom-up's"
    if reads_node(cfg, "RETINANET") and not is_architecture(cfg, "HierarchyRetinaNet"):
        yield (
            f"MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE}: {why} channels; choose "
            "HierarchyRetinaNet"
        )
    head = cfg.MODEL.RPN.HEAD_NAME
    if reads_node(cfg, "RPN") and head in ("StandardRPNHead", "VariedAnchorsRPNHead"):
        yield f"MODEL.RPN.HEAD_NAME {head}: {why} channels; choose UnsharedRPNHead"


def _asked_maps(cfg: CfgNode) -> Iterable[tuple[str, list[str]]]:
    for node in ("RPN", "ROI_HEADS", "RETINANET", "SEM_SEG_HEAD"):
        precomputed = cfg.MODEL.PROPOSAL_GENERATOR.NAME == "PrecomputedProposals"
        if reads_node(cfg, node) and not (node == "RPN" and precomputed):
            yield f"MODEL.{node}.IN_FEATURES", cfg.MODEL[node].IN_FEATURES


def _resnet_pyramid_problems(cfg: CfgNode) -> Iterable[str]:
    resnets = cfg.MODEL.RESNETS
    in_features = cfg.MODEL.FPN_EXT.IN_FEATURES or cfg.MODEL.FPN.IN_FEATURES
    missing = [f for f in in_features if f not in resnets.OUT_FEATURES]
    if missing:
        yield (
            f"MODEL.FPN.IN_FEATURES asks for {missing}, which MODEL.RESNETS.OUT_FEATURES "
            f"{resnets.OUT_FEATURES} does not give; add them there"
        )
        return
    # A ResNet's res{k} has stride 2^k, unless its res5 is dilated: then building checks.
    if resnets.RES5_DILATION == 1:
        yield from _absent_map_problems(cfg)


def _absent_map_problems(cfg: CfgNode) -> Iterable[str]:
    given = levels_given(cfg)
    if given is None:
        return
    key = in_features_key(cfg)
    in_features = cfg.MODEL.FPN_EXT.IN_FEATURES or cfg.MODEL.FPN.IN_FEATURES
    for asking, asked in _asked_maps(cfg):
        absent = [f for f in asked if f not in given]
        if absent:
            yield f"{asking} asks for {absent}; the pyramid on {key} {in_features} gives {given}"
