"""What the stages of an exported detector have in common: rows of boxes and scores."""

from typing import Any

import torch
import torch.nn.functional as F

ABSENT = -1.0  # the score of a row that is not there: no probability


def by_anchor(x: torch.Tensor, values: int) -> torch.Tensor:
    """(N, A values, H, W) -> (N, H W A, values), in the order of the anchors."""
    n, channels, height, width = x.shape
    x = x.reshape(n, channels // values, values, height, width)
    return x.permute(0, 3, 4, 1, 2).reshape(n, -1, values)


def top(scores: torch.Tensor, count: int, lowest: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``count`` best of (N, M) and their columns; where M is less, ``lowest`` and column 0."""
    best, index = F.pad(scores, [0, count], value=lowest).topk(count, dim=1)
    return best, torch.where(best > lowest, index, torch.zeros_like(index))


def above(scores: torch.Tensor, threshold: float) -> torch.Tensor:
    """Scores above the threshold; ``ABSENT`` in the place of others."""
    return torch.where(scores > threshold, scores, absent(scores))


def absent(scores: torch.Tensor) -> torch.Tensor:
    return torch.full_like(scores, ABSENT)


def rows_of(boxes: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """(N, M, 4) and (N, K) rows -> (N, K, 4)."""
    return boxes.gather(1, index[:, :, None].expand(-1, -1, 4))


def decoded(
    transform: Any, anchors: torch.Tensor, deltas: torch.Tensor, index: torch.Tensor
) -> torch.Tensor:
    """(A, 4) anchors, (N, A, 4) deltas and (N, K) anchors' rows -> (N, K, 4) boxes."""
    chosen = transform.apply_deltas(rows_of(deltas, index).flatten(0, 1), anchors[index.flatten()])
    return chosen.reshape(index.shape[0], -1, 4)


def clipped(boxes: torch.Tensor, size: Any) -> torch.Tensor:
    height, width = size
    x0, y0, x1, y1 = boxes.unbind(dim=-1)
    clipped = [x0.clamp(0, width), y0.clamp(0, height), x1.clamp(0, width), y1.clamp(0, height)]
    return torch.stack(clipped, dim=-1)


def larger_than(boxes: torch.Tensor, side: float) -> torch.Tensor:
    sides = boxes[..., 2:] - boxes[..., :2]
    return (sides > side).all(dim=-1)


def rois(image: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """(R,) images and (R, 4) boxes -> (R, 5)."""
    return torch.cat((image[:, None].to(boxes.dtype), boxes), dim=1)
