"""Where RoIAlign's samples lie along one axis, and which cells of a map they read with what weight.

The same along y and along x: RoIAlign is separable.
"""

from typing import NamedTuple

import torch


class Settings(NamedTuple):
    scales: tuple[float, ...]
    output_size: tuple[int, int]
    sampling_ratio: int
    aligned: bool


class _Samples(NamedTuple):
    """Along one axis, in cells of the map: bin b of box r has samples at start[r] + b * bin[r] +
    (s + 1/2) * bin[r] / samples[r], for s < samples[r]."""

    start: torch.Tensor  # (R,) float32 or float64
    bin: torch.Tensor  # (R,) the same
    samples: torch.Tensor  # (R,) int64, of a bin
    most: int  # their maximum, >= 1


def samples_along(
    low: torch.Tensor, high: torch.Tensor, bins: int, scale: float, settings: Settings
) -> _Samples:
    start = low * scale - (0.5 if settings.aligned else 0.0)
    size = (high * scale - (0.5 if settings.aligned else 0.0)) - start
    if not settings.aligned:
        size = torch.clamp(size, min=1.0)
    # By a tensor: CUDA divides by a scalar by multiplying with its inverse, and 49 / 7 rounded up
    # would turn seven samples into eight.
    bin_size = size / torch.full_like(size, bins)
    if settings.sampling_ratio > 0:
        count = torch.full_like(low, settings.sampling_ratio, dtype=torch.int64)
    else:
        count = torch.ceil(bin_size).to(torch.int64)
    return _Samples(start, bin_size, count, max(int(count.max()), 1))


class _Taps(NamedTuple):
    """Along one axis: bin b of box r is the sum over t < taps[r] of weight[r, b, t] * cell[...]"""

    cell: torch.Tensor  # (R, bins, most taps + 1) int32, within the map
    weight: torch.Tensor  # the same, float32 or float64
    taps: torch.Tensor  # (R,) int32, at least 1: no bag is empty

    def place(self) -> torch.Tensor:
        """(R, bins) int32: start of a bin in ``cell`` and ``weight``, flattened."""
        boxes, bins, width = self.cell.shape
        every = torch.arange(boxes * bins, dtype=torch.int32, device=self.cell.device)
        return (every * width).view(boxes, bins)


def taps_along(samples: _Samples, bins: int, length: int) -> _Taps:
    """The cells that the samples of each bin touch along an axis of ``length`` cells."""
    start, bin_size, count = (t[:, None, None] for t in samples[:3])
    sample = torch.arange(samples.most, device=start.device)
    bin_number = torch.arange(bins, device=start.device)[:, None]
    divisor = count.clamp(min=1)  # a box without size has no sample and no weight
    position = start + bin_number * bin_size + (sample + 0.5) * bin_size / divisor
    inside = (position >= -1.0) & (position <= length) & (sample < count)
    share = torch.where(inside, 1.0 / divisor.to(position.dtype), 0.0)
    position = position.clamp(min=0.0, max=length - 1)  # (R, bins, most)
    lower = position.to(torch.int64)
    upper_weight = (position - lower) * share

    # Adjacent samples share cells. Samples at most one cell apart touch a run of at most
    # samples + 1 cells; those further apart stay separate, two cells each.
    first = lower[:, :, :1]
    last = lower.gather(2, (divisor - 1).expand_as(first))
    run = (torch.clamp(last + 1, max=length - 1) - first + 1).amax(dim=(1, 2), keepdim=True)
    merged = run <= 2 * divisor
    taps = torch.where(merged, run, 2 * divisor)
    # One more than the maximum: the last cell's upper neighbour, with weight 0.
    width = int(taps.max()) + 1
    slots = torch.arange(width, device=start.device)
    slot = torch.where(merged, lower - first, 2 * sample)
    slot = torch.clamp(slot, max=width - 2)  # for unused samples
    weight = share.new_zeros((*first.shape[:2], width))
    weight.scatter_add_(2, slot, share - upper_weight)
    weight.scatter_add_(2, slot + 1, upper_weight)
    cell = first + slots
    if not merged.all():
        apart = ~merged.flatten()
        cell[apart] = cell[apart].scatter(2, slot[apart], lower[apart])
        cell[apart] = cell[apart].scatter(2, slot[apart] + 1, lower[apart] + 1)
    cell = torch.clamp(cell, max=length - 1).to(torch.int32)
    return _Taps(cell, weight, taps.flatten().to(torch.int32))
