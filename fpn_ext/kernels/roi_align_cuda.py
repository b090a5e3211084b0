"""RoIAlign of all boxes on all levels in one Triton kernel on the GPU, forward and backward.

A bin is a weighted sum of the cells of a small rectangle, each weight a row weight times a column
weight; the kernel is in fpn_ext/kernels/roi_align_cuda_kernel.py. Boxes are not sorted by level,
one launch serves all, and the CPU never synchronises with the GPU.

Triton is optional: without it this module can be imported, and ``available()`` is False.
"""

import functools
import logging
from typing import Any

import torch
import torchvision

from . import roi_align_cpu
from .first_derivative import ROI_ALIGN, first_derivative_only
from .roi_align_cpu import Maps
from .roi_align_cuda_kernel import INTERPRETED, launch, triton
from .roi_align_cuda_kernel import MOST_LEVELS as MOST_LEVELS  # the most maps
from .roi_align_samples import Settings

logger = logging.getLogger(__name__)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


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

    The CPU never waits for the GPU. The backward pass uses atomic adds, in no fixed order, so
    gradients differ in rounding between runs. Under ``torch.use_deterministic_algorithms(True)``
    they are reproducible, using the backward pass of fpn_ext/kernels/roi_align_cpu.py: slower, and
    the CPU then waits several times per map.

    Args:
        maps: (N, C, H_i, W_i) of one dtype, float32, float16 or bfloat16, at most ``MOST_LEVELS``,
            on a CUDA device; channels_last maps are read in place, others are copied.
        rois: (R, 5) float32: image index and XYXY in pixels of the network input, x2 >= x1 and
            y2 >= y1. No gradient flows to them.
        map_index: (R,) int64: index of the map a box is pooled from.
        scales: 1 / stride of each map.
        output_size: bins along y and along x.
        sampling_ratio: samples per bin and side, 0 for adaptive.
        aligned: torchvision's flag: half-pixel-correct coordinates.

    Returns:
        (R, C, *output_size) in the maps' dtype, in channels_last memory. Accumulated in float32,
        and equal to torchvision's in float32 within rounding.
    """
    settings = Settings(tuple(scales), output_size, sampling_ratio, aligned)
    return _FusedRoIAlign.apply(settings, rois, map_index, *maps)


def available() -> bool:
    """Whether the kernel runs on this machine: Triton and a CUDA device, or its interpreter."""
    return missing() is None


@functools.cache
def missing() -> str | None:
    """Why the kernel cannot run on this machine; None if it can. Checked once per process.

    Triton needs more than a GPU, e.g. a C compiler, and its requirements differ between versions:
    so this compiles the kernel, runs it on a few boxes, forward and backward, and trusts it only
    if it agrees with torchvision's operator.
    """
    if triton is None:
        return "a Python without Triton"
    if INTERPRETED:
        return None
    if not torch.cuda.is_available():
        return "a machine without a CUDA device"
    try:
        error = largest_error("cuda")
    except Exception as failure:  # anything Triton, the C compiler or the driver may raise
        reason = f"a Triton that does not work here ({type(failure).__name__}: {failure})"
    else:
        if error <= 1e-3:
            return None
        reason = f"a Triton kernel that is {error} away from torchvision's operator here"
    logger.warning("RoIAlign on CUDA goes level by level because of %s", reason)
    return reason


def largest_error(device: str) -> float:
    """Largest difference from torchvision's operator, in values and gradients, of a small case."""
    # A process may first pool in inference mode; this check needs gradients anyway.
    with torch.inference_mode(False), torch.enable_grad():
        numbers = torch.Generator().manual_seed(0)
        features = torch.randn(1, 5, 24, 31, generator=numbers)
        corners = torch.rand(5, 2, 2, generator=numbers) * 100 - 5
        rois = torch.cat([torch.zeros(5, 1), corners.amin(1), corners.amax(1)], dim=1)
        index = torch.zeros(5, dtype=torch.int64, device=device)
        ours, theirs = features.to(device).requires_grad_(), features.clone().requires_grad_()
        results = []
        for leaf, pooled in (
            (ours, roi_align([ours], rois.to(device), index, [0.25], (3, 2), 0, True)),
            (theirs, torchvision.ops.roi_align(theirs, rois, (3, 2), 0.25, 0, True)),
        ):
            (gradient,) = torch.autograd.grad(pooled.square().sum(), leaf)
            results.append(torch.cat([pooled.flatten(), gradient.flatten()]).cpu())
    return (results[0] - results[1]).abs().nan_to_num(torch.inf).max().item()


class _FusedRoIAlign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, settings: Settings, rois: Any, map_index: Any, *maps: Any) -> Any:
        ctx.settings = settings
        ctx.save_for_backward(rois, map_index)
        ctx.shapes = [m.shape for m in maps]
        height, width = settings.output_size
        by_bin = maps[0].new_empty((rois.shape[0], height, width, maps[0].shape[1]))
        # Maps already in channels_last are not copied.
        by_cell = [
            m.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1) for m in maps
        ]
        launch(by_cell, by_bin, rois, map_index, (1 << len(maps)) - 1, settings, backward=False)
        return by_bin.permute(0, 3, 1, 2)

    @staticmethod
    @first_derivative_only(ROI_ALIGN)
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (gradient,) = grad_outputs
        rois, map_index = ctx.saved_tensors
        needed = ctx.needs_input_grad[3:]
        if torch.are_deterministic_algorithms_enabled():
            sums = roi_align_cpu.map_gradients(
                gradient.float(), rois, map_index, ctx.shapes, needed, ctx.settings
            )
        else:
            sums = map_gradients(gradient, rois, map_index, ctx.shapes, needed, ctx.settings)
        return None, None, None, *(None if s is None else s.to(gradient.dtype) for s in sums)


def map_gradients(
    gradient: torch.Tensor,
    rois: torch.Tensor,
    map_index: torch.Tensor,
    shapes: list[torch.Size],
    needed: tuple[bool, ...],
    settings: Settings,
) -> list[torch.Tensor | None]:
    """As :func:`roi_align_cpu.map_gradients`: float32, None where not needed."""
    nothing = gradient.new_zeros((1, 1, 1, 1), dtype=torch.float32)  # never written to
    by_cell = [
        gradient.new_zeros((n, height, width, channels), dtype=torch.float32)
        if is_needed
        else nothing
        for (n, channels, height, width), is_needed in zip(shapes, needed, strict=True)
    ]
    wanted = sum(1 << i for i, is_needed in enumerate(needed) if is_needed)
    by_bin = gradient.permute(0, 2, 3, 1).contiguous()
    launch(by_cell, by_bin, rois, map_index, wanted, settings, backward=True)
    return [
        sums.permute(0, 3, 1, 2) if is_needed else None
        for sums, is_needed in zip(by_cell, needed, strict=True)
    ]
