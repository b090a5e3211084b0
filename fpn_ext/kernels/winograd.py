"""3x3 convolution with a quarter of the multiplications, on CPU: Winograd's F(4x4, 3x3).

Lavin & Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016 (arXiv 1509.09308). The
pyramid's and the RPN's 3x3 convolutions on P2 and P3 are half the work of the whole model and are
compute-bound: only fewer multiplications can make them faster.

A tile of 4x4 outputs needs 6x6 inputs. Tile and filter are transformed (polynomials evaluated at
six points), multiplied channel by channel, and transformed back:

    Y = A^T [ (G g G^T) * (B^T d B) ] A

The sum over input channels turns the products into 36 matrix products over all tiles at once. The
points are 0, +-5/8, +-3/2 and infinity instead of the usual 0, +-1, +-2 and infinity: closer in
magnitude, they have a third of the rounding error, which makes float32 as accurate as direct sums.

Each thread takes a strip of the map through all steps. If each step were divided among the threads,
as torch does, cores would read what others have just written.
"""

import itertools
import math
import threading
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from . import threads
from .large import empty

POINTS = (0.0, 5 / 8, -5 / 8, 3 / 2, -3 / 2)  # and infinity
OUTPUTS, INPUTS = 4, 6  # side of a tile

# With fewer channels the transforms cost all that is saved (2 cores, AVX-512).
FEWEST_CHANNELS = 256
# Tiles transformed at once: enough for matrix products at full speed, few enough for the cache.
TILES_AT_ONCE = 100
# In 4x4 tiles times channels; on smaller maps the direct sums are as fast. (OpenMP's threads spin
# on their cores for some milliseconds after an operation.)
SMALLEST_MAP = 60_000
PADDING = 272  # floats


def is_3x3(convolution: nn.Module) -> bool:
    """Whether it is a 3x3 convolution of stride 1 and padding 1, without groups."""
    return (
        isinstance(convolution, nn.Conv2d)
        and convolution.kernel_size == (3, 3)
        and convolution.stride == (1, 1)
        and convolution.padding == (1, 1)
        and convolution.dilation == (1, 1)
        and convolution.groups == 1
        and convolution.padding_mode == "zeros"
    )


def serves(convolution: nn.Module) -> bool:
    """Whether :class:`WinogradConv2d` can replace this convolution, and may be faster."""
    return (
        isinstance(convolution, nn.Conv2d)
        and is_3x3(convolution)
        and convolution.weight.dtype == torch.float32
        and min(convolution.in_channels, convolution.out_channels) >= FEWEST_CHANNELS
    )


class WinogradConv2d(nn.Module):
    """A 3x3 convolution of stride 1 and padding 1, with an optional ReLU. No gradients.

    Args:
        weight: (O, I, 3, 3) float32.
        bias: (O,) or None.
        relu: whether to apply a ReLU.
    """

    weight: torch.Tensor
    transformed_weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, relu: bool = False):
        super().__init__()
        if tuple(weight.shape[2:]) != (3, 3):
            raise ValueError(f"the weight must be (O, I, 3, 3), got {tuple(weight.shape)}")
        weight = weight.detach()
        self.register_buffer("weight", weight.contiguous(memory_format=torch.channels_last))
        transformed = transform_weight(weight.double()).to(weight.dtype)
        self.register_buffer("transformed_weight", transformed)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self.relu = relu

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, I, H, W), fastest in channels_last memory -> (N, O, H, W) in channels_last memory."""
        if not large_enough(x):
            direct = F.conv2d(x, self.weight, self.bias, padding=1)
            return F.relu_(direct) if self.relu else direct
        return convolve(x, self.transformed_weight, self.bias, self.relu)


def large_enough(x: torch.Tensor) -> bool:
    """Whether maps (N, I, H, W) are large enough for the direct sums to be slower."""
    _, channels, height, width = x.shape
    return -(-height // OUTPUTS) * -(-width // OUTPUTS) * channels >= SMALLEST_MAP


def transform_weight(weight: torch.Tensor) -> torch.Tensor:
    """(O, I, 3, 3), float32 or float64 -> (36, I, O): G g G^T of every filter."""
    out_channels, channels = weight.shape[:2]
    by_tap = weight.permute(2, 3, 1, 0).reshape(9, channels * out_channels)
    return torch.mm(WEIGHT_TRANSFORM.to(weight.dtype), by_tap).view(
        INPUTS**2, channels, out_channels
    )


def convolve(
    x: torch.Tensor,
    transformed_weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    relu: bool = False,
) -> torch.Tensor:
    """Convolve maps on the CPU with stride 1 and padding 1. No gradients are recorded.

    Args:
        x: (N, I, H, W) float32, fastest in channels_last memory.
        transformed_weight: (36, I, O), from :func:`transform_weight`.
        bias: (O,) or None.
        relu: whether to apply a ReLU.

    Returns:
        (N, O, H, W) in channels_last memory.
    """
    n, _, height, width = x.shape
    tiles_y, tiles_x = -(-height // OUTPUTS), -(-width // OUTPUTS)
    # An even number of strips with nearly equal rows, for an even number of threads.
    count = min(tiles_y, 2 * -(-tiles_y * tiles_x // (2 * TILES_AT_ONCE)))
    bounds = [tiles_y * i // count for i in range(count + 1)]
    strips = [(i, *ends) for i in range(n) for ends in itertools.pairwise(bounds)]
    size = (n, transformed_weight.shape[2], height, width)
    result = empty(size, channels_last=True, dtype=x.dtype)
    maps, most_rows = (x.permute(0, 2, 3, 1), result.permute(0, 2, 3, 1)), -(-tiles_y // count)
    threads.share(
        lambda own: _convolve_strips(*maps, own, most_rows, transformed_weight, bias, relu), strips
    )
    return result


def _convolve_strips(
    x: torch.Tensor,
    result: torch.Tensor,
    strips: Iterable[tuple[int, int, int]],
    most_rows: int,
    transformed_weight: torch.Tensor,
    bias: torch.Tensor | None,
    relu: bool,
) -> None:
    """(N, H, W, I) -> (N, H, W, O) for these strips, (image, first, end) tile rows each."""
    _, height, width, channels = x.shape
    out_channels = result.shape[3]
    tiles_x = -(-width // OUTPUTS)
    # A strip of tile rows, zero-padded around the map, and scratch memory for the steps. Scratch
    # rows a multiple of 4096 bytes apart would compete for the same few cache lines.
    strip_shape = (OUTPUTS * most_rows + 2, OUTPUTS * tiles_x + 2, channels)
    overhang_shape = (OUTPUTS * most_rows, OUTPUTS * tiles_x, out_channels)
    step = most_rows * tiles_x * max(channels, out_channels) + PADDING
    strip, overhang, scratch = _workspace(x, (strip_shape, overhang_shape, (2, INPUTS**2, step)))
    strip.zero_()
    for image, first, end in strips:
        top, bottom = OUTPUTS * first - 1, OUTPUTS * end + 1
        inside = slice(max(top, 0), min(bottom, height))
        strip[: inside.start - top] = 0
        strip[inside.start - top : inside.stop - top, 1 : width + 1] = x[image, inside]
        strip[inside.stop - top :] = 0

        # If the tiles end exactly at the map's border, outputs are written in place.
        here = result[image, OUTPUTS * first : OUTPUTS * end]
        fits = len(here) == OUTPUTS * (end - first) and width == OUTPUTS * tiles_x
        into = here if fits else overhang[: OUTPUTS * (end - first)]
        _convolve_strip(
            strip,
            into.view(end - first, OUTPUTS, tiles_x, OUTPUTS, out_channels),
            scratch,
            transformed_weight,
            bias,
        )
        if relu:
            F.relu_(into)
        if not fits:
            here.copy_(into[: len(here), :width])


def _convolve_strip(
    strip: torch.Tensor,
    into: torch.Tensor,
    scratch: torch.Tensor,
    transformed_weight: torch.Tensor,
    bias: torch.Tensor | None,
) -> None:
    """(4 rows + 2, 4 tiles_x + 2, I) -> (rows, 4, tiles_x, 4, O)."""
    rows, _, tiles_x, _, out_channels = into.shape
    channels, count = strip.shape[2], rows * tiles_x
    row, column, _ = strip.stride()
    tiles = scratch[0, :, : count * channels]
    tiles.view(INPUTS, INPUTS, rows, tiles_x, channels).copy_(
        strip.as_strided(
            (INPUTS, INPUTS, rows, tiles_x, channels),
            (row, column, OUTPUTS * row, OUTPUTS * column, 1),
        )
    )
    transformed = scratch[1, :, : count * channels]
    torch.mm(INPUT_TRANSFORM, tiles, out=transformed)
    products = scratch[0, :, : count * out_channels]
    torch.bmm(
        transformed.view(INPUTS**2, count, channels),
        transformed_weight,
        out=products.view(INPUTS**2, count, out_channels),
    )
    outputs = scratch[1, : OUTPUTS**2, : count * out_channels]
    torch.mm(OUTPUT_TRANSFORM, products, out=outputs)

    outputs = outputs.view(OUTPUTS, OUTPUTS, rows, tiles_x, out_channels)
    into = into.permute(1, 3, 0, 2, 4)
    if bias is None:
        into.copy_(outputs)
    else:
        torch.add(outputs, bias, out=into)


_memory = threading.local()


def _workspace(like: torch.Tensor, shapes: Sequence[tuple[int, ...]]) -> list[torch.Tensor]:
    """Scratch tensors in memory that this thread keeps (some 20 MB at 800x1333).

    Allocating it in every call would cost as much as the products.
    """
    sizes = [math.prod(shape) for shape in shapes]
    kept = getattr(_memory, "tensor", None)
    if kept is None or kept.numel() < sum(sizes) or kept.dtype != like.dtype:
        # A tensor created in inference mode could not be written to outside it.
        with torch.inference_mode(False):
            kept = _memory.tensor = torch.empty(sum(sizes), dtype=like.dtype)
    parts = kept[: sum(sizes)].split(sizes)
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _matrices() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A^T (4, 6), G (6, 3) and B^T (6, 6) in float64, from the points (Toom-Cook).

    A product of polynomials with 4 and 3 coefficients has 6: evaluate both at 6 points, multiply
    pointwise, interpolate. A network's convolution is the transpose of that.
    """
    evaluate = torch.zeros(3, INPUTS, INPUTS, dtype=torch.float64)
    for matrix, length in zip(evaluate, (OUTPUTS, 3, INPUTS), strict=True):
        for i, point in enumerate(POINTS):
            matrix[i, :length] = torch.tensor([point**k for k in range(length)])
        matrix[INPUTS - 1, length - 1] = 1  # at infinity: the highest coefficient
    a, g, both = evaluate[0, :, :OUTPUTS], evaluate[1, :, :3], evaluate[2]
    return a.T.contiguous(), g.contiguous(), torch.linalg.inv(both).T.contiguous()


_A, _G, _B = _matrices()
# Both axes in one matrix: B^T d B, flattened, is kron(B^T, B^T) times d, flattened.
INPUT_TRANSFORM, OUTPUT_TRANSFORM = torch.kron(_B, _B).float(), torch.kron(_A, _A).float()
WEIGHT_TRANSFORM = torch.kron(_G, _G)
