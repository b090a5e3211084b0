"""COCO's run-length masks, decoded so that what is none is found before pycocotools reads it."""

from collections.abc import Mapping
from typing import Any


def run_lengths(mask: Mapping[str, Any]) -> list[int] | None:
    """Lengths of the runs of a mask ``{"size": [height, width], "counts": ...}``, in pixels.

    Runs of 0 and of 1 alternate, from the top down and column by column, beginning with 0.

    Returns:
        None where it is no mask: lengths that are negative or do not add up to height x width, or
        text that is not COCO's encoding of such.

    >>> run_lengths({"size": [2, 3], "counts": [1, 2, 3]})
    [1, 2, 3]
    >>> run_lengths({"size": [2, 3], "counts": "123"})
    [1, 2, 3]
    >>> run_lengths({"size": [2, 3], "counts": [1, 2]})
    """
    size, counts = mask.get("size"), mask.get("counts")
    if not (isinstance(size, list | tuple) and len(size) == 2 and all(map(_is_whole, size))):
        return None
    runs = _decoded(counts) if isinstance(counts, str) else counts
    if not isinstance(runs, list) or not all(_is_whole(run) and run >= 0 for run in runs):
        return None
    return runs if sum(runs) == size[0] * size[1] else None


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _decoded(text: str) -> list[int] | None:
    """Five bits a character, the least first; from the fourth run on, each is a difference to the
    run two before it (pycocotools, common/maskApi.c, rleFrString)."""
    runs: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 60:
            return None
        value |= (bits & 0x1F) << shift
        shift += 5
        if bits & 0x20:
            continue
        if bits & 0x10:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    return None if shift else runs
