"""Level k, stride 2^k and name "p{k}": the one place that knows how they hang together.

The paper names a feature map after its level k; one step on it is 2^k pixels of the network
input (C2..C5 and P2..P6 have strides 4, 8, 16, 32, 64; Lin et al. 2017, Sec. 3).
"""

import math
from collections.abc import Sequence


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
    # 1/stride travels through YAML and Detectron2 as a float scale, so exact equality is too much.
    if not math.isclose(stride, 2**level, rel_tol=1e-6):
        raise ValueError(f"a pyramid level needs a stride that is a power of two, got {stride}")
    return level


def levels_of(strides: Sequence[float]) -> list[int]:
    """Levels of several maps, finest first, each twice as coarse as the one before.

    Raises:
        ValueError: no stride given, one is not a power of two, or there is a gap or a wrong order.

    >>> levels_of([4, 8, 16, 32])
    [2, 3, 4, 5]
    """
    if not strides:
        raise ValueError("a pyramid needs at least one level, got none")
    levels = [level_of(stride) for stride in strides]
    if levels != list(range(levels[0], levels[0] + len(levels))):
        raise ValueError(
            f"pyramid levels must be listed from fine to coarse with no gap, each stride twice "
            f"the one before; got strides {list(strides)}"
        )
    return levels
