"""One key for the levels, ``MODEL.FPN_EXT.LEVELS``, and the keys derived from it.

    LEVELS: ["p2", "p3", "p4", "p5", "p6"]

lists the pyramid's outputs, all read by the RPN. A level of stride up to 32 is built on the
bottom-up's map of that stride, and boxes are pooled from these; coarser levels are added on top.
Anchors without a configured size are ``SIZE_IN_STRIDES`` cells wide, as in the paper (Lin et al.
2017, Sec. 4.1: 32 px on P2 to 512 px on P6).
"""

import math
from collections.abc import Collection
from typing import Any

from detectron2.config import CfgNode

from ..bottom_up.configured_levels import LEVELS, in_features_key, names_added, strides_of, value_of
from ..keys import own_keys
from ..levels import LevelError, map_name, stride_named
from ..registries.architectures import reads_node
from ..registries.lookup import is_finest_level_alone, is_pyramid, pyramids

COARSEST_ON_A_MAP = 32
SIZE_IN_STRIDES = 8
RESNET = "build_resnet_backbone"


def resolve_levels(cfg: CfgNode, explicitly_set: Collection[str] = ()) -> None:
    """Set every key derived from ``MODEL.FPN_EXT.LEVELS`` or ``ANCHOR_SIZES``, in place.

    These are IN_FEATURES of MODEL.FPN (or MODEL.FPN_EXT, if set there), MODEL.RPN and
    MODEL.ROI_HEADS, MODEL.RESNETS.OUT_FEATURES with Detectron2's ResNets, and
    MODEL.ANCHOR_GENERATOR.SIZES. With neither key set, nothing changes.

    Args:
        explicitly_set: keys left unchanged, such as ``"MODEL.RPN.IN_FEATURES"``.

    Raises:
        LevelError: invalid level names, levels that neither the bottom-up nor the top block
            provides, or an explicitly set key that contradicts.
    """
    own = own_keys(cfg)
    if own.LEVELS:
        strides_of(own.LEVELS)
        if not is_pyramid(cfg):
            raise LevelError(
                f"{LEVELS} serves MODEL.BACKBONE.NAME {', '.join(pyramids())}, got "
                f"{cfg.MODEL.BACKBONE.NAME}; leave it [] and set the IN_FEATURES of MODEL.RPN and "
                "MODEL.ROI_HEADS"
            )
        key = in_features_key(cfg)
        if key not in explicitly_set:
            set_value(cfg, key, _maps_under(cfg))
        follow: dict[str, list] = {
            "MODEL.RPN.IN_FEATURES": list(own.LEVELS),
            "MODEL.ROI_HEADS.IN_FEATURES": list(own.LEVELS[: len(value_of(cfg, key))]),
        }
        if own.BOTTOM_UP == RESNET:
            follow["MODEL.RESNETS.OUT_FEATURES"] = list(value_of(cfg, key))
        for name, value in follow.items():
            if name not in explicitly_set:
                set_value(cfg, name, value)
    if own.LEVELS or own.ANCHOR_SIZES:
        _resolve_sizes(cfg, explicitly_set)
    problems = level_problems(cfg)
    if problems:
        raise LevelError("\n".join(problems))


def _resolve_sizes(cfg: CfgNode, explicitly_set: Collection[str]) -> None:
    key = "MODEL.ANCHOR_GENERATOR.SIZES"
    sizes = _sizes_by_level(cfg)
    if key not in explicitly_set:
        set_value(cfg, key, sizes)
    elif own_keys(cfg).ANCHOR_SIZES and value_of(cfg, key) != sizes:
        raise LevelError(
            f"{key} {value_of(cfg, key)} contradicts MODEL.FPN_EXT.ANCHOR_SIZES, which says "
            f"{sizes} for {cfg.MODEL.RPN.IN_FEATURES}: set one of the two"
        )


def _sizes_by_level(cfg: CfgNode) -> list[list[float]]:
    given = own_keys(cfg).ANCHOR_SIZES
    strides = [stride_named(name) for name in cfg.MODEL.RPN.IN_FEATURES]
    names = [
        name if stride is None else map_name(stride)
        for name, stride in zip(cfg.MODEL.RPN.IN_FEATURES, strides, strict=True)
    ]
    if not given:
        return [[SIZE_IN_STRIDES * stride] if stride else [] for stride in strides]
    problems = []
    if missing := [name for name in names if name not in given]:
        problems.append(f"none for {missing}")
    if wrong := [name for name in given if stride_named(name) is None or name[:1] != "p"]:
        problems.append(f"{wrong}, no levels")
    if problems:
        raise LevelError(
            f"MODEL.FPN_EXT.ANCHOR_SIZES needs a list of sizes for each of the levels {names} "
            f"(MODEL.RPN.IN_FEATURES), and has {' and '.join(problems)}"
        )
    return [list(given[name]) for name in names]


def level_problems(cfg: CfgNode) -> list[str]:
    """Contradictions of ``MODEL.FPN_EXT.LEVELS``, one line each; none if it is unset."""
    own = own_keys(cfg)
    if not own.LEVELS:
        return []
    try:
        strides_of(own.LEVELS)
        given = levels_given(cfg)
    except ValueError as error:
        return [str(error)]
    problems = []
    for node in ("RPN", "ROI_HEADS"):
        asked = cfg.MODEL[node].IN_FEATURES
        absent = [name for name in asked if name not in (given or own.LEVELS)]
        if absent and reads_node(cfg, node):
            problems.append(
                f"MODEL.{node}.IN_FEATURES {list(asked)} has {absent}, which {LEVELS} "
                f"{list(own.LEVELS)} has not; leave it out, and it follows {LEVELS}"
            )
    in_a_resnet = [4, 8, 16, 32] if cfg.MODEL.RESNETS.RES5_DILATION == 1 else [4, 8, 16]
    maps = value_of(cfg, in_features_key(cfg))
    lacking = [name for name in maps if stride_named(name) not in in_a_resnet]
    if own.BOTTOM_UP == RESNET and lacking:
        problems.append(
            f"{LEVELS} {list(own.LEVELS)} stand on {lacking}, which {RESNET} does not give: its "
            f"strides are {in_a_resnet}. Networks of torchvision and timm have others, e.g. "
            f"MODEL.FPN_EXT.BOTTOM_UP torchvision/resnet{cfg.MODEL.RESNETS.DEPTH} one of 2"
        )
    return problems


def levels_given(cfg: CfgNode) -> list[str] | None:
    """The levels of a config's pyramid, derived from the names of the bottom-up's maps.

    Returns:
        Names, fine to coarse; None if the maps' names do not encode strides.

    Raises:
        LevelError: they differ from ``MODEL.FPN_EXT.LEVELS``.
    """
    strides = [stride_named(name) for name in value_of(cfg, in_features_key(cfg))]
    if not strides or any(stride is None for stride in strides):
        return None
    laterals = [map_name(stride) for stride in strides if stride is not None]
    added = names_added(cfg, laterals)
    return laterals[:1] if is_finest_level_alone(cfg) else laterals + added


def _maps_under(cfg: CfgNode) -> list[str]:
    """Names of the bottom-up's maps the levels are built on."""
    strides = [stride_named(name) for name in own_keys(cfg).LEVELS]
    on_maps = [t for t in strides if t is not None and t <= COARSEST_ON_A_MAP]
    if not on_maps:
        raise LevelError(
            f"{LEVELS} {list(cfg.MODEL.FPN_EXT.LEVELS)} has no level of a stride up to "
            f"{COARSEST_ON_A_MAP}. Which maps of the bottom-up coarser ones are to stand on, "
            f"{in_features_key(cfg)} must say"
        )
    if is_finest_level_alone(cfg):  # the whole pyramid, though only its finest is output
        steps = range(int(math.log2(COARSEST_ON_A_MAP / on_maps[0])) + 1)
        on_maps = [on_maps[0] * 2**i for i in steps]
    names = [map_name(stride, "c") for stride in on_maps]
    if own_keys(cfg).BOTTOM_UP == RESNET:
        names = [name.replace("c", "res") for name in names]
    return names


def set_value(cfg: CfgNode, key: str, value: Any) -> None:
    *nodes, last = key.split(".")
    value_of(cfg, ".".join(nodes))[last] = value
