"""The kernels that pool maps: RoIAlign, and the max pooling after a ResNet's first convolution.

Both take and give float32 or bfloat16.
"""

import ctypes
from collections.abc import Sequence

import torch

from ..large import empty
from . import structs
from .arguments import checked, int64

DTYPES = (torch.float32, torch.bfloat16)


class Pooling:
    """Of a compiled kernels.c."""

    library: ctypes.CDLL
    lanes: int

    def can_pool(self, maps: Sequence[torch.Tensor], rois: torch.Tensor) -> bool:
        """Whether :meth:`roi_align` takes these: float32 or bfloat16, whole vectors of channels."""
        return (
            maps[0].dtype in DTYPES
            and all(m.dtype == maps[0].dtype and m.device.type == "cpu" for m in maps)
            and rois.dtype == torch.float32
            and maps[0].shape[1] % self.lanes == 0
            and all(m.numel() for m in maps)
        )

    def roi_align(
        self,
        maps: Sequence[torch.Tensor],
        rois: torch.Tensor,
        map_index: torch.Tensor,
        scales: Sequence[float],
        output_size: tuple[int, int],
        sampling_ratio: int,
        aligned: bool,
    ) -> torch.Tensor:
        """RoIAlign every box from its own map; arguments of
        :func:`fpn_ext.kernels.roi_align_cpu.roi_align`.

        Args:
            maps: (N, C, H_i, W_i) float32, or bfloat16, in channels_last memory.
            rois: (R, 5) float32: image index and XYXY in pixels of the network input.
            map_index: (R,) int64.
            scales: 1 / stride of each map.
            output_size: bins along y and along x.
            sampling_ratio: samples per bin and side, 0 for adaptive.
            aligned: torchvision's flag: half-pixel-correct coordinates.

        Returns:
            (R, C, *output_size) in the maps' dtype, in channels_last memory; summed in float32.
        """
        maps = [m.contiguous(memory_format=torch.channels_last) for m in maps]
        rois, map_index = rois.contiguous(), map_index.to(torch.int64).contiguous()
        half = all(m.dtype == torch.bfloat16 for m in maps)
        checked(0, None, rois, *([] if half else maps))
        images = rois[:, 0]
        if len(rois) and not (
            (map_index >= 0).all()
            and (map_index < len(maps)).all()
            and (images >= 0).all()
            and (images < len(maps[0])).all()
            and rois.isfinite().all()
        ):
            raise ValueError("boxes must be finite, and on maps and images that there are")
        count, channels, threads = len(rois), maps[0].shape[1], torch.get_num_threads()
        heights, widths = zip(*(m.shape[2:] for m in maps), strict=True)
        result = empty((count, *output_size, channels), dtype=maps[0].dtype)
        size = self.library.pooling_scratch(
            *int64(*output_size, max(heights), max(widths), channels), half
        )
        scratch = torch.empty(threads * size, dtype=torch.uint8)
        many = len(maps)
        arrays = (
            (ctypes.c_void_p * many)(*[m.data_ptr() for m in maps]),
            *((ctypes.c_int64 * many)(*heights), (ctypes.c_int64 * many)(*widths)),
            (ctypes.c_float * many)(*scales),
        )
        told = structs.Pooling(
            *(ctypes.cast(array, ctypes.c_void_p) for array in arrays),
            *(rois.data_ptr(), map_index.data_ptr(), result.data_ptr(), scratch.data_ptr()),
            *(count, channels, *output_size, size, sampling_ratio, aligned, half, threads),
        )
        self.library.pool(ctypes.byref(told))
        return result.permute(0, 3, 1, 2)

    def can_max_pool(self, maps: torch.Tensor) -> bool:
        """Whether :meth:`max_pool` takes these: float32 or bfloat16, whole vectors of channels."""
        return (
            maps.dtype in DTYPES
            and maps.device.type == "cpu"
            and maps.shape[1] % self.lanes == 0
            and maps.numel() > 0
        )

    def max_pool(self, maps: torch.Tensor) -> torch.Tensor:
        """The largest of 3x3 pixels, with stride 2 and padding 1.

        Args:
            maps: (N, C, H, W) that :meth:`can_max_pool`; copied if not in channels_last memory.

        Returns:
            (N, C, H / 2, W / 2), rounded up, in the same dtype and channels_last memory.
        """
        assert self.can_max_pool(maps)
        maps = maps.contiguous(memory_format=torch.channels_last)
        n, channels, height, width = maps.shape
        size = (n, channels, -(-height // 2), -(-width // 2))
        result = empty(size, channels_last=True, dtype=maps.dtype)
        told = structs.MaxPooling(
            *(maps.data_ptr(), result.data_ptr(), n, height, width, channels),
            *(maps.dtype == torch.bfloat16, torch.get_num_threads()),
        )
        self.library.max_pool(ctypes.byref(told))
        return result
