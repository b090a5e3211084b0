"""Non-maximum suppression that finds the same boxes in every runtime.

Runtimes agree on the greedy algorithm and on the overlap, and differ where it equals the threshold:

================  =======================================================================
torchvision       drops a box if its float32 overlap exceeds the threshold, a double: one
                  of 0.3 is dropped at 0.3, since the float32 next to 0.3 lies above it
ONNX Runtime      the same with the threshold in float32: drops if it is exceeded
OpenVINO          drops a box if its overlap reaches the threshold, in float32
================  =======================================================================

No float32 number lies between :func:`neighbours` of a threshold, so that with the lower one in
ONNX Runtime and the upper one in OpenVINO all three drop the same boxes.

Detectron2 suppresses class by class, and level by level, through torchvision's ``batched_nms``. Up
to 1000 boxes it does so at once, with the boxes of each class moved away from the others, whose
coordinates are rounded by that: :func:`as_batched_nms_moves_them` rounds them alike.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import nms

# torchvision's batched_nms on a CPU moves the boxes of the classes apart up to this many.
MOST_MOVED = 1000


def neighbours(threshold: float) -> tuple[float, float]:
    """The largest float32 number up to ``threshold``, and the smallest above it.

    >>> below, above = neighbours(0.3)
    >>> below < 0.3 < above, float(np.float32(0.3)) == above
    (True, True)
    >>> neighbours(0.5)[0]
    0.5
    """
    nearest = np.float32(threshold)
    below = nearest if float(nearest) <= threshold else np.nextafter(nearest, np.float32(-1))
    above = np.nextafter(below, np.float32(2))
    # Runtimes may take numbers below the smallest normal one for 0.
    return float(below), float(max(above, np.finfo(np.float32).tiny))


def as_batched_nms_moves_them(
    boxes: torch.Tensor, labels: torch.Tensor, is_candidate: torch.Tensor
) -> torch.Tensor:
    """Boxes with the coordinates that torchvision's ``batched_nms`` compares on a CPU.

    Args:
        boxes: (N, R, 4) XYXY float32.
        labels: (R,) or (N, R) int64, the class or level of each.
        is_candidate: (N, R), the boxes that take part.

    Returns:
        (N, R, 4): as they are, in images with more than ``MOST_MOVED`` candidates; in others moved
        by their label times the largest coordinate plus 1.
    """
    largest = torch.where(is_candidate[:, :, None], boxes, torch.zeros_like(boxes))
    largest = largest.flatten(1).amax(dim=1, keepdim=True)  # (N, 1)
    moved = is_candidate.to(torch.int64).sum(dim=1, keepdim=True) <= MOST_MOVED
    offsets = labels.to(boxes.dtype) * (largest + 1) * moved.to(boxes.dtype)
    return boxes + offsets[:, :, None]


class Suppression(nn.Module):
    """Greedy non-maximum suppression within groups of boxes, by torchvision's operator.

    Called with ``boxes`` (B, R, 4), XYXY float32; ``scores`` (B, C, R) float32, positive for those
    that take part; and the threshold of the overlap. Returns (B, C, R) bool, the boxes that are
    kept: of each of the B C groups, those that no kept box of a higher score overlaps by more. Of
    equal scores the first counts as higher.

    Here all groups are suppressed at once, in float64, in which moving them apart rounds nothing
    that matters; the threshold is the one at which an overlap rounds to the upper of its float32
    :func:`neighbours`.
    """

    def forward(self, boxes: torch.Tensor, scores: torch.Tensor, threshold: float) -> torch.Tensor:
        image, label, row = torch.nonzero(scores > 0, as_tuple=True)
        chosen = boxes[image, row].to(torch.float64)
        extent = 2 * F.pad(boxes.abs().flatten(), [0, 1], value=1.0).max().to(torch.float64) + 1
        group = (image * scores.shape[1] + label).to(torch.float64)
        # torchvision tells torch.export that two boxes are kept at least: two that always are.
        chosen = F.pad(chosen + (group * extent)[:, None], [0, 0, 0, 2])
        chosen = chosen - F.pad(torch.arange(1.0, 3.0), [image.shape[0], 0])[:, None] * 4 * extent
        rank = F.pad(scores[image, label, row].to(torch.float64), [0, 2])
        kept = nms(chosen, rank, sum(neighbours(threshold)) / 2)
        is_kept = torch.zeros_like(rank, dtype=torch.bool)
        is_kept = is_kept.index_put((kept,), torch.ones_like(kept, dtype=torch.bool))
        found = torch.zeros_like(scores, dtype=torch.bool)
        return found.index_put((image, label, row), is_kept[: image.shape[0]])


class OperatorSuppression(Suppression):
    """:class:`Suppression` that ONNX's exporter by tracing writes as a NonMaxSuppression.

    Args:
        drops_equal: the runtime drops a box whose overlap equals the threshold, as OpenVINO.
    """

    def __init__(self, drops_equal: bool):
        super().__init__()
        self.drops_equal = drops_equal

    def forward(self, boxes: torch.Tensor, scores: torch.Tensor, threshold: float) -> torch.Tensor:
        threshold = neighbours(threshold)[int(self.drops_equal)]
        kept = _NonMaxSuppression.apply(boxes, scores, threshold)  # (K, 3): image, class, row
        groups, size = scores.shape[1], scores.shape[2]
        index = (kept[:, 0] * groups + kept[:, 1]) * size + kept[:, 2]
        found = torch.zeros_like(scores, dtype=torch.int32).flatten()
        found = found.scatter(0, index, torch.ones_like(index, dtype=torch.int32))
        return found.view_as(scores) > 0


class _NonMaxSuppression(torch.autograd.Function):
    """ONNX's operator; its value while it is traced does not matter, only the type."""

    @staticmethod
    def forward(ctx: Any, boxes: torch.Tensor, scores: torch.Tensor, _: float) -> torch.Tensor:
        return torch.nonzero(scores > 0)

    @staticmethod
    def symbolic(g: Any, boxes: Any, scores: Any, threshold: float) -> Any:
        def constant(number: torch.Tensor) -> Any:
            return g.op("Constant", value_t=number)

        return g.op(
            "NonMaxSuppression",
            boxes,
            scores,
            constant(torch.tensor([torch.iinfo(torch.int32).max])),  # no limit per class
            constant(torch.tensor([threshold], dtype=torch.float32)),
            constant(torch.tensor([0.0])),  # of a score
        )
