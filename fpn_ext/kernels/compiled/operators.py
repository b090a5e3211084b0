"""The kernels as functions of tensors.

All compute on the CPU, on as many threads as torch has, and record no gradients. Those here take
and give float32. Maps are in channels_last memory.
"""

import ctypes
import functools
import logging
import os
from pathlib import Path

import torch
import torch.nn.functional as F

from ..large import empty
from . import build, structs
from .arguments import checked, expect, pointer
from .pooling import Pooling

logger = logging.getLogger(__name__)

# Tiles of 4x4 outputs transformed at once: their sums fit a core's cache.
TILES_AT_ONCE = 36
# Floats of a point's matrices of transformed tiles, for the gradient of filters: 36 such are held,
# and read again and again.
GRADIENT_TILES = 1 << 16
# Rows and columns of a matrix that are multiplied at once, by vector length.
ROWS_AT_ONCE = {8: 96, 16: 120}
DEPTH_AT_ONCE = 256
# With this many rows or fewer, a matrix of so many floats is read once, the rows again and again.
FEW_ROWS, LARGE_MATRIX = 264, 1 << 20
SMALLEST_JOBS = 4  # for each thread: the last to finish keeps the others waiting less


_loaded: "dict[Path, Kernels | None]" = {}  # None: it does not load


def kernels() -> "Kernels | None":
    """The compiled kernels, or None: not compiled here, or ``FPN_EXT_COMPILED=0`` is set."""
    isa = build.instructions()
    if not isa or os.environ.get("FPN_EXT_COMPILED") == "0":
        return None
    try:
        file = build.library_file(isa)
        if file not in _loaded and file.exists():
            if not build.is_trusted(file):
                _warn_of(file, "others than its owner may have written it")
                return None
            _loaded[file] = Kernels(file)
    except RuntimeError:  # no home folder
        return None
    except OSError as error:  # a folder that is not ours, a damaged file
        _loaded[file] = None
        _warn_of(file, str(error))
    return _loaded.get(file)


@functools.cache
def _warn_of(file: Path, why: str) -> None:
    logger.warning("%s is not used: %s", file, why)


class Kernels(Pooling):
    """A compiled kernels.c.

    Args:
        file: a library of :func:`.build.compile_library`.
    """

    def __init__(self, file: Path):
        self.library = ctypes.CDLL(str(file))
        for name in (
            "winograd_shared",
            "winograd_scratch",
            "filter_gradient_scratch",
            "pooling_scratch",
        ):
            getattr(self.library, name).restype = ctypes.c_int64
        self.lanes: int = self.library.lanes()
        self.panel = 2 * self.lanes

    # 3x3 convolutions.

    def can_convolve(self, channels: int, outputs: int) -> bool:
        """Whether :meth:`convolve` takes these numbers of channels: whole vectors."""
        return channels % self.lanes == 0 and outputs % self.lanes == 0

    def pack_filters(self, weight: torch.Tensor, turned: bool = False) -> torch.Tensor:
        """The filters in the order in which :meth:`convolve` reads them.

        Args:
            weight: (O, I, 3, 3) float32, in any memory format.
            turned: those of the gradient's convolution instead: (I, O, 3, 3), flipped.

        Returns:
            (panels, I, 9 panel) float32, filled up with zeros.
        """
        checked(0, None, weight)
        outputs, channels = weight.shape[:2]
        expect("filters", weight.shape[2:], (3, 3))
        strides, first = list(weight.stride()), weight.data_ptr()
        if turned:
            outputs, channels = channels, outputs
            first += weight.element_size() * 2 * (strides[2] + strides[3])
            strides = [strides[1], strides[0], -strides[2], -strides[3]]
        result = weight.new_empty((-(-outputs // self.panel), channels, 9 * self.panel))
        told = structs.Filters(
            *(first, result.data_ptr(), outputs, channels),
            *((ctypes.c_int64 * 4)(*strides), torch.get_num_threads()),
        )
        self.library.pack_filters(ctypes.byref(told))
        return result

    def convolve(
        self,
        x: torch.Tensor,
        filters: torch.Tensor,
        outputs: int,
        bias: torch.Tensor | None = None,
        relu: bool = False,
    ) -> torch.Tensor:
        """3x3 convolution with stride 1 and padding 1, by Winograd's F(4x4, 3x3).

        Args:
            x: (N, I, H, W) float32; copied if not in channels_last memory.
            filters: from :meth:`pack_filters`.
            outputs: O.
            bias: (O,) or None.
            relu: whether to apply a ReLU.

        Returns:
            (N, O, H, W) float32 in channels_last memory.
        """
        x = x.contiguous(memory_format=torch.channels_last)
        bias = checked(outputs, bias, x, filters)
        n, channels, height, width = x.shape
        expect("filters", filters.shape, (-(-outputs // self.panel), channels, 9 * self.panel))
        filters = filters.contiguous()
        result = empty((n, outputs, height, width), channels_last=True)
        zeros = x.new_zeros(channels)
        threads = torch.get_num_threads()
        told = structs.Convolution(
            *(x.data_ptr(), filters.data_ptr(), pointer(bias), zeros.data_ptr()),
            *(result.data_ptr(), None, None, n, height, width, channels, outputs),
            *(TILES_AT_ONCE, relu, threads),
        )
        shared = x.new_empty(self.library.winograd_shared(ctypes.byref(told)))
        scratch = x.new_empty(threads * self.library.winograd_scratch(ctypes.byref(told)))
        told.shared, told.scratch = shared.data_ptr(), scratch.data_ptr()
        self.library.winograd(ctypes.byref(told))
        return result

    def filter_gradient(self, x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        """The gradient of the filters of a 3x3 convolution with stride 1 and padding 1.

        As many multiplications as :meth:`convolve` has, a quarter of the direct sums'.

        Args:
            x: (N, I, H, W) float32, the convolution's input; copied if not in channels_last memory.
            grad: (N, O, H, W) float32, the gradient of its result; as ``x``.

        Returns:
            (O, I, 3, 3) float32 in channels_last memory.
        """
        x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
        checked(0, None, x, grad)
        n, channels, height, width = x.shape
        outputs = grad.shape[1]
        expect("gradient", grad.shape, (n, outputs, height, width))
        result = empty((outputs, channels, 3, 3), channels_last=True)
        threads = torch.get_num_threads()
        if x.numel() == 0:
            return result.zero_()
        tiles = min(
            n * -(-height // 4) * -(-width // 4), GRADIENT_TILES // (channels + outputs) + 1
        )
        zeros = x.new_zeros(max(channels, outputs))
        products = x.new_empty((36, outputs, channels))
        told = structs.FilterGradient(
            *(x.data_ptr(), grad.data_ptr(), zeros.data_ptr(), result.data_ptr()),
            *(products.data_ptr(), None, n, height, width, channels, outputs, tiles, threads),
        )
        scratch = x.new_empty(self.library.filter_gradient_scratch(ctypes.byref(told)))
        told.scratch = scratch.data_ptr()
        self.library.filter_gradient(ctypes.byref(told))
        return result

    # Matrix products.

    def pack_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """(O, K) -> (rows, panel) float32, in the order in which :meth:`product` reads it.

        For each :data:`DEPTH_AT_ONCE` of the K, (panels, those K, panel), filled up with zeros.
        """
        parts = weight.t().split(DEPTH_AT_ONCE)
        return torch.cat([self._in_panels(part).flatten(0, 1) for part in parts])

    def product(
        self,
        rows: torch.Tensor,
        panels: torch.Tensor,
        outputs: int,
        bias: torch.Tensor | None = None,
        relu: bool = False,
    ) -> torch.Tensor:
        """(R, K) float32 -> (R, O): rows times a packed (O, K) matrix, transposed, plus bias.

        Args:
            rows: copied if not contiguous.
            panels: from :meth:`pack_matrix`.
            outputs: O.
            bias: (O,) or None.
            relu: whether to apply a ReLU.
        """
        rows = rows.contiguous()
        bias = checked(outputs, bias, rows, panels)
        count, depth = rows.shape
        result = empty((count, outputs))
        shape = (count, depth, outputs, 1, count, 1, count, 1)
        self._multiply(rows, panels, bias, None, result, shape, relu)
        return result

    def convolve_pointwise(
        self,
        x: torch.Tensor,
        panels: torch.Tensor,
        outputs: int,
        bias: torch.Tensor | None = None,
        stride: int = 1,
        added: torch.Tensor | None = None,
        relu: bool = False,
    ) -> torch.Tensor:
        """1x1 convolution, in one pass with a sum and a ReLU.

        Args:
            x: (N, I, H, W) float32; copied if not in channels_last memory.
            panels: from :meth:`pack_matrix`, of the (O, I) weights.
            outputs: O.
            bias: (O,) or None.
            stride: of the convolution.
            added: (N, O, H', W') in channels_last memory, added before the ReLU; is overwritten by
                the result.
            relu: whether to apply a ReLU.

        Returns:
            (N, O, H', W') float32 in channels_last memory; ``added``, if that is given.
        """
        x = x.contiguous(memory_format=torch.channels_last)
        bias = checked(outputs, bias, x, panels, *([] if added is None else [added]))
        n, channels, full_height, full_width = x.shape
        height, width = -(-full_height // stride), -(-full_width // stride)
        size = (n, outputs, height, width)
        result = empty(size, channels_last=True) if added is None else added
        sizes = (height, width, full_height, full_width, stride)
        shape = (n * height * width, channels, outputs, *sizes)
        self._multiply(x, panels, bias, added, result, shape, relu)
        return result

    def _multiply(
        self,
        rows: torch.Tensor,
        panels: torch.Tensor,
        bias: torch.Tensor | None,
        added: torch.Tensor | None,
        result: torch.Tensor,
        shape: tuple[int, ...],
        relu: bool,
    ) -> None:
        threads, (count, depth, outputs, *_) = torch.get_num_threads(), shape
        expect("weights", panels.shape, (-(-outputs // self.panel) * depth, self.panel))
        expect("results", result.numel(), count * outputs)
        if count == 0:
            return
        panels = panels.contiguous()
        if count <= FEW_ROWS and depth * outputs >= LARGE_MATRIX:
            # The matrix comes from memory, once: its columns are divided, not the rows.
            rows_at_once = -(-count // 12) * 12
            panels_at_once = max(-(-outputs // self.panel) // (threads * SMALLEST_JOBS), 1)
        else:
            share = max(count // (threads * SMALLEST_JOBS), 1)
            rows_at_once = min(ROWS_AT_ONCE[self.lanes], -(-share // 12) * 12)
            panels_at_once = -(-outputs // self.panel)
        scratch = rows.new_empty(threads * rows_at_once * DEPTH_AT_ONCE)
        told = structs.Product(
            *(rows.data_ptr(), panels.data_ptr(), pointer(bias), pointer(added)),
            *(result.data_ptr(), scratch.data_ptr(), *shape),
            *(rows_at_once, panels_at_once * self.panel, DEPTH_AT_ONCE, relu, threads),
        )
        self.library.product(ctypes.byref(told))

    def _in_panels(self, matrices: torch.Tensor) -> torch.Tensor:
        """(..., K, O) -> (panels, ..., K, panel) float32, filled up with zeros."""
        *others, depth, outputs = matrices.shape
        panels = -(-outputs // self.panel)
        filled = F.pad(matrices, (0, panels * self.panel - outputs))
        filled = filled.view(*others, depth, panels, self.panel)
        return filled.movedim(-2, 0).to(torch.float32).contiguous()
