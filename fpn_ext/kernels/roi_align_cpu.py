"""RoIAlign of all boxes on all levels as weighted sums of rows: fast on CPU, forward and backward.

RoIAlign is linear in the features and separable. A bin averages samples; a bilinear sample is a
weighted sum of four cells; so a bin is a weighted sum of the cells of a small rectangle, and a
cell's weight is a row weight times a column weight. With a cell's channels contiguous in memory
(channels_last), that is torch's ``embedding_bag``: cells are the rows of a table, a bin is a bag.
The gradient is the same with roles swapped: for each cell, the weighted sum of the bins that used
it.

torchvision's CPU operator computes the same sums channel by channel, on one thread, and accumulates
gradients cell by cell. Here both passes are vectorised and threaded, and the backward pass is
deterministic: no two threads add to the same cell. The indices and weights are recomputed for the
backward pass, not stored.

A box's bins are rectangles of cells. Concatenated, those of a hundred boxes on a map are one call
of ``embedding_bag``, whatever their sizes.

The code runs on any device. On CUDA only the backward pass is used, when determinism is requested
(fpn_ext/kernels/roi_align_cuda.py): sizes of intermediate results depend on the boxes, so the CPU
has to synchronise.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from .compiled import kernels
from .first_derivative import ROI_ALIGN, first_derivative_only
from .large import empty
from .roi_align_samples import Settings, samples_along, taps_along

# Levels as in the pooler: (N, C, H, W) maps, fine to coarse.
Maps = list[torch.Tensor]

# Boxes per batch: their intermediate results take some 6 MB. Fewer if they need more samples or
# cells than MOST_AT_ONCE.
BOXES_AT_ONCE = 96
MOST_AT_ONCE = 1 << 20
# Elements of NCHW maps, and of their gradients, transposed at once: they fit the cache.
TURNED_AT_ONCE = 1 << 20
GRADIENT_AT_ONCE = 1 << 17


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
        maps: (N, C, H_i, W_i), on CPU; channels_last maps are read in place, others are copied.
            Half precision is summed in float32 and rounded once; where the compiled kernel does not
            serve and no gradient is needed, weights are rounded to the maps' dtype too.
        rois: (R, 5), float32 or float64: image index and XYXY in pixels of the network input.
        map_index: (R,) int64: index of the map a box is pooled from.
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


class _WeightedRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, settings: Settings, rois: Any, map_index: Any, *maps: Any) -> Any:
        ctx.settings = settings
        ctx.save_for_backward(rois, map_index)
        ctx.shapes = [m.shape for m in maps]
        ctx.channels_last = [not m.is_contiguous() for m in maps]
        compiled = kernels()
        if compiled is not None and compiled.can_pool(maps, rois):
            by_cell = [_by_cell(m) if m.is_contiguous() else m for m in maps]
            return compiled.roi_align(by_cell, rois, map_index, *settings)
        channels, dtype = maps[0].shape[1], maps[0].dtype
        if any(ctx.needs_input_grad):
            dtype = torch.promote_types(dtype, torch.float32)
        pooled = maps[0].new_empty((len(rois), *settings.output_size, channels))
        for i, features in enumerate(maps):
            rows = torch.nonzero(map_index == i).squeeze(1)
            if len(rows) == 0:
                continue
            table = _table_of_cells(features.to(dtype))
            for bags in _bags(rois, rows, features.shape, settings.scales[i], settings):
                # Naming the sums would keep them alive beside the next ones.
                pooled.index_copy_(0, bags.boxes, _sums_of_bins(table, bags, pooled))
        return pooled.permute(0, 3, 1, 2)

    @staticmethod
    @first_derivative_only(ROI_ALIGN)
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (gradient,) = grad_outputs
        rois, map_index = ctx.saved_tensors
        needed = ctx.needs_input_grad[3:]
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        # In the maps' memory format, for efficient accumulation.
        sums = map_gradients(
            *(gradient.to(dtype), rois, map_index, ctx.shapes, needed, ctx.settings),
            ctx.channels_last,
        )
        return None, None, None, *(None if s is None else s.to(gradient.dtype) for s in sums)


def map_gradients(
    gradient: torch.Tensor,
    rois: torch.Tensor,
    map_index: torch.Tensor,
    shapes: list[torch.Size],
    needed: Sequence[bool],
    settings: Settings,
    channels_last: Sequence[bool] | None = None,
) -> list[torch.Tensor | None]:
    """The maps' gradients from that of the pooled boxes; deterministic.

    On CUDA, deterministic only under ``torch.use_deterministic_algorithms(True)``; the CPU waits
    for the GPU several times per map.

    Args:
        gradient: (R, C, *output_size), float32 or float64.
        rois: as for :func:`roi_align`.
        map_index: as for :func:`roi_align`.
        shapes: those of the maps.
        needed: whether to compute the gradient of a map.
        settings: of the pooling.
        channels_last: whether to compute it in channels_last memory or, slower, in NCHW. None:
            all in channels_last.

    Returns:
        For each map, (N, C, H_i, W_i) in the gradient's dtype, or None if not needed.
    """
    gradients: list[torch.Tensor | None] = []
    for i, shape in enumerate(shapes):
        if not needed[i]:
            gradients.append(None)
            continue
        n, channels, height, width = shape
        by_cell = channels_last is None or channels_last[i]
        rows = torch.nonzero(map_index == i).squeeze(1)
        if len(rows) == 0:
            zeros = gradient.new_zeros(shape)
            if by_cell:
                zeros = zeros.contiguous(memory_format=torch.channels_last)
            gradients.append(zeros)
            continue
        # From "the cells of each bin" to "the bins of each cell": sort by cell.
        cells, bins, weights, first_bin = [], [], [], 0
        for bags in _bags(rois, rows, shape, settings.scales[i], settings):
            cells.append(bags.cells)
            bins.append(bags.bag_of_cell() + first_bin)
            weights.append(bags.weights)
            first_bin += len(bags.offsets)
        used = torch.cat(cells)
        order = torch.argsort(used, stable=True)
        uses = torch.bincount(used, minlength=n * height * width)
        offsets = (torch.cumsum(uses, 0) - uses).to(used.dtype)
        sorted_bins = torch.cat(bins).index_select(0, order)
        sorted_weights = torch.cat(weights).index_select(0, order)
        table = _table_of_bins(gradient, rows)
        if by_cell:
            sums = weighted_sums(table, sorted_bins, sorted_weights, offsets)
            gradients.append(sums.view(n, height, width, channels).permute(0, 3, 1, 2))
        else:
            nchw = gradient.new_empty(shape)
            _sums_into_nchw(nchw, table, sorted_bins, sorted_weights, offsets)
            gradients.append(nchw)
    return gradients


def _sums_into_nchw(
    result: torch.Tensor,
    table: torch.Tensor,
    rows: torch.Tensor,
    weights: torch.Tensor,
    offsets: torch.Tensor,
) -> None:
    """As :func:`weighted_sums`, one bag per cell of the (N, C, H, W) result."""
    n, channels, height, width = result.shape
    by_image = result.view(n, channels, height * width)
    block = max(GRADIENT_AT_ONCE // channels, 1)
    first_cells = [(i, cell) for i in range(n) for cell in range(0, height * width, block)]
    begins = [i * height * width + cell for i, cell in first_cells]
    ends = [*begins[1:], len(offsets)]
    entries = [*offsets[begins].tolist(), len(rows)]
    for (i, cell), begin, end, (first, last) in zip(
        first_cells, begins, ends, itertools.pairwise(entries), strict=True
    ):
        sums = weighted_sums(
            table, rows[first:last], weights[first:last], offsets[begin:end] - first
        )
        by_image[i, :, cell : cell + end - begin] = sums.t()


def _table_of_bins(pooled: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """(R, C, bins_y, bins_x) -> (bins of these boxes, C): one row per bin."""
    channels, bins = pooled.shape[1], pooled.shape[2:].numel()
    table = _empty(pooled, (len(boxes), bins, channels))
    for part, into in zip(boxes.split(BOXES_AT_ONCE), table.split(BOXES_AT_ONCE), strict=True):
        into.copy_(pooled[part].flatten(2).transpose(1, 2))
    return table.flatten(0, 1)


def _empty(like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    return empty(shape, dtype=like.dtype) if like.device.type == "cpu" else like.new_empty(shape)


def _sums_of_bins(table: torch.Tensor, bags: "_Bags", like: torch.Tensor) -> torch.Tensor:
    """(boxes, bins_y, bins_x, C), in the dtype and shape of ``like``."""
    sums = weighted_sums(table, bags.cells, bags.weights, bags.offsets)
    return sums.view(-1, *like.shape[1:]).to(like.dtype)


def _table_of_cells(maps: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W) -> (N H W, C): one row per cell; channels_last maps are not copied.

    torch copies NCHW maps pixel by pixel, several times slower if a channel's size is close to a
    multiple of a kilobyte: channels then compete for the same cache lines.
    """
    n, channels, height, width = maps.shape
    if not maps.is_contiguous():
        return maps.permute(0, 2, 3, 1).reshape(-1, channels)
    table = _empty(maps, (n, height * width, channels))
    pixels = max(TURNED_AT_ONCE // channels, 1)
    for image, by_cell in zip(maps.flatten(2), table, strict=True):
        for part, cells in zip(image.split(pixels, dim=1), by_cell.split(pixels), strict=True):
            cells.copy_(part.t())
    return table.flatten(0, 1)


def _by_cell(maps: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W), copied to channels_last memory."""
    n, channels, height, width = maps.shape
    return _table_of_cells(maps).view(n, height, width, channels).permute(0, 3, 1, 2)


def weighted_sums(
    table: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor, offsets: torch.Tensor
) -> torch.Tensor:
    """(bags, C): sums of ``weights`` times ``rows`` of the table; bags start at ``offsets``."""
    return torch.nn.functional.embedding_bag(
        rows, table, offsets, mode="sum", per_sample_weights=weights.to(table.dtype)
    )


class _Bags(NamedTuple):
    """The bins of some boxes, ordered by box, y, x, each a weighted sum of cells."""

    boxes: torch.Tensor  # int64, indices of these boxes
    cells: torch.Tensor  # (cells of all bins,) int32
    weights: torch.Tensor  # (cells of all bins,) float32 or float64
    offsets: torch.Tensor  # (bins,) int32, start of a bin's cells
    line: torch.Tensor  # (cells of all bins,) int32: a bin has a line of cells for each of its rows
    bag_of_line: torch.Tensor  # (lines,) int32

    def bag_of_cell(self) -> torch.Tensor:
        """(cells of all bins,) int32: bin index, across these boxes."""
        return self.bag_of_line.index_select(0, self.line)


def _bags(
    rois: torch.Tensor, rows: torch.Tensor, shape: torch.Size, scale: float, settings: Settings
) -> Iterator[_Bags]:
    """Batches of the ``rois`` selected by ``rows``, all on one map."""
    left = list(rows.split(BOXES_AT_ONCE))[::-1]
    while left:
        boxes = left.pop()
        bags = _bags_of_few(rois, boxes, shape, scale, settings)
        if bags is None:
            left += boxes.chunk(2)[::-1]
        else:
            yield bags


def _bags_of_few(
    rois: torch.Tensor, boxes: torch.Tensor, shape: torch.Size, scale: float, settings: Settings
) -> _Bags | None:
    """None if the boxes are too large for one batch."""
    _, _, map_height, map_width = shape
    bins_y, bins_x = settings.output_size
    most = MOST_AT_ONCE if len(boxes) > 1 else math.inf
    image, x1, y1, x2, y2 = rois[boxes].unbind(1)
    y_samples = samples_along(y1, y2, bins_y, scale, settings)
    x_samples = samples_along(x1, x2, bins_x, scale, settings)
    if len(boxes) * max(bins_y * y_samples.most, bins_x * x_samples.most) > most:
        return None
    y, x = taps_along(y_samples, bins_y, map_height), taps_along(x_samples, bins_x, map_width)
    if int((y.taps * x.taps).sum()) * bins_y * bins_x > most:
        return None

    def of_bins(values: torch.Tensor) -> torch.Tensor:
        return values.expand(-1, bins_y, bins_x).flatten()

    # A bin has a line of cells for each of its rows: first all lines, then all cells of all lines.
    row_taps, column_taps = y.taps[:, None, None], x.taps[:, None, None]
    bag_of_line, row = _ranges(of_bins(y.place()[:, :, None]), of_bins(row_taps))
    first_column = of_bins(x.place()[:, None, :]).index_select(0, bag_of_line)
    line, column = _ranges(first_column, of_bins(column_taps).index_select(0, bag_of_line))
    rows = (image.to(torch.int32)[:, None, None] * map_height + y.cell) * map_width
    begin = rows.flatten().index_select(0, row)
    cells = begin.index_select(0, line) + x.cell.flatten().index_select(0, column)
    row_weight = y.weight.flatten().index_select(0, row)
    weights = row_weight.index_select(0, line) * x.weight.flatten().index_select(0, column)
    offsets = _begins(of_bins(row_taps * column_taps))
    return _Bags(boxes, cells, weights, offsets, line, bag_of_line)


def _ranges(first: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Concatenated ranges: for each i, ``lengths[i]`` numbers from first[i] on.

    Returns:
        The i of each number, and the numbers; int32, like ``first`` and ``lengths``.
    """
    i = torch.repeat_interleave(lengths)
    shift = (first - _begins(lengths)).index_select(0, i)
    return i, shift.add_(torch.arange(len(i), dtype=torch.int32, device=i.device))


def _begins(lengths: torch.Tensor) -> torch.Tensor:
    return torch.cumsum(lengths, 0, dtype=torch.int32) - lengths
