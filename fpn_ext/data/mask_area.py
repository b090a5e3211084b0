"""Run-length masks as COCO writes them, read without pycocotools.

Its C code reads past the end of some strings and never returns on others; what is refused here
never reaches it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def runs_of(counts: Any) -> np.ndarray:
    """The lengths of a mask's runs, (M,) int64, column by column, the first of background.

    Args:
        counts: a list of them, or COCO's string or bytes.

    Raises:
        ValueError: these are no run lengths.

    >>> runs_of([5, 4, 3]).tolist(), runs_of("543").tolist()
    ([5, 4, 3], [5, 4, 3])
    """
    if isinstance(counts, str | bytes):
        runs = _decoded(counts.encode() if isinstance(counts, str) else counts)
    elif isinstance(counts, Sequence) and all(
        isinstance(run, int) and not isinstance(run, bool) and 0 <= run < 2**32 for run in counts
    ):
        runs = np.array(counts, dtype=np.int64)
    else:
        raise ValueError("'counts' must be a list of whole numbers from 0, or COCO's string")
    if len(runs) == 0 or (runs < 0).any():
        raise ValueError("'counts' holds no runs" if len(runs) == 0 else "a run is negative")
    return runs


def mask_area(segmentation: Mapping[str, Any], height: int, width: int) -> int:
    """The number of pixels of a run-length mask of one image.

    Args:
        segmentation: COCO's ``{"size": [height, width], "counts": ...}``.

    Raises:
        ValueError: it is not a mask of an image of this size.

    >>> mask_area({"size": [3, 4], "counts": [5, 4, 3]}, 3, 4)
    4
    """
    size = segmentation.get("size")
    if not isinstance(size, list | tuple) or list(size) != [height, width]:
        raise ValueError(f"'size' {size!r} is not the image's [{height}, {width}]")
    runs = runs_of(segmentation.get("counts"))
    if runs.sum() != height * width:
        raise ValueError(
            f"the runs are of {runs.sum()} pixels, the image has {height} x {width} = "
            f"{height * width}"
        )
    return int(runs[1::2].sum())


def _decoded(text: bytes) -> np.ndarray:
    """COCO's string: groups of 5 bits, low ones first; from the fourth on, less the last but one.

    As ``rleFrString`` of cocoapi's maskApi.c.
    """
    codes = np.frombuffer(text, dtype=np.uint8).astype(np.int64) - 48
    if len(codes) == 0 or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        raise ValueError("'counts' is not a string of COCO's run lengths")
    ends = np.flatnonzero((codes & 32) == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 7:
        raise ValueError("a run of 'counts' has more than 32 bits")
    place = np.arange(len(codes)) - np.repeat(starts, lengths)
    values = np.add.reduceat((codes & 31) << (5 * place), starts)
    values -= np.where(codes[ends] & 16, 1 << (5 * lengths), 0)
    runs = values.copy()
    runs[1::2] = np.cumsum(values[1::2])
    runs[2::2] = np.cumsum(values[2::2])
    return runs
