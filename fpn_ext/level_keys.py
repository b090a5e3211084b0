"""One key for the levels, ``MODEL.FPN_EXT.LEVELS``: what follows from it, and the table of it all.

    LEVELS: ["p2", "p3", "p4", "p5", "p6"]

says what the pyramid gives and the RPN reads. A level of stride up to 32 stands on the bottom-up's
map of that stride, and boxes are pooled from these; coarser ones are added on top. Where an anchor
has no size of its own, it is ``SIZE_IN_STRIDES`` cells wide, as the paper's (Lin et al. 2017,
Sec. 4.1: 32 px on P2 to 512 px on P6).
"""

import math
from collections.abc import Collection, Sequence
from typing import Any

from detectron2.config import CfgNode

from .level_rules import LEVEL_RULE_REGISTRY, PaperRule
from .levels import check_fine_to_coarse, map_name, names_above, stride_named
from .names import (
    aligned,
    has_pyramid_heads,
    is_finest_level_alone,
    is_pyramid,
    look_up,
    own_keys,
    pools_from_all_levels,
    pyramids,
)

LEVELS = "MODEL.FPN_EXT.LEVELS"
FINEST, COARSEST = 1, 7
COARSEST_ON_A_MAP = 32
SIZE_IN_STRIDES = 8
RESNET = "build_resnet_backbone"


def resolve_levels(cfg: CfgNode, by_hand: Collection[str] = ()) -> None:
    """Set every key that follows from ``MODEL.FPN_EXT.LEVELS`` or ``ANCHOR_SIZES``, in place.

    These are the IN_FEATURES of MODEL.FPN (or of MODEL.FPN_EXT, where the config uses that), of
    MODEL.RPN and of MODEL.ROI_HEADS, MODEL.RESNETS.OUT_FEATURES under a ResNet of Detectron2's, and
    MODEL.ANCHOR_GENERATOR.SIZES. With neither key nothing changes.

    Args:
        by_hand: keys that stay as they are, such as ``"MODEL.RPN.IN_FEATURES"``.

    Raises:
        ValueError: names that are no levels, levels that the bottom-up or the top block does not
            give, or a key set by hand that contradicts; the table of levels is in the message.
    """
    own = own_keys(cfg)
    if own.LEVELS:
        _strides_of(own.LEVELS)
        if not is_pyramid(cfg):
            raise ValueError(
                f"{LEVELS} serves MODEL.BACKBONE.NAME {', '.join(pyramids())}, got "
                f"{cfg.MODEL.BACKBONE.NAME}; leave it [] and set the IN_FEATURES of MODEL.RPN and "
                "MODEL.ROI_HEADS"
            )
        key = in_features_key(cfg)
        if key not in by_hand:
            _set(cfg, key, _maps_under(cfg))
        follow: dict[str, list] = {
            "MODEL.RPN.IN_FEATURES": list(own.LEVELS),
            "MODEL.ROI_HEADS.IN_FEATURES": list(own.LEVELS[: len(_get(cfg, key))]),
        }
        if own.BOTTOM_UP == RESNET:
            follow["MODEL.RESNETS.OUT_FEATURES"] = list(_get(cfg, key))
        for name, value in follow.items():
            if name not in by_hand:
                _set(cfg, name, value)
    if own.LEVELS or own.ANCHOR_SIZES:
        _resolve_sizes(cfg, by_hand)
    problems = level_problems(cfg)
    if problems:
        raise ValueError("\n".join([*problems, *filter(None, [level_table(cfg)])]))


def _resolve_sizes(cfg: CfgNode, by_hand: Collection[str]) -> None:
    key = "MODEL.ANCHOR_GENERATOR.SIZES"
    sizes = _sizes_by_level(cfg)
    if key not in by_hand:
        _set(cfg, key, sizes)
    elif own_keys(cfg).ANCHOR_SIZES and _get(cfg, key) != sizes:
        raise ValueError(
            f"{key} {_get(cfg, key)} contradicts MODEL.FPN_EXT.ANCHOR_SIZES, which says {sizes} "
            f"for {cfg.MODEL.RPN.IN_FEATURES}: set one of the two"
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
    wrong = [name for name in given if stride_named(name) is None or name[:1] != "p"]
    missing = [name for name in names if name not in given]
    if wrong or missing:
        raise ValueError(
            f"MODEL.FPN_EXT.ANCHOR_SIZES needs a list of sizes for each of the levels {names} "
            f"(MODEL.RPN.IN_FEATURES), and has "
            + " and ".join(
                [f"none for {missing}"] * bool(missing) + [f"{wrong}, no levels"] * bool(wrong)
            )
        )
    return [list(given[name]) for name in names]


def level_problems(cfg: CfgNode) -> list[str]:
    """In what the keys contradict ``MODEL.FPN_EXT.LEVELS``, one line each; none without it."""
    own = own_keys(cfg)
    if not own.LEVELS:
        return []
    try:
        _strides_of(own.LEVELS)
        given = levels_given(cfg)
    except ValueError as error:
        return [str(error)]
    problems = []
    for node in ("RPN", "ROI_HEADS"):
        asked = cfg.MODEL[node].IN_FEATURES
        absent = [name for name in asked if name not in (given or own.LEVELS)]
        if absent:
            problems.append(
                f"MODEL.{node}.IN_FEATURES {list(asked)} has {absent}, which {LEVELS} "
                f"{list(own.LEVELS)} has not; leave it out, and it follows {LEVELS}"
            )
    in_a_resnet = [4, 8, 16, 32] if cfg.MODEL.RESNETS.RES5_DILATION == 1 else [4, 8, 16]
    maps = _get(cfg, in_features_key(cfg))
    lacking = [name for name in maps if stride_named(name) not in in_a_resnet]
    if own.BOTTOM_UP == RESNET and lacking:
        problems.append(
            f"{LEVELS} {list(own.LEVELS)} stand on {lacking}, which {RESNET} does not give: its "
            f"strides are {in_a_resnet}. Networks of torchvision and timm have others, e.g. "
            f"MODEL.FPN_EXT.BOTTOM_UP torchvision/resnet{cfg.MODEL.RESNETS.DEPTH} one of 2"
        )
    return problems


def levels_given(cfg: CfgNode) -> list[str] | None:
    """The levels of a config's pyramid, as far as the names of the bottom-up's maps tell.

    Returns:
        Names from fine to coarse; None if the names say nothing of their strides.

    Raises:
        ValueError: these are not those of ``MODEL.FPN_EXT.LEVELS``.
    """
    strides = [stride_named(name) for name in _get(cfg, in_features_key(cfg))]
    if not strides or any(stride is None for stride in strides):
        return None
    laterals = [map_name(stride) for stride in strides if stride is not None]
    added = _names_added(cfg, laterals)
    return laterals[:1] if is_finest_level_alone(cfg) else laterals + added


def names_added(cfg: CfgNode, laterals: Sequence[str]) -> list[str]:
    """Names of the levels that go on top of those on the bottom-up's maps.

    Up to the coarsest of ``MODEL.FPN_EXT.LEVELS``; without that key one.

    Args:
        laterals: names of the levels on the bottom-up's maps, fine to coarse.

    Raises:
        ValueError: the two together are not the levels that the key asks for; with their table.
    """
    try:
        return _names_added(cfg, laterals)
    except ValueError as error:
        raise ValueError(f"{error}\n{level_table(cfg)}") from None


def _names_added(cfg: CfgNode, laterals: Sequence[str]) -> list[str]:
    levels = list(own_keys(cfg).LEVELS)
    if not levels:
        return names_above(laterals[-1], 1)
    strides = _strides_of(levels)
    coarsest = stride_named(laterals[-1])
    assert coarsest is not None, laterals
    on_maps = [name for name, stride in zip(levels, strides, strict=True) if stride <= coarsest]
    expected = list(laterals[:1]) if is_finest_level_alone(cfg) else list(laterals)
    if on_maps != expected:
        raise ValueError(
            f"{LEVELS} {levels} does not fit {in_features_key(cfg)} "
            f"{list(_get(cfg, in_features_key(cfg)))}, on which stand {expected}"
        )
    count = int(math.log2(strides[-1] / coarsest))
    added = names_above(laterals[-1], count) if len(on_maps) < len(levels) else []
    absent = [name for name in levels if name not in on_maps + added]
    if absent:
        raise ValueError(
            f"{LEVELS} {levels}: {absent} cannot be put on {laterals[-1]}, the coarsest level on "
            "the bottom-up's maps; each level that is added has twice the stride of the one before"
        )
    return added


def in_features_key(cfg: CfgNode) -> str:
    """The key that names the bottom-up's maps to build on."""
    return "MODEL.FPN_EXT.IN_FEATURES" if own_keys(cfg).IN_FEATURES else "MODEL.FPN.IN_FEATURES"


def _strides_of(levels: Sequence[str]) -> list[int]:
    """Strides of ``MODEL.FPN_EXT.LEVELS``; raises ValueError unless they are levels, in order."""
    strides, wrong = [], []
    for name in levels:
        stride = stride_named(name) if isinstance(name, str) and name[:1] == "p" else None
        if stride is None or not 2**FINEST <= stride <= 2**COARSEST:
            wrong.append(name)
        else:
            strides.append(stride)
    if wrong:
        raise ValueError(
            f"{LEVELS} {list(levels)}: {wrong} are no levels. A level is p{FINEST} to p{COARSEST}, "
            'of stride 2 to 128; of a stride that is no power of two, such as 12, it is "ps12"'
        )
    try:
        check_fine_to_coarse(strides)
    except ValueError as error:
        raise ValueError(f"{LEVELS} {list(levels)}: {error}") from None
    return strides


def _maps_under(cfg: CfgNode) -> list[str]:
    """Names of the bottom-up's maps that the levels stand on."""
    strides = [stride_named(name) for name in own_keys(cfg).LEVELS]
    on_maps = [t for t in strides if t is not None and t <= COARSEST_ON_A_MAP]
    if not on_maps:
        raise ValueError(
            f"{LEVELS} {list(cfg.MODEL.FPN_EXT.LEVELS)} has no level of a stride up to "
            f"{COARSEST_ON_A_MAP}. Which maps of the bottom-up coarser ones are to stand on, "
            f"{in_features_key(cfg)} must say"
        )
    if is_finest_level_alone(cfg):  # the whole pyramid is built, for the finest map alone
        steps = range(int(math.log2(COARSEST_ON_A_MAP / on_maps[0])) + 1)
        on_maps = [on_maps[0] * 2**i for i in steps]
    names = [map_name(stride, "c") for stride in on_maps]
    if own_keys(cfg).BOTTOM_UP == RESNET:
        names = [name.replace("c", "res") for name in names]
    return names


def _get(cfg: CfgNode, key: str) -> Any:
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def _set(cfg: CfgNode, key: str, value: Any) -> None:
    *nodes, last = key.split(".")
    _get(cfg, ".".join(nodes))[last] = value


# The table


def level_table(cfg: CfgNode) -> str:
    """What becomes of every level: stride, map, anchors and the boxes that are pooled from it.

    Returns:
        Text, one line for each level and one for all anchors; empty if the model has no levels of
        known strides.
    """
    asked = [*_rpn_levels(cfg), *_pooled_levels(cfg), *own_keys(cfg).LEVELS]
    strides = {str(name): stride_named(str(name)) for name in asked}
    names = sorted((n for n, t in strides.items() if t), key=lambda n: strides[n] or 0)
    if not names or len(names) < len(strides):
        return ""
    height, width = _input_size(cfg)
    anchors, pooled = _anchor_cells(cfg), _pooled_boxes(cfg)
    sources = _sources(cfg, [stride for stride in strides.values() if stride])
    padding = _padding(cfg)
    rows = [
        [
            *("level", "made from", "stride", f"map at {height}x{width}"),
            *("anchor sizes", "per location", "anchors", _pooled_header(cfg)),
        ]
    ]
    total = 0
    for name in names:
        stride = strides[name] or 1
        sides = [-(-(-(-side // padding) * padding) // stride) for side in (height, width)]
        cells: tuple[str, int] | None = anchors.get(name)
        count = sides[0] * sides[1] * cells[1] if cells else 0
        total += count
        rows.append(
            [
                *(name, sources.get(stride, "-"), str(stride), f"{sides[0]}x{sides[1]}"),
                *((cells[0], str(cells[1]), f"{count:,}") if cells else ("-", "-", "-")),
                pooled.get(name, "-"),
            ]
        )
    if total:
        rows.append(["all", "", "", "", "", "", f"{total:,}", ""])
    return aligned(rows)


def _rpn_levels(cfg: CfgNode) -> list[str]:
    has_rpn = cfg.MODEL.META_ARCHITECTURE in ("GeneralizedRCNN", "ProposalNetwork", "PanopticFPN")
    precomputed = cfg.MODEL.PROPOSAL_GENERATOR.NAME == "PrecomputedProposals"
    return list(cfg.MODEL.RPN.IN_FEATURES) if has_rpn and not precomputed else []


def _pooled_levels(cfg: CfgNode) -> list[str]:
    has_heads = cfg.MODEL.META_ARCHITECTURE in ("GeneralizedRCNN", "PanopticFPN")
    return list(cfg.MODEL.ROI_HEADS.IN_FEATURES) if has_heads else []


def _input_size(cfg: CfgNode) -> tuple[int, int]:
    """Of a wide image (5:3) as the test resizes it; Detectron2's default makes it 800 x 1333."""
    height = cfg.INPUT.MIN_SIZE_TEST or 800
    return height, min(round(height * 5 / 3), max(cfg.INPUT.MAX_SIZE_TEST, height))


def _padding(cfg: CfgNode) -> int:
    if not is_pyramid(cfg):
        return 1
    strides = [stride_named(name) for name in _get(cfg, in_features_key(cfg))]
    return math.lcm(*(stride for stride in strides if stride))


def _sources(cfg: CfgNode, strides: Sequence[int]) -> dict[int, str]:
    """For each stride the map of the bottom-up, or the top block, that the level is made from."""
    if not is_pyramid(cfg):
        return {}
    maps = {stride_named(name): name for name in _get(cfg, in_features_key(cfg))}
    found = {stride: name for stride, name in maps.items() if stride}
    coarsest = max(found, default=0)
    return {t: own_keys(cfg).TOP_BLOCK for t in strides if 0 < coarsest < t} | found


def _anchor_cells(cfg: CfgNode) -> dict[str, tuple[str, int]]:
    """Sizes and number of anchors at a location, for each level that the RPN reads."""
    names = _rpn_levels(cfg)
    node = cfg.MODEL.ANCHOR_GENERATOR
    sizes, ratios = (_lists(values, len(names)) for values in (node.SIZES, node.ASPECT_RATIOS))
    return {
        name: (", ".join(f"{size:g}" for size in of_level), len(of_level) * len(its_ratios))
        for name, of_level, its_ratios in zip(names, sizes, ratios, strict=False)
    }


def _lists(values: Sequence, count: int) -> list:
    lists = list(values) if values and isinstance(values[0], list | tuple) else [list(values)]
    return lists * count if len(lists) == 1 else lists


def _pooled_header(cfg: CfgNode) -> str:
    rule = _rule(cfg)
    return f"pooled boxes: {rule.measure}, px" if rule else "pooled boxes"


def _pooled_boxes(cfg: CfgNode) -> dict[str, str]:
    names = _pooled_levels(cfg)
    rule = _rule(cfg)
    if rule is None:
        return dict.fromkeys(names, "all" if pools_from_all_levels(cfg) else "?")
    bounds = [f"{bound:.4g}" for bound in rule.bounds()]
    if not bounds:
        return dict.fromkeys(names, "all")
    ranges = zip(["0", *bounds], [*bounds, ""], strict=True)
    return {
        name: f"{low} to {high}" if high else f"{low} and more"
        for name, (low, high) in zip(names, ranges, strict=True)
    }


def _rule(cfg: CfgNode) -> Any:
    try:
        return level_rule(cfg)
    except ValueError:
        return None


def level_rule(cfg: CfgNode) -> Any:
    """The level rule of a config's RoI heads; None if they have none, or their maps no strides.

    Raises:
        ValueError: there is no such rule, or none for these strides.
    """
    own = own_keys(cfg)
    strides = [stride_named(name) for name in _pooled_levels(cfg)]
    if pools_from_all_levels(cfg) or not strides or None in strides:
        return None
    if not has_pyramid_heads(cfg):  # Detectron2's own
        return PaperRule([stride for stride in strides if stride], 224, 4)
    rule = look_up(LEVEL_RULE_REGISTRY, own.LEVEL_RULE, "MODEL.FPN_EXT.LEVEL_RULE")
    return rule(strides, own.CANONICAL_BOX_SIZE, own.CANONICAL_LEVEL)
