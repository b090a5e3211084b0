"""The levels a config asks for, and the bottom-up's maps they are built on."""

import math
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode

from ..keys import declare, own_keys
from ..levels import LevelError, check_fine_to_coarse, names_above, stride_named
from ..registries.lookup import is_finest_level_alone

declare(
    "MODEL.FPN_EXT.LEVELS",
    [],
    'The pyramid\'s levels, fine to coarse, e.g. ["p2", "p3", "p4", "p5", "p6"]: what it '
    "is built on, what RPN and RoI heads read, and the anchors' sizes follow. []: every "
    "key says it for itself.",
    "FeaturePyramid",
)
declare(
    "MODEL.FPN_EXT.IN_FEATURES",
    [],
    "Names of the bottom-up's maps to build on, fine to coarse; [] for "
    "MODEL.FPN.IN_FEATURES. For a bottom-up that is itself a pyramid and reads that key.",
    "FeaturePyramid",
    "Detectron2Pyramid",
)

LEVELS = "MODEL.FPN_EXT.LEVELS"
FINEST, COARSEST = 1, 7


def in_features_key(cfg: CfgNode) -> str:
    """The key that names the bottom-up's maps to build on."""
    return "MODEL.FPN_EXT.IN_FEATURES" if own_keys(cfg).IN_FEATURES else "MODEL.FPN.IN_FEATURES"


def names_added(cfg: CfgNode, laterals: Sequence[str]) -> list[str]:
    """Names of the levels added above those with a lateral connection.

    Up to the coarsest of ``MODEL.FPN_EXT.LEVELS``; one if that key is unset.

    Args:
        laterals: names of the levels with a lateral connection, fine to coarse.

    Raises:
        LevelError: together they are not the levels the key asks for.
    """
    levels = list(own_keys(cfg).LEVELS)
    if not levels:
        return names_above(laterals[-1], 1)
    strides = strides_of(levels)
    coarsest = stride_named(laterals[-1])
    assert coarsest is not None, laterals
    on_maps = [name for name, stride in zip(levels, strides, strict=True) if stride <= coarsest]
    expected = list(laterals[:1]) if is_finest_level_alone(cfg) else list(laterals)
    if on_maps != expected:
        raise LevelError(
            f"{LEVELS} {levels} does not fit {in_features_key(cfg)} "
            f"{list(value_of(cfg, in_features_key(cfg)))}, on which stand {expected}"
        )
    count = int(math.log2(strides[-1] / coarsest))
    added = names_above(laterals[-1], count) if len(on_maps) < len(levels) else []
    absent = [name for name in levels if name not in on_maps + added]
    if absent:
        raise LevelError(
            f"{LEVELS} {levels}: {absent} cannot be put on {laterals[-1]}, the coarsest level on "
            "the bottom-up's maps; each level that is added has twice the stride of the one before"
        )
    return added


def strides_of(levels: Sequence[str]) -> list[int]:
    """Strides of ``MODEL.FPN_EXT.LEVELS``; raises LevelError unless they are valid, in order."""
    strides, wrong = [], []
    for name in levels:
        stride = stride_named(name) if isinstance(name, str) and name[:1] == "p" else None
        if stride is None or not 2**FINEST <= stride <= 2**COARSEST:
            wrong.append(name)
        else:
            strides.append(stride)
    if wrong:
        raise LevelError(
            f"{LEVELS} {list(levels)}: {wrong} are no levels. A level is p{FINEST} to p{COARSEST}, "
            'of stride 2 to 128; of a stride that is no power of two, such as 12, it is "ps12"'
        )
    try:
        check_fine_to_coarse(strides)
    except ValueError as error:
        raise LevelError(f"{LEVELS} {list(levels)}: {error}") from None
    return strides


def value_of(cfg: CfgNode, key: str) -> Any:
    for part in key.split("."):
        cfg = cfg[part]
    return cfg
