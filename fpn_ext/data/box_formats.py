"""Whether boxes were written in another format than the one they are read in."""

from collections.abc import Iterable, Sequence

from .dataset_contents import Box, Corners, Problem

# Pixels a box may reach beyond its image: conventions differ by a half and by one.
SLACK = 1.0
# When boxes are taken for the other format, see _other_format.
LEAST_SUSPECTS, SUSPECT_SHARE, FITTING_SHARE = 3, 0.2, 0.98


def format_problems(boxes: Sequence[tuple[Box, tuple[int, int]]]) -> Iterable[Problem]:
    """What all boxes of a dataset together tell: corners for XYWH, the reverse, or fractions.

    Args:
        boxes: each with the (width, height) of its image in pixels.
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
    """How many boxes fit their image only when read in the other format, and how many then fit.

    Corners read as XYWH give a right edge of x0 + x1, twice the box's centre: beyond the image for
    every box whose centre lies right of the middle (or below it), about three in four. And each
    corner pair has x1 > x0 and y1 > y0, which widths and heights have by chance only: in boxes
    truly XYWH some are narrower than their distance from the edge. Both must hold, the first for
    a fifth of the boxes, the second for all but a fiftieth; a few boxes drawn beyond the edge
    give the first without the second.
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
