"""The level table: map, anchors and pooled boxes of each level."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

from detectron2.config import CfgNode

from ..bottom_up.configured_levels import in_features_key, value_of
from ..keys import own_keys
from ..levels import LevelError, stride_named
from ..modeling.level_rules import LEVEL_RULE_REGISTRY, PaperRule
from ..names import aligned
from ..registries.architectures import reads_node
from ..registries.lookup import has_pyramid_heads, is_pyramid, look_up, pools_from_all_levels


def level_table(cfg: CfgNode) -> str:
    """Table of the levels as configured: stride, map, anchors and pooled boxes.

    Returns:
        Text, one line per level and one for the total of anchors; empty if the model has no levels
        of known stride.
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
            *("level", "made from", "stride", f"map, e.g. at {height}x{width}"),
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


@contextlib.contextmanager
def level_table_in_errors(cfg: CfgNode) -> Iterator[None]:
    """Context in which every LevelError gets the level table appended.

    Components report what is wrong with their arguments; the code that prepares a config or builds
    a model from it adds the table, once.

    Raises:
        LevelError: the original message, with the table below it.
    """
    try:
        yield
    except LevelError as error:
        table = level_table(cfg)
        if not table:
            raise
        raise LevelError(f"{error}\nThe levels as configured:\n{table}") from None


def _rpn_levels(cfg: CfgNode) -> list[str]:
    precomputed = cfg.MODEL.PROPOSAL_GENERATOR.NAME == "PrecomputedProposals"
    return list(cfg.MODEL.RPN.IN_FEATURES) if reads_node(cfg, "RPN") and not precomputed else []


def _pooled_levels(cfg: CfgNode) -> list[str]:
    return list(cfg.MODEL.ROI_HEADS.IN_FEATURES) if reads_node(cfg, "ROI_HEADS") else []


def _input_size(cfg: CfgNode) -> tuple[int, int]:
    """(H, W) of a 5:3 image as resized for testing; 800 x 1333 by default."""
    height = cfg.INPUT.MIN_SIZE_TEST or 800
    return height, min(round(height * 5 / 3), max(cfg.INPUT.MAX_SIZE_TEST, height))


def _padding(cfg: CfgNode) -> int:
    if not is_pyramid(cfg):
        return 1
    strides = [stride_named(name) for name in value_of(cfg, in_features_key(cfg))]
    return math.lcm(*(stride for stride in strides if stride))


def _sources(cfg: CfgNode, strides: Sequence[int]) -> dict[int, str]:
    """For each stride, the bottom-up's map or the top block that makes the level."""
    if not is_pyramid(cfg):
        return {}
    maps = {stride_named(name): name for name in value_of(cfg, in_features_key(cfg))}
    found = {stride: name for stride, name in maps.items() if stride}
    coarsest = max(found, default=0)
    return {t: own_keys(cfg).TOP_BLOCK for t in strides if 0 < coarsest < t} | found


def _anchor_cells(cfg: CfgNode) -> dict[str, tuple[str, int]]:
    """Anchor sizes, and anchors per location, for each level the RPN reads."""
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
    """The level rule of a config's RoI heads; None without one, or with unknown strides.

    Raises:
        ValueError: an unknown rule, or one that cannot handle these strides.
    """
    own = own_keys(cfg)
    strides = [stride_named(name) for name in _pooled_levels(cfg)]
    if pools_from_all_levels(cfg) or not strides or None in strides:
        return None
    if not has_pyramid_heads(cfg):  # Detectron2's heads
        return PaperRule([stride for stride in strides if stride], 224, 4)
    rule = look_up(LEVEL_RULE_REGISTRY, own.LEVEL_RULE, "MODEL.FPN_EXT.LEVEL_RULE")
    return rule(strides, own.CANONICAL_BOX_SIZE, own.CANONICAL_LEVEL)
