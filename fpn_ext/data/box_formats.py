"""Detect boxes stored in a different format from the one they are read as."""

from collections.abc import Iterable
from dataclasses import dataclass

from .dataset_contents import Box, Corners, Problem

# Pixels a box may extend beyond its image: conventions differ by 0.5 and by 1.
SLACK = 1.0
# Thresholds for assuming the other format, see _other_format.
LEAST_SUSPECTS, SUSPECT_SHARE, FITTING_SHARE = 3, 0.2, 0.98


def format_problems(boxes: Iterable[tuple[Box, tuple[int, int]]]) -> Iterable[Problem]:
    """Format problems visible over a whole dataset: XYXY read as XYWH, the reverse, or fractions.

    Args:
        boxes: each paired with its image's (width, height) in pixels.
    """
    as_xywh, as_corners = _InOtherFormat(), _InOtherFormat()
    relative = True
    for box, size in boxes:
        relative = relative and max(map(abs, box.written)) <= 1
        x, y, a, b = box.written
        corners, sides = (x, y, a, b), (x, y, x + a, y + b)
        if box.form == "XYWH":
            as_xywh.add(sides, corners, size)
        else:
            as_corners.add(corners, sides, size)
    count = as_xywh.boxes + as_corners.boxes
    if relative and count >= LEAST_SUSPECTS:
        yield Problem("looks-relative", None, None, f"all {count} boxes lie in 0..1")
        return
    for found, kind, other in (
        (as_xywh, "looks-like-xyxy", "XYXY"),
        (as_corners, "looks-like-xywh", "XYWH"),
    ):
        if found.is_suspicious():
            detail = (
                f"of {found.boxes} boxes, {found.fitting} fit their image when read as {other}, "
                f"{found.suspects} of them only then"
            )
            yield Problem(kind, None, None, detail)


@dataclass
class _InOtherFormat:
    """How many boxes fit their image only in the other format, and how many fit in it at all.

    XYXY read as XYWH gives a right edge of x0 + x1, twice the box's centre: outside the image for
    every box centred right of (or below) the middle, about three in four. And XYXY always has
    x1 > x0 and y1 > y0, which true XYWH satisfies only by chance: some boxes are narrower than
    their distance from the edge. Both must hold, the first for a fifth of the boxes, the second
    for all but a fiftieth; a few boxes drawn beyond the edge satisfy only the first.
    """

    boxes: int = 0
    fitting: int = 0
    suspects: int = 0

    def add(self, as_read: Corners, as_other: Corners, size: tuple[int, int]) -> None:
        self.boxes += 1
        if _fits(as_other, *size):
            self.fitting += 1
            self.suspects += not _fits(as_read, *size)

    def is_suspicious(self) -> bool:
        enough = max(LEAST_SUSPECTS, SUSPECT_SHARE * self.boxes)
        return self.suspects >= enough and self.fitting >= FITTING_SHARE * self.boxes


def _fits(corners: Corners, width: int, height: int) -> bool:
    x0, y0, x1, y1 = corners
    return -SLACK <= x0 < x1 <= width + SLACK and -SLACK <= y0 < y1 <= height + SLACK
