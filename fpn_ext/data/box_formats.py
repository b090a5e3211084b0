"""Detect boxes stored in a different format from the one they are read as."""

from collections.abc import Iterable, Sequence

from .dataset_contents import Box, Corners, Problem

# Pixels a box may extend beyond its image: conventions differ by 0.5 and by 1.
SLACK = 1.0
# Thresholds for assuming the other format, see _other_format.
LEAST_SUSPECTS, SUSPECT_SHARE, FITTING_SHARE = 3, 0.2, 0.98


def format_problems(boxes: Sequence[tuple[Box, tuple[int, int]]]) -> Iterable[Problem]:
    """Format problems visible over a whole dataset: XYXY read as XYWH, the reverse, or fractions.

    Args:
        boxes: each paired with its image's (width, height) in pixels.
    """
    if len(boxes) >= LEAST_SUSPECTS and all(max(map(abs, b.written)) <= 1 for b, _ in boxes):
        yield Problem("looks-relative", None, None, f"all {len(boxes)} boxes lie in 0..1")
        return
    for as_xywh, kind, other in (
        (True, "looks-like-xyxy", "XYXY"),
        (False, "looks-like-xywh", "XYWH"),
    ):
        of_form = [(b.written, size) for b, size in boxes if (b.form == "XYWH") == as_xywh]
        suspects, fitting = _other_format(of_form, as_xywh)
        enough = max(LEAST_SUSPECTS, SUSPECT_SHARE * len(of_form))
        if suspects >= enough and fitting >= FITTING_SHARE * len(of_form):
            detail = (
                f"of {len(of_form)} boxes, {fitting} fit their image when read as {other}, "
                f"{suspects} of them only then"
            )
            yield Problem(kind, None, None, detail)


def _other_format(
    boxes: Iterable[tuple[Corners, tuple[int, int]]], as_xywh: bool
) -> tuple[int, int]:
    """How many boxes fit their image only in the other format, and how many fit in it at all.

    XYXY read as XYWH gives a right edge of x0 + x1, twice the box's centre: outside the image for
    every box centred right of (or below) the middle, about three in four. And XYXY always has
    x1 > x0 and y1 > y0, which true XYWH satisfies only by chance: some boxes are narrower than
    their distance from the edge. Both must hold, the first for a fifth of the boxes, the second
    for all but a fiftieth; a few boxes drawn beyond the edge satisfy only the first.
    """
    suspects = fitting = 0
    for (x, y, a, b), (width, height) in boxes:
        corners, sides = (x, y, a, b), (x, y, x + a, y + b)
        as_read, as_other = (sides, corners) if as_xywh else (corners, sides)
        if _fits(as_other, width, height):
            fitting += 1
            suspects += not _fits(as_read, width, height)
    return suspects, fitting


def _fits(corners: Corners, width: int, height: int) -> bool:
    x0, y0, x1, y1 = corners
    return -SLACK <= x0 < x1 <= width + SLACK and -SLACK <= y0 < y1 <= height + SLACK
