"""1x1 convolutions with a stride, on few channels, in channels_last memory on a CPU.

PyTorch 2.15.0 does not compute the gradient of such filters safely (oneDNN 3.13.3). It does for the
same convolution with stride 1 on the pixels that are read, which is what these compute.
"""

from typing import Any

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d
from torch import nn

ENOUGH_CHANNELS = 16  # a vector of AVX-512


class SubsampledConv2d(nn.Conv2d):
    """torch's Conv2d, 1x1 with a stride: its pixels are taken first. Same parameters."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, I, H, W) -> (N, O, ceil(H / stride), ceil(W / stride))."""
        return _on_every_nth(self, x)


class SubsampledDetectron2Conv2d(Conv2d):
    """The same of Detectron2's Conv2d, with its norm and activation."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, I, H, W) -> (N, O, ceil(H / stride), ceil(W / stride))."""
        x = _on_every_nth(self, x)
        if self.norm is not None:
            x = self.norm(x)
        return x if self.activation is None else self.activation(x)


SUBSAMPLED: dict[type, type] = {
    nn.Conv2d: SubsampledConv2d,
    Conv2d: SubsampledDetectron2Conv2d,
}
PLAIN = {subsampled: plain for plain, subsampled in SUBSAMPLED.items()}


def subsample_first(model: nn.Module) -> int:
    """Let the convolutions above compute on the pixels they read, in place.

    Parameter names are unchanged, so checkpoints load either way; results are equal to rounding.

    Returns:
        Number of convolutions changed.
    """
    count = 0
    for module in model.modules():
        if type(module) in SUBSAMPLED and _is_strided_pointwise(module):
            module.__class__ = SUBSAMPLED[type(module)]  # a copy would have other parameters
            count += 1
    return count


def _is_strided_pointwise(convolution: Any) -> bool:
    return (
        convolution.kernel_size == (1, 1)
        and convolution.stride != (1, 1)
        and convolution.padding == (0, 0)
        and convolution.in_channels < ENOUGH_CHANNELS
    )


def _on_every_nth(convolution: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    rows, columns = convolution.stride
    x = x[:, :, ::rows, ::columns]
    return F.conv2d(x, convolution.weight, convolution.bias, groups=convolution.groups)
