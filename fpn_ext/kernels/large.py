"""Memory for large results, in pages of 2 MB where the system has them.

glibc maps 32 MB or more afresh for each tensor, and the system clears that in pages of 4 KB as they
are first touched: for a map of P2 of a photograph, longer than writing it takes several times over.
Larger pages (Linux's transparent huge pages, asked for by ``madvise``) are cleared much faster.
Less than 32 MB is handed out again and again, and stays torch's.
"""

import math
import mmap
from collections.abc import Sequence

import torch

FROM_BYTES = 32 << 20  # glibc's DEFAULT_MMAP_THRESHOLD_MAX
_ADVICE: int | None = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux's


def empty(
    shape: Sequence[int], channels_last: bool = False, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """An uninitialised tensor on the CPU; a large one cannot be resized.

    Args:
        channels_last: for (N, C, H, W): its memory format.

    >>> empty((2, 3)).shape, empty((1, 8, 4, 5), channels_last=True).stride()
    (torch.Size([2, 3]), (160, 1, 40, 8))
    """
    count = math.prod(shape)
    size = count * dtype.itemsize
    memory = _mapped(size) if size >= FROM_BYTES else None
    if memory is None:
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        return torch.empty(tuple(shape), dtype=dtype, device="cpu", memory_format=memory_format)
    flat = torch.frombuffer(memory, dtype=dtype, count=count)
    if not channels_last:
        return flat.view(tuple(shape))
    n, channels, height, width = shape
    return flat.view(n, height, width, channels).permute(0, 3, 1, 2)


def _mapped(size: int) -> mmap.mmap | None:
    """Private memory in large pages; None where there are none. It lives as long as its tensor."""
    if _ADVICE is None:
        return None
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(_ADVICE)
    except OSError:  # a system built without them
        return None
    return memory
