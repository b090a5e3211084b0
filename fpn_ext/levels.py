"""Conversions between level k, stride 2^k and name "p{k}", all in one place.

The paper names a feature map after its level k; one cell of it is 2^k pixels of the network
input (C2..C5 and P2..P6 have strides 4, 8, 16, 32, 64; Lin et al. 2017, Sec. 3). A level whose
stride t is not a power of two is named after it, "ps{t}".
"""

import itertools
import math
import re
from collections.abc import Sequence

# Fields of proposals and detections (MODEL.FPN_EXT.KEEP_LEVELS), (R,) int64 levels k: the one that
# proposed a box, and the one its features were pooled from.
LEVEL_FIELDS = ("proposal_level", "pooled_level")


class LevelError(ValueError):
    """Inconsistent levels, in a pyramid or in the components that read it.

    Callers that hold the config append its level table to the message.
    """


def stride_of(level: int) -> int:
    """Stride of a level, in pixels of the network input.

    >>> stride_of(5)
    32
    """
    return 2**level


def name_of(level: int) -> str:
    """Name of a level's output map.

    >>> name_of(5)
    'p5'
    """
    return f"p{level}"


def level_of(stride: float) -> int:
    """Level k of a map with the given stride, the inverse of :func:`stride_of`.

    Raises:
        ValueError: the stride is not one of 1, 2, 4, 8, ...

    >>> level_of(32)
    5
    """
    if not (math.isfinite(stride) and stride >= 1):
        raise ValueError(f"a stride is a number of pixels >= 1, got {stride}")
    level = round(math.log2(stride))
    # 1/stride passes through YAML and Detectron2 as a float: exact equality is too strict.
    if not math.isclose(stride, 2**level, rel_tol=1e-6):
        raise ValueError(f"a pyramid level needs a stride that is a power of two, got {stride}")
    return level


def nearest_level(stride: float) -> int:
    """Level k whose stride is nearest to the given one, by ratio; k for 2^k.

    >>> [nearest_level(stride) for stride in (4, 6, 12, 32)]
    [2, 3, 4, 5]
    """
    try:
        return level_of(stride)
    except ValueError:
        return round(math.log2(stride))


def map_name(stride: float, letter: str = "p") -> str:
    """Name of a feature map of any stride, in the pyramid ("p") or the bottom-up ("c").

    >>> map_name(32), map_name(6), map_name(32, "c"), map_name(6, "c")
    ('p5', 'ps6', 'c5', 's6')
    """
    try:
        return f"{letter}{level_of(stride)}"
    except ValueError:
        number = f"{stride:g}"
        return f"s{number}" if letter == "c" else f"{letter}s{number}"


def stride_named(name: str) -> int | None:
    """Stride encoded in a feature map's name; None if it encodes none.

    The bottom-up's maps are ``"c{k}"``, ``"res{k}"`` in Detectron2's ResNets, or ``"s{t}"``.

    >>> [stride_named(name) for name in ("p5", "ps6", "c5", "res5", "s6", "stem", "ps8")]
    [32, 6, 32, 32, 6, None, None]
    """
    level = re.fullmatch(r"(?:p|c|res)(\d{1,2})", name)
    if level:
        return stride_of(int(level.group(1)))
    stride = re.fullmatch(r"p?s(\d{1,4})", name)
    if stride and math.log2(max(int(stride.group(1)), 1)) % 1:
        return int(stride.group(1))
    return None


def names_above(name: str, count: int) -> list[str]:
    """Names of the next ``count`` levels, each with twice the stride of the last.

    >>> names_above("p5", 2), names_above("ps24", 1)
    (['p6', 'p7'], ['ps48'])
    """
    stride = stride_named(name)
    assert stride is not None, name
    return [map_name(stride * 2**i) for i in range(1, count + 1)]


def check_fine_to_coarse(strides: Sequence[float]) -> None:
    """Raise LevelError unless strides are non-empty, >= 1 and strictly increasing.

    Levels may be skipped, and strides need not be powers of two.
    """
    if not strides:
        raise LevelError("a pyramid needs at least one level, got none")
    in_order = all(fine < coarse for fine, coarse in itertools.pairwise(strides))
    if not (in_order and all(math.isfinite(t) and t >= 1 for t in strides)):
        raise LevelError(
            "pyramid levels must be listed from fine to coarse, each with a stride of at least 1 "
            f"pixel; got strides {list(strides)}"
        )
