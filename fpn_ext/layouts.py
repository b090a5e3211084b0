"""Maps from one memory layout to the other, on CPU: NCHW and channels_last.

torch copies between layouts element by element of the result, and waits for fresh memory page by
page while it strides through it; a block of pixels at a time, both sides stay in the cache.
"""

import torch

# Numbers in a block, to channels_last and back: 2 cores, AVX-512, 256 channels. Maps that are no
# larger than a block are left to torch.
BLOCK = 1 << 20
BLOCK_BACK = 1 << 17


def to_channels_last(x: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W) -> the same in channels_last memory; ``x`` itself if it is so already.

    >>> x = torch.arange(12.0).view(1, 3, 2, 2)
    >>> y = to_channels_last(x)
    >>> torch.equal(x, y), y.is_contiguous(memory_format=torch.channels_last)
    (True, True)
    """
    layout = torch.channels_last
    if x.is_contiguous(memory_format=layout) or not _in_blocks(x) or not x.is_contiguous():
        return x.contiguous(memory_format=layout)
    result = torch.empty_like(x, memory_format=layout)
    _copy(x.flatten(2).transpose(1, 2), result.permute(0, 2, 3, 1).flatten(1, 2), BLOCK)
    return result


def to_contiguous(x: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W) -> the same in NCHW memory; ``x`` itself if it is so already."""
    layout = torch.channels_last
    if x.is_contiguous() or not _in_blocks(x) or not x.is_contiguous(memory_format=layout):
        return x.contiguous()
    result = torch.empty_like(x, memory_format=torch.contiguous_format)
    _copy(x.permute(0, 2, 3, 1).flatten(1, 2), result.flatten(2).transpose(1, 2), BLOCK_BACK)
    return result


def _in_blocks(x: torch.Tensor) -> bool:
    return x.device.type == "cpu" and x.shape[1:].numel() > BLOCK


def _copy(source: torch.Tensor, target: torch.Tensor, block: int) -> None:
    """(N, pixels, C) views, a block of pixels of an image at a time."""
    pixels = max(block // source.shape[2], 1)
    for one, other in zip(source, target, strict=True):
        for part, into in zip(one.split(pixels), other.split(pixels), strict=True):
            into.copy_(part)
