"""COCO annotations of a demo image, from the visible pixels of each object."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from .demo_scenes import Scene

Mask = npt.NDArray[np.bool_]


def _boundary_loops(mask: Mask) -> Iterator[list[tuple[int, int]]]:
    """The closed outlines (x, y) of a mask along pixel edges; holes have opposite orientation."""
    padded = np.pad(mask, 1).astype(np.int8)
    following: dict[tuple[int, int], list[tuple[int, int]]] = {}
    # Walk with the mask on the right: top edges go right, bottom edges left, and so on.
    down, across = np.diff(padded, axis=0)[:, 1:-1], np.diff(padded, axis=1)[1:-1]
    for edges, sign, start, end in (
        (down, 1, (0, 0), (1, 0)),
        (down, -1, (1, 0), (0, 0)),
        (across, 1, (0, 1), (0, 0)),
        (across, -1, (0, 0), (0, 1)),
    ):
        for y, x in np.argwhere(edges == sign).tolist():
            following.setdefault((x + start[0], y + start[1]), []).append((x + end[0], y + end[1]))
    while following:
        point = first = next(iter(following))
        loop, heading = [], (0, 0)
        while True:
            choices = following[point]
            target = choices.pop()
            if not choices:
                del following[point]
            new_heading = (target[0] - point[0], target[1] - point[1])
            if new_heading != heading:  # keep the corners only
                loop.append(point)
            point, heading = target, new_heading
            if point == first:
                break
        yield loop


def _signed_area(loop: list[tuple[int, int]]) -> float:
    return (
        sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in zip(loop, loop[1:] + loop[:1], strict=True))
        / 2
    )


def polygons(mask: Mask, left: int, top: int) -> list[list[float]]:
    """COCO polygons of a mask whose top-left pixel is at (left, top) in the image.

    COCO takes the union of an object's polygons, so a hole cannot be one of them. A mask with holes
    becomes a single polygon, its outlines joined by bridges of zero area.
    """
    loops = list(_boundary_loops(mask))
    if any(_signed_area(loop) < 0 for loop in loops):
        joined = loops[0] + loops[0][:1]
        for loop in loops[1:]:
            joined += loop + loop[:1] + loops[0][:1]
        loops = [joined[:-1]]
    return [[float(c) for x, y in loop for c in (x + left, y + top)] for loop in loops]


def rle_counts(mask: Mask) -> list[int]:
    """Uncompressed COCO RLE counts: column-major, starting with a run of zeros."""
    flat = mask.flatten(order="F")
    changes = np.flatnonzero(np.diff(flat)) + 1
    bounds = np.concatenate([[0], changes, [flat.size]])
    counts: list[int] = np.diff(bounds).tolist()
    return [0, *counts] if flat[0] else counts


def annotation_of(scene: Scene, index: int) -> dict[str, Any]:
    """The COCO annotation of one item, from its visible pixels; the caller adds ids."""
    item, mask = scene.items[index], scene.owner == index
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    top, left = int(rows[0]), int(columns[0])
    height, width = int(rows[-1]) + 1 - top, int(columns[-1]) + 1 - left
    segmentation: Any
    if item.crowd:
        segmentation = {"counts": rle_counts(mask), "size": list(mask.shape)}
    else:
        segmentation = polygons(mask[top : top + height, left : left + width], left, top)
    return {
        "category_id": item.category + 1,
        "bbox": [float(left), float(top), float(width), float(height)],
        "area": float(mask.sum()),
        "iscrowd": int(item.crowd),
        "segmentation": segmentation,
    }
