"""The Triton kernel behind fpn_ext/kernels/roi_align_cuda.py, and its launch.

RoIAlign is separable: a bin is a weighted sum of the cells of a small rectangle, and a cell's
weight is a row weight times a column weight (see :mod:`.roi_align_cpu`). Each program of the kernel
handles one bin and a block of channels and loops over the rectangle, four columns at a time; in
channels_last maps a cell's channels are contiguous, so every access is contiguous. Forward, the
cells are read and accumulated; backward, the bin's gradient times the same weights is added to the
cells. Each cell is accessed once per bin, rather than up to four cells per sample.

Each program reads the level of its box, so boxes are not sorted by level, one launch serves all,
and the CPU never synchronises with the GPU.
"""

import types
from typing import Any

import torch

from .roi_align_samples import Settings

try:
    import triton
    import triton.language as tl
except ImportError:  # not included with torch for CPU or macOS
    triton = None
    tl = types.SimpleNamespace(constexpr=None)  # used in the kernel's annotations

MOST_LEVELS = 8  # kernel arguments for each property of a level

COLUMNS = 4  # of a bin's rectangle, read at a time
MOST_CHANNELS = 256  # of one program


def launch(
    by_cell: list[torch.Tensor],
    by_bin: torch.Tensor,
    rois: torch.Tensor,
    map_index: torch.Tensor,
    wanted: int,
    settings: Settings,
    backward: bool,
) -> None:
    """Forward: compute bins from maps. Backward: add the bins' gradients to the maps'.

    Args:
        by_cell: (N, H_i, W_i, C) maps, or float32 gradients of maps, contiguous.
        by_bin: (R, bins along y, bins along x, C), or its gradient, contiguous.
        wanted: bit i is set if map i is included.
    """
    boxes, bins_y, bins_x, channels = by_bin.shape
    if by_bin.numel() == 0:
        return
    block = min(triton.next_power_of_2(channels), MOST_CHANNELS)
    padded = by_cell + by_cell[-1:] * (MOST_LEVELS - len(by_cell))
    scales = settings.scales + settings.scales[-1:] * (MOST_LEVELS - len(by_cell))
    # Triton launches on the current device, regardless of the tensors'.
    with torch.cuda.device_of(by_bin):
        kernel[(boxes * bins_y * bins_x, triton.cdiv(channels, block))](
            by_bin,
            rois.contiguous(),
            map_index.contiguous(),
            wanted,
            *padded,
            *(m.shape[1] for m in padded),
            *(m.shape[2] for m in padded),
            *scales,
            CHANNELS=channels,
            BINS_Y=bins_y,
            BINS_X=bins_x,
            SAMPLING_RATIO=settings.sampling_ratio,
            ALIGNED=settings.aligned,
            BACKWARD=backward,
            CHANNEL_BLOCK=block,
            COLUMN_BLOCK=COLUMNS,
            num_warps=max(1, COLUMNS * block // 256),
        )


# The kernel. It is not specialised on map sizes: they vary between images, and every new pattern of
# sizes that are 1 or divisible by 16 would trigger a compilation.


def _jit(function: Any) -> Any:
    sizes = [f"{name}{i}" for name in ("height", "width") for i in range(MOST_LEVELS)]
    return triton.jit(function, do_not_specialize=["wanted", *sizes]) if triton else function


def _jit_helper(function: Any) -> Any:
    return triton.jit(function) if triton else function


@_jit_helper
def _of_level(level, v0, v1, v2, v3, v4, v5, v6, v7):  # type: ignore[no-untyped-def]
    """Selects one of eight arguments: a kernel cannot take lists."""
    v = tl.where(level == 1, v1, v0)
    v = tl.where(level == 2, v2, v)
    v = tl.where(level == 3, v3, v)
    v = tl.where(level == 4, v4, v)
    v = tl.where(level == 5, v5, v)
    v = tl.where(level == 6, v6, v)
    v = tl.where(level == 7, v7, v)
    return v


@_jit_helper
def _samples_of_bin(  # type: ignore[no-untyped-def]
    low,
    high,
    number,
    scale,
    length,
    BINS: tl.constexpr,
    SAMPLING_RATIO: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Along one axis: start, size and sample count of a bin; first and last cell sampled.

    Divisions are correctly rounded (div_rn), as in torchvision: if 14 / 7 came out above 2, two
    samples would become three.
    """
    OFFSET: tl.constexpr = 0.5 if ALIGNED else 0.0
    start = low * scale - OFFSET
    size = (high * scale - OFFSET) - start
    if not ALIGNED:
        size = tl.maximum(size, 1.0)
    bin_size = tl.div_rn(size, BINS * 1.0)
    samples = tl.full((), SAMPLING_RATIO, tl.float32) if SAMPLING_RATIO > 0 else tl.ceil(bin_size)
    start += number * bin_size
    divisor = tl.maximum(samples, 1.0)
    near = start + tl.div_rn(0.5 * bin_size, divisor)
    far = start + tl.div_rn((samples - 0.5) * bin_size, divisor)
    first = tl.minimum(tl.maximum(near, 0.0), length - 1.0).to(tl.int32)
    last = tl.minimum(tl.maximum(far, 0.0), length - 1.0).to(tl.int32)
    # A sample lies between two adjacent cells.
    return start, bin_size, samples, first, tl.minimum(last + 1, length - 1)


@_jit_helper
def _shares(cell, nearest, furthest, start, bin_size, samples, length):  # type: ignore[no-untyped-def]
    """Each cell's bilinear weights, summed over a bin's samples along one axis.

    ``nearest`` and ``furthest`` bound the cells, and so the samples to loop over.
    """
    divisor = tl.maximum(samples, 1.0)
    # Samples less than 1 from a cell contribute; at the border up to 1, with full weight. The
    # extra 0.25 allows for rounding; samples too far away get weight 0 below.
    step = tl.maximum(tl.div_rn(bin_size, divisor), 1e-30)
    begin = tl.floor((nearest - 1.25 - start) / step - 0.5)
    end = tl.ceil((furthest + 1.25 - start) / step + 0.5)
    begin = tl.minimum(tl.maximum(begin, 0.0), samples).to(tl.int32)
    end = tl.minimum(tl.maximum(end, 0.0), samples).to(tl.int32)
    shares = cell * 0.0
    sample = begin
    while sample < end:
        position = start + tl.div_rn((sample + 0.5) * bin_size, divisor)
        inside = (position >= -1.0) & (position <= length)
        position = tl.minimum(tl.maximum(position, 0.0), length - 1.0)
        shares += tl.where(inside, tl.maximum(1.0 - tl.abs(position - cell), 0.0), 0.0)
        sample += 1
    return shares


@_jit
def kernel(  # type: ignore[no-untyped-def]
    by_bin,
    rois,
    map_index,
    wanted,
    map0,
    map1,
    map2,
    map3,
    map4,
    map5,
    map6,
    map7,
    height0,
    height1,
    height2,
    height3,
    height4,
    height5,
    height6,
    height7,
    width0,
    width1,
    width2,
    width3,
    width4,
    width5,
    width6,
    width7,
    scale0,
    scale1,
    scale2,
    scale3,
    scale4,
    scale5,
    scale6,
    scale7,
    CHANNELS: tl.constexpr,
    BINS_Y: tl.constexpr,
    BINS_X: tl.constexpr,
    SAMPLING_RATIO: tl.constexpr,
    ALIGNED: tl.constexpr,
    BACKWARD: tl.constexpr,
    CHANNEL_BLOCK: tl.constexpr,
    COLUMN_BLOCK: tl.constexpr,
):
    """One bin of one box, ``CHANNEL_BLOCK`` channels of it; see :func:`launch`."""
    program = tl.program_id(0)
    box = program // (BINS_Y * BINS_X)
    bin_y = program // BINS_X % BINS_Y
    bin_x = program % BINS_X
    level = tl.load(map_index + box)
    if (wanted >> level) & 1 == 0:
        return
    cells = _of_level(level, map0, map1, map2, map3, map4, map5, map6, map7)
    height = _of_level(
        level, height0, height1, height2, height3, height4, height5, height6, height7
    )
    width = _of_level(level, width0, width1, width2, width3, width4, width5, width6, width7)
    scale = _of_level(level, scale0, scale1, scale2, scale3, scale4, scale5, scale6, scale7)

    roi = rois + box * 5
    image = tl.load(roi).to(tl.int64)  # int64: a map may have over 2^31 elements
    start_y, size_y, samples_y, first_y, last_y = _samples_of_bin(
        tl.load(roi + 2), tl.load(roi + 4), bin_y, scale, height, BINS_Y, SAMPLING_RATIO, ALIGNED
    )
    start_x, size_x, samples_x, first_x, last_x = _samples_of_bin(
        tl.load(roi + 1), tl.load(roi + 3), bin_x, scale, width, BINS_X, SAMPLING_RATIO, ALIGNED
    )
    average = tl.div_rn(1.0, tl.maximum(samples_y * samples_x, 1.0))

    channel = tl.program_id(1) * CHANNEL_BLOCK + tl.arange(0, CHANNEL_BLOCK)
    is_channel = channel < CHANNELS
    bin_channels = by_bin + program.to(tl.int64) * CHANNELS + channel
    column = tl.arange(0, COLUMN_BLOCK)
    tile = column[:, None] * CHANNELS + channel[None, :]
    if BACKWARD:
        bin_gradient = tl.load(bin_channels, mask=is_channel, other=0.0).to(tl.float32) * average
    sums = tl.zeros((COLUMN_BLOCK, CHANNEL_BLOCK), tl.float32)
    x = first_x
    while x <= last_x:
        shares_x = _shares(x + column, x, x + COLUMN_BLOCK - 1, start_x, size_x, samples_x, width)
        y = first_y
        while y <= last_y:
            weights = shares_x * _shares(y, y, y, start_y, size_y, samples_y, height)
            # Cells outside the map have weight 0.
            mask = (weights > 0.0)[:, None] & is_channel[None, :]
            at = cells + ((image * height + y) * width + x) * CHANNELS + tile
            if BACKWARD:
                tl.atomic_add(at, weights[:, None] * bin_gradient[None, :], mask, sem="relaxed")
            else:
                sums += weights[:, None] * tl.load(at, mask=mask, other=0.0).to(tl.float32)
            y += 1
        x += COLUMN_BLOCK
    if not BACKWARD:
        pooled = tl.sum(sums, axis=0) * average
        tl.store(bin_channels, pooled.to(by_bin.dtype.element_ty), mask=is_channel)


# TRITON_INTERPRET=1, set before importing Triton, runs the kernel in NumPy, also on CPU maps.
INTERPRETED = triton is not None and not isinstance(kernel, triton.runtime.JITFunction)
