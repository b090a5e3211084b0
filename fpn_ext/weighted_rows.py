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

from typing import Any, NamedTuple

import torch

# Levels as the pooler has them: (N, C, H, W) float32 maps, fine to coarse.
Maps = list[torch.Tensor]


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
        maps: (N, C, H_i, W_i) float32, on CPU; channels_last ones are read where they are.
        rois: (R, 5) float32: image number and XYXY in pixels of the network input.
        map_index: (R,) int64: which of the maps a box is pooled from.
        scales: 1 / stride of each map.
        output_size: bins along y and along x.
        sampling_ratio: samples per bin and side, 0 for adaptive.
        aligned: torchvision's flag: half-pixel-correct coordinates.

    Returns:
        (R, C, *output_size) float32 in channels_last memory, equal to torchvision's to rounding.
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
        channels = maps[0].shape[1]
        pooled = maps[0].new_empty((rois.shape[0], height, width, channels))
        for i, features in enumerate(maps):
            rows = torch.nonzero(map_index == i).squeeze(1)
            if len(rows) == 0:
                continue
            bags = _bags(rois[rows], features.shape, settings.scales[i], settings)
            # No copy if it is channels_last already.
            by_cell = features.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
            table = by_cell.reshape(-1, channels)
            sums = _weighted_sums(table, bags.cells, bags.offsets, bags.weights)
            pooled[rows] = sums.view(-1, height, width, channels)
        return pooled.permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (gradient,) = grad_outputs
        rois, map_index = ctx.saved_tensors
        needed = ctx.needs_input_grad[3:]
        sums = map_gradients(gradient, rois, map_index, ctx.shapes, needed, ctx.settings)
        return None, None, None, *sums


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
        gradient: (R, C, *output_size) float32.
        rois: as for :func:`roi_align`.
        map_index: as for :func:`roi_align`.
        shapes: those of the maps.
        needed: whether to compute the gradient of a map.

    Returns:
        For each map (N, C, H_i, W_i) float32, or None where not needed.
    """
    by_bin = gradient.permute(0, 2, 3, 1)  # (R, height, width, C)
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
        bags = _bags(rois[rows], shape, settings.scales[i], settings)
        # From "the cells of each bin" to "the bins of each cell": sort by cell.
        sizes = torch.diff(bags.offsets, append=bags.offsets.new_tensor([len(bags.cells)]))
        bins = torch.repeat_interleave(
            torch.arange(len(sizes), dtype=bags.cells.dtype, device=rois.device), sizes.long()
        )
        order = torch.argsort(bags.cells, stable=True)
        uses = torch.bincount(bags.cells, minlength=n * height * width)
        offsets = (torch.cumsum(uses, 0) - uses).to(bags.cells.dtype)
        table = by_bin[rows].reshape(-1, channels)
        sums = _weighted_sums(table, bins[order], offsets, bags.weights[order])
        gradients.append(sums.view(n, height, width, channels).permute(0, 3, 1, 2))
    return gradients


class _Bags(NamedTuple):
    """Bin b is the sum of weights[e] * cell cells[e] over e from offsets[b] to offsets[b + 1]."""

    cells: torch.Tensor  # int32
    weights: torch.Tensor  # float32
    offsets: torch.Tensor  # int32, one per bin: boxes, then y, then x


def _weighted_sums(
    table: torch.Tensor, indices: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    return torch.nn.functional.embedding_bag(
        indices, table, offsets, mode="sum", per_sample_weights=weights
    )


def _bags(rois: torch.Tensor, shape: torch.Size, scale: float, settings: Settings) -> _Bags:
    _, _, map_height, map_width = shape
    bins_y, bins_x = settings.output_size
    y = _taps(rois[:, 2], rois[:, 4], bins_y, map_height, scale, settings)
    x = _taps(rois[:, 1], rois[:, 3], bins_x, map_width, scale, settings)
    first_row = rois[:, 0].to(torch.int32) * map_height

    # Every bin of a box has taps_y x taps_x cells, but boxes differ: bags in the order of the
    # boxes, filled by groups of boxes with equal counts.
    per_bin = y.taps * x.taps
    offsets = torch.repeat_interleave(per_bin, bins_y * bins_x)
    total = int(offsets.sum())
    offsets = torch.cumsum(offsets, 0) - offsets
    cells = rois.new_empty(total, dtype=torch.int32)
    weights = rois.new_empty(total)
    start_of_box = offsets[:: bins_y * bins_x]
    for key in torch.unique(y.taps * (1 << 20) + x.taps).tolist():
        taps_y, taps_x = key >> 20, key % (1 << 20)
        (box,) = torch.nonzero((y.taps == taps_y) & (x.taps == taps_x), as_tuple=True)
        row = (first_row[box, None, None] + y.cell[box, :, :taps_y]) * map_width
        column = x.cell[box, :, :taps_x]
        size = bins_y * bins_x * taps_y * taps_x
        at = start_of_box[box, None] + torch.arange(size, device=rois.device)
        # (boxes, bins_y, bins_x, taps_y, taps_x), flat in this order
        cells[at] = (row[:, :, None, :, None] + column[:, None, :, None, :]).view(-1, size)
        weights[at] = (
            y.weight[box, :, None, :taps_y, None] * x.weight[box, None, :, None, :taps_x]
        ).view(-1, size)
    return _Bags(cells, weights, offsets.to(torch.int32))


class _Taps(NamedTuple):
    """Along one axis: bin b of box r is the sum over t < taps[r] of weight[r, b, t] * cell[...]"""

    cell: torch.Tensor  # (R, bins, most taps) int32, within the map
    weight: torch.Tensor  # (R, bins, most taps) float32
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
    toward_upper = torch.where(lower < length - 1, position - lower, 0.0)
    share = torch.where(inside, 1.0 / samples[:, None, None].clamp(min=1), 0.0)
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
