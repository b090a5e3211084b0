"""Boxes matched to ground truth by IoU, in bounded memory: Detectron2's result, to the bit.

Detectron2 computes the IoU of every box with every object, M x N numbers, several times over: with
10 000 objects and 40 000 anchors, gigabytes, of which nearly all are 0. Here boxes are ordered by
size and place and taken in blocks, and a block is compared only with the objects that reach into
its outline. Every other IoU is exactly 0, so nothing is lost, and those computed are computed by
the same operations in the same precision.
"""

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from detectron2.structures import Boxes, pairwise_iou

if TYPE_CHECKING:
    from detectron2.modeling.matcher import Matcher

# Up to so many pairs, the whole matrix: at most some 150 MB.
PAIRS_AT_ONCE = 4_000_000
# A block's pairs. On a CPU they stay in the cache; a GPU waits on launches rather than on memory.
PAIRS_PER_BLOCK = {"cpu": 1 << 16, "other": PAIRS_AT_ONCE}
SMALLEST_BLOCK = 256  # boxes


def match_boxes(
    objects: Boxes, boxes: Boxes, matcher: "Matcher"
) -> tuple[torch.Tensor, torch.Tensor]:
    """``matcher(pairwise_iou(objects, boxes))`` without that matrix.

    Both results are bit-equal to Detectron2's, ties included: of several objects with a box's
    highest IoU the first is taken, 0 without any overlap. With ``allow_low_quality_matches``, all
    boxes that tie for an object's highest IoU are positive; an object that overlaps no box ties
    with all of them, as in Detectron2.

    Args:
        objects: M ground-truth boxes, XYXY, in pixels of the network input.
        boxes: N anchors or proposals in the same coordinates, on the same device.
        matcher: thresholds, labels and ``allow_low_quality_matches``. One of a subclass is given
            the whole matrix, whatever its size; so is any where a box is not finite.

    Returns:
        (N,) int64, the object each box is matched to, and (N,) int8 labels of the boxes.

    Source: Ren et al. 2015 (1506.01497), section 3.1.2; Detectron2's ``Matcher``.

    >>> from detectron2.modeling.matcher import Matcher
    >>> objects = Boxes(torch.tensor([[0.0, 0, 4, 4], [10, 10, 20, 20]]))
    >>> boxes = Boxes(torch.tensor([[0.0, 0, 4, 5], [40, 40, 50, 50], [10, 11, 20, 21]]))
    >>> match_boxes(objects, boxes, Matcher([0.3, 0.7], [0, -1, 1]))
    (tensor([0, 0, 1]), tensor([1, 0, 1], dtype=torch.int8))
    """
    # Detectron2's models import ours, and thereby this file.
    from detectron2.modeling.matcher import Matcher

    few = len(objects) * len(boxes) <= PAIRS_AT_ONCE
    if few or type(matcher) is not Matcher or not (_is_finite(objects) and _is_finite(boxes)):
        return matcher(pairwise_iou(objects, boxes))
    overlaps = _Overlaps(objects, boxes)
    highest, matches, best_of_objects, tied = overlaps.highest(matcher.allow_low_quality_matches)
    by_thresholds = copy.copy(matcher)
    by_thresholds.allow_low_quality_matches = False
    labels = by_thresholds(highest[None])[1]  # as if there were one object
    if matcher.allow_low_quality_matches:
        labels[tied] = 1
        if (best_of_objects == 0).any():
            labels.fill_(1)
    return matches, labels


def _is_finite(boxes: Boxes) -> bool:
    return bool(boxes.tensor.isfinite().all() & boxes.area().isfinite().all())


class _Overlaps:
    """The IoU of M objects and N boxes, block by block; pairs that are left out have IoU 0."""

    def __init__(self, objects: Boxes, boxes: Boxes):
        # x1, y1, x2, y2 and area, each contiguous: five rows
        self.objects_by_column, self.boxes_by_column = (
            torch.cat([given.tensor.T, given.area()[None]]) for given in (objects, boxes)
        )
        device = "cpu" if boxes.device.type == "cpu" else "other"
        self.pairs = PAIRS_PER_BLOCK[device]
        size = max(SMALLEST_BLOCK, self.pairs // len(objects))
        self.blocks = _by_size_and_place(boxes.tensor).split(size)

    def highest(
        self, with_ties: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of each box: the highest IoU and its first object; of each object: the highest IoU.

        And, if asked for, the boxes that have the highest IoU of an object, where it is not 0.
        """
        best_of_objects = torch.zeros_like(self.objects_by_column[0])
        highest = torch.zeros_like(self.boxes_by_column[0])
        matches = torch.zeros_like(highest, dtype=torch.int64)
        # (block, objects, their highest IoU in the block), where no block before had a higher one
        candidates = []
        for number, block in enumerate(self.blocks):
            best, first = highest[block], matches[block]
            for near, iou in self._of_block(block):
                value, row = iou.max(dim=0)
                higher = value > best  # the first of equals stays
                best[higher], first[higher] = value[higher], near[row[higher]]
                if with_ties:
                    of_objects = iou.amax(dim=1)
                    may_be = (of_objects >= best_of_objects[near]) & (of_objects > 0)
                    near, of_objects = near[may_be], of_objects[may_be]
                    best_of_objects[near] = of_objects
                    candidates.append((number, near, of_objects))
            highest[block], matches[block] = best, first
        tied = [self.blocks[0][:0]]
        for number, near, of_objects in candidates:
            are = of_objects == best_of_objects[near]
            if are.any():
                block, near = self.blocks[number], near[are]
                iou = self._iou(near, block)
                tied.append(block[(iou == best_of_objects[near][:, None]).any(dim=0)])
        return highest, matches, best_of_objects, torch.cat(tied)

    def _of_block(self, block: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Objects that reach into the block's outline, some at a time, and their IoU with it."""
        x1, y1, x2, y2 = self.objects_by_column[:4]
        boxes = self.boxes_by_column[:4, block]
        (left, top), (right, bottom) = boxes[:2].amin(dim=1), boxes[2:].amax(dim=1)
        reach = (x2 > left) & (x1 < right) & (y2 > top) & (y1 < bottom)
        for near in reach.nonzero().flatten().split(max(1, self.pairs // len(block))):
            if len(near):
                yield near, self._iou(near, block)

    def _iou(self, objects: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        """(m,) and (n,) indices -> (m, n), by the sums of Detectron2's ``pairwise_iou``."""
        x1, y1, x2, y2, area = self.objects_by_column[:, objects, None]
        other_x1, other_y1, other_x2, other_y2, other_area = self.boxes_by_column[:, boxes]
        width = torch.minimum(x2, other_x2).sub_(torch.maximum(x1, other_x1)).clamp_(min=0)
        height = torch.minimum(y2, other_y2).sub_(torch.maximum(y1, other_y1)).clamp_(min=0)
        intersection = width.mul_(height)
        union = torch.add(area, other_area, out=height).sub_(intersection)
        # 0 / 0 is 0: no areas, or those of swapped corners.
        return (intersection / union).nan_to_num_(nan=0.0)


def _by_size_and_place(boxes: torch.Tensor) -> torch.Tensor:
    """(N, 4) boxes -> (N,) indices, so that neighbours are alike in size and lie close together.

    By the power of two of the longer side, then by square cells of that side, row by row.
    """
    sides = (boxes[:, 2:] - boxes[:, :2]).amax(dim=1).clamp(min=1, max=2.0**20)
    power = sides.log2().floor()
    cells = ((boxes[:, :2] + boxes[:, 2:]) / (2 * 2 ** power[:, None])).floor().clamp(-1e6, 1e6)
    cells = (cells - cells.amin(dim=0)).long()
    width, height = (cells.amax(dim=0) + 1).tolist()
    return ((power.long() * height + cells[:, 1]) * width + cells[:, 0]).argsort()
