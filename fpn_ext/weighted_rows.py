"""RoIAlign of all boxes on all levels as weighted sums of rows: fast on CPU, in both directions.

RoIAlign is linear in the features and separable. A bin averages samples; a bilinear sample is a
weighted sum of four cells; so a bin is a weighted sum of the cells of a small rectangle, and the
weight of a cell is a weight of its row times a weight of its column. With the channels of a cell
side by side in memory (channels_last), that is torch's ``embedding_bag``: cells are the rows of a
table, a bin is a bag. The gradient is the same with the roles swapped: for each cell, the weighted
sum of the bins that used it.

torchvision's operator on CPU does the same sums channel by channel, on one thread, and adds
gradients cell by cell. Here both directions are vectorised and threaded, and the backward pass is
deterministic: no two threads add into one cell. What the sums need is computed again for the
backward pass, not kept.

The code runs on any device. On CUDA only the backward pass is used, where a deterministic one is
asked for (fpn_ext/fused_roi_align.py): sizes of intermediate results depend on the boxes, for which
the CPU has to wait.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

# Levels as the pooler has them: (N, C, H, W) maps, fine to coarse.
Maps = list[torch.Tensor]

# Boxes worked on at once: what their sums need beside maps and result is some 10 MB then.
BOXES_AT_ONCE = 128


def roi_align(
    maps: Maps,
    rois: torch.Tensor,
    map_index: torch.Tensor,
    scales: list[float],
    output_size: tuple[int, int],
    sampling_ratio: int,
    aligned: bool,
) -> torch.Tensor:
    """RoIAlign every box from its own map.

    Args:
        maps: (N, C, H_i, W_i), on CPU; channels_last ones of float32 or float64 are read where
            they are, others are copied. Half precision is summed in float32.
        rois: (R, 5), float32 or float64: image number and XYXY in pixels of the network input.
        map_index: (R,) int64: which of the maps a box is pooled from.
        scales: 1 / stride of each map.
        output_size: bins along y and along x.
        sampling_ratio: samples per bin and side, 0 for adaptive.
        aligned: torchvision's flag: half-pixel-correct coordinates.

    Returns:
        (R, C, *output_size) in the maps' dtype, in channels_last memory, equal to torchvision's to
        rounding.
    """
    settings = Settings(tuple(scales), output_size, sampling_ratio, aligned)
    return _WeightedRows.apply(settings, rois, map_index, *maps)


class Settings(NamedTuple):
    scales: tuple[float, ...]
    output_size: tuple[int, int]
    sampling_ratio: int
    aligned: bool


class _WeightedRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, settings: Settings, rois: Any, map_index: Any, *maps: Any) -> Any:
        ctx.settings = settings
        ctx.save_for_backward(rois, map_index)
        ctx.shapes = [m.shape for m in maps]
        height, width = settings.output_size
        channels, dtype = maps[0].shape[1], torch.promote_types(maps[0].dtype, torch.float32)
        pooled = maps[0].new_empty((rois.shape[0], height, width, channels))
        for i, features in enumerate(maps):
            rows = torch.nonzero(map_index == i).squeeze(1)
            if len(rows) == 0:
                continue
            # No copy if it is channels_last already.
            by_cell = features.to(dtype, memory_format=torch.channels_last).permute(0, 2, 3, 1)
            table = by_cell.reshape(-1, channels)
            for bags in _bags(rois[rows], features.shape, settings.scales[i], settings):
                sums = _weighted_sums(table, bags.cells, bags.weights)
                sums = sums.view(-1, height, width, channels)
                pooled[rows[bags.boxes]] = sums.to(pooled.dtype)
        return pooled.permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (gradient,) = grad_outputs
        rois, map_index = ctx.saved_tensors
        needed = ctx.needs_input_grad[3:]
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        sums = map_gradients(gradient.to(dtype), rois, map_index, ctx.shapes, needed, ctx.settings)
        return None, None, None, *(None if s is None else s.to(gradient.dtype) for s in sums)


def map_gradients(
    gradient: torch.Tensor,
    rois: torch.Tensor,
    map_index: torch.Tensor,
    shapes: list[torch.Size],
    needed: tuple[bool, ...],
    settings: Settings,
) -> list[torch.Tensor | None]:
    """The gradients of the maps from that of the pooled boxes; the same on every run.

    On CUDA, the same on every run under ``torch.use_deterministic_algorithms(True)``; the CPU waits
    for the GPU several times per map.

    Args:
        gradient: (R, C, *output_size), float32 or float64.
        rois: as for :func:`roi_align`.
        map_index: as for :func:`roi_align`.
        shapes: those of the maps.
        needed: whether to compute the gradient of a map.

    Returns:
        For each map (N, C, H_i, W_i) in the gradient's dtype, or None where not needed.
    """
    bins_y, bins_x = settings.output_size
    by_bin = gradient.permute(0, 2, 3, 1)  # (R, bins_y, bins_x, C)
    gradients: list[torch.Tensor | None] = []
    for i, shape in enumerate(shapes):
        if not needed[i]:
            gradients.append(None)
            continue
        n, channels, height, width = shape
        rows = torch.nonzero(map_index == i).squeeze(1)
        if len(rows) == 0:
            gradients.append(gradient.new_zeros(shape))
            continue
        # From "the cells of each bin" to "the bins of each cell": sort by cell.
        cells, bins, weights = [], [], []
        for bags in _bags(rois[rows], shape, settings.scales[i], settings):
            first_bin = bags.boxes * (bins_y * bins_x)
            every_bin = torch.arange(bins_y * bins_x, device=rois.device)
            bin_of_bag = (first_bin[:, None] + every_bin).to(torch.int32).view(-1, 1)
            cells.append(bags.cells.flatten())
            bins.append(bin_of_bag.expand_as(bags.cells).flatten())
            weights.append(bags.weights.flatten())
        used = torch.cat(cells)
        order = torch.argsort(used, stable=True)
        uses = torch.bincount(used, minlength=n * height * width)
        offsets = (torch.cumsum(uses, 0) - uses).to(used.dtype)
        table = by_bin[rows].reshape(-1, channels)
        sums = _weighted_sums(table, torch.cat(bins)[order], torch.cat(weights)[order], offsets)
        gradients.append(sums.view(n, height, width, channels).permute(0, 3, 1, 2))
    return gradients


class _Bags(NamedTuple):
    """The bins of some boxes, each the sum of weights[bin, e] * cell cells[bin, e] over e."""

    boxes: torch.Tensor  # int64, which of the boxes these are
    cells: torch.Tensor  # (bins: boxes, then y, then x; cells of a bin) int32
    weights: torch.Tensor  # the same, float32 or float64


def _weighted_sums(
    table: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    offsets: torch.Tensor | None = None,
) -> torch.Tensor:
    """(bags, C): a bag is a row of ``indices``, or begins where ``offsets`` says."""
    return torch.nn.functional.embedding_bag(
        indices, table, offsets, mode="sum", per_sample_weights=weights
    )


def _bags(
    rois: torch.Tensor, shape: torch.Size, scale: float, settings: Settings
) -> Iterator[_Bags]:
    """All boxes, in groups whose bins have equally many cells."""
    _, _, map_height, map_width = shape
    bins_y, bins_x = settings.output_size
    y = _taps(rois[:, 2], rois[:, 4], bins_y, map_height, scale, settings)
    x = _taps(rois[:, 1], rois[:, 3], bins_x, map_width, scale, settings)
    first_row = rois[:, 0].to(torch.int32) * map_height

    key, order = torch.sort(y.taps * (1 << 20) + x.taps, stable=True)
    keys, counts = torch.unique_consecutive(key, return_counts=True)
    groups = order.split(counts.tolist())
    for taps, group in zip(keys.tolist(), groups, strict=True):
        taps_y, taps_x = taps >> 20, taps % (1 << 20)
        for boxes in group.split(BOXES_AT_ONCE):
            row = (first_row[boxes, None, None] + y.cell[boxes, :, :taps_y]) * map_width
            column = x.cell[boxes, :, :taps_x]
            # (boxes, bins_y, bins_x, taps_y, taps_x)
            cells = row[:, :, None, :, None] + column[:, None, :, None, :]
            weights = (
                y.weight[boxes, :, None, :taps_y, None] * x.weight[boxes, None, :, None, :taps_x]
            )
            yield _Bags(boxes, cells.view(-1, taps_y * taps_x), weights.view(-1, taps_y * taps_x))


class _Taps(NamedTuple):
    """Along one axis: bin b of box r is the sum over t < taps[r] of weight[r, b, t] * cell[...]"""

    cell: torch.Tensor  # (R, bins, most taps) int32, within the map
    weight: torch.Tensor  # (R, bins, most taps) float32 or float64
    taps: torch.Tensor  # (R,) int64


def _taps(
    low: torch.Tensor,
    high: torch.Tensor,
    bins: int,
    length: int,
    scale: float,
    settings: Settings,
) -> _Taps:
    """The cells that the samples of each bin touch along an axis of ``length`` cells."""
    start = low * scale - (0.5 if settings.aligned else 0.0)
    size = (high * scale - (0.5 if settings.aligned else 0.0)) - start
    if not settings.aligned:
        size = torch.clamp(size, min=1.0)
    # By a tensor: CUDA divides by a number as it multiplies by the inverse, and 49 / 7 rounded up
    # would make eight samples of seven.
    bin_size = size / torch.full_like(size, bins)
    if settings.sampling_ratio > 0:
        samples = torch.full_like(low, settings.sampling_ratio, dtype=torch.int64)
    else:
        samples = torch.ceil(bin_size).to(torch.int64)
    # A box without size has no sample and no weight; it keeps one tap so that no bag is empty.
    most = max(int(samples.max()), 1)
    sample = torch.arange(most, device=low.device)
    position = (
        start[:, None, None]
        + torch.arange(bins, device=low.device)[None, :, None] * bin_size[:, None, None]
        + (sample + 0.5) * bin_size[:, None, None] / samples[:, None, None].clamp(min=1)
    )  # (R, bins, most)
    counts = sample < samples[:, None, None]
    inside = (position >= -1.0) & (position <= length) & counts
    position = torch.clamp(position, min=0.0)
    lower = torch.clamp(position.to(torch.int64), max=length - 1)
    upper = torch.clamp(lower + 1, max=length - 1)
    toward_upper = torch.where(lower < length - 1, position - lower, torch.zeros_like(position))
    share = 1.0 / samples[:, None, None].clamp(min=1).to(low.dtype)
    share = torch.where(inside, share, torch.zeros_like(share))
    upper_weight = toward_upper * share
    lower_weight = share - upper_weight

    # Neighbouring samples share cells. Samples at most one cell apart touch a run of at most
    # samples + 1 cells; those further apart are kept as they are, two cells each.
    last = (samples - 1).clamp(min=0)[:, None, None].expand(-1, bins, 1)
    run_start = lower[:, :, :1]
    run = (upper.gather(2, last) - run_start + 1).amax(dim=(1, 2))
    merged = run <= 2 * samples
    taps = torch.where(merged, run, 2 * samples).clamp(min=1)
    width = int(taps.max())
    cell = lower.new_zeros((len(low), bins, width))
    weight = low.new_zeros((len(low), bins, width))
    slots = torch.arange(width, device=low.device)
    cell[merged] = torch.clamp(run_start[merged] + slots, max=length - 1)
    last_slot = width - 1
    for neighbour, neighbour_weight, slot in (
        (lower, lower_weight, 2 * sample),
        (upper, upper_weight, 2 * sample + 1),
    ):
        slot = torch.where(merged[:, None, None], neighbour - run_start, slot)
        slot = torch.clamp(slot, max=last_slot)  # of samples that do not count
        weight.scatter_add_(2, slot, neighbour_weight)
        apart = ~merged
        cell[apart] = cell[apart].scatter(2, slot[apart], neighbour[apart])
    return _Taps(cell.to(torch.int32), weight, taps)
