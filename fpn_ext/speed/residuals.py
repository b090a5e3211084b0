"""Detectron2's residual blocks for inference: their sums use the shortcut's memory."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock, ResNet
from torch import nn


def has_relu(layer: nn.Module) -> bool:
    """Whether a layer of Detectron2 or of :mod:`.layers` ends in a ReLU."""
    return getattr(layer, "activation", None) is not None or getattr(layer, "relu", False)


def sum_residuals_in_place(model: nn.Module) -> None:
    """Replace the residual blocks of a model's ResNets, whose norms are folded, in place."""
    for module in model.modules():
        if not isinstance(module, ResNet):
            continue
        for stage in module.stages:
            for i, block in enumerate(stage):
                if type(block) in (BasicBlock, BottleneckBlock):
                    # A stage's input may also be an output of the network; its first block's
                    # output is read only by its second block.
                    stage[i] = ResidualBlock(block, owns_input=i > 0)


class ResidualBlock(nn.Module):
    """Detectron2's residual block, summing into the shortcut's memory if possible.

    Attributes:
        convolutions: all but the last, each with the ReLU after it.
        last: the last, with the sum and the ReLU after it: a :class:`DirectSum`, or alike.
        shortcut: a convolution, or None.
    """

    def __init__(self, block: Any, owns_input: bool):
        super().__init__()
        convolutions = [block.conv1, block.conv2]
        if isinstance(block, BottleneckBlock):
            convolutions.append(block.conv3)
        for convolution in convolutions[:-1]:
            convolution.activation = F.relu_
        self.convolutions = nn.ModuleList(convolutions[:-1])
        self.last: Any = DirectSum(convolutions[-1])
        self.shortcut: Any = block.shortcut
        self.owns_input = owns_input

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) -> (N, C', H', W'); may write into ``x``."""
        out = x
        for convolution in self.convolutions:
            out = convolution(out)
        if self.shortcut is not None:
            return self.last(out, self.shortcut(x), True)
        return self.last(out, x, self.owns_input)


class DirectSum(nn.Module):
    """torch's convolution, added to the shortcut, and a ReLU; in one pass where oneDNN can."""

    def __init__(self, convolution: Any):
        super().__init__()
        self.convolution = convolution

    def forward(self, x: torch.Tensor, shortcut: torch.Tensor, owned: bool) -> torch.Tensor:
        """(N, I, H, W) and (N, O, H', W') -> (N, O, H', W').

        Args:
            x: input of the convolution.
            shortcut: to be added.
            owned: whether ``shortcut`` may be overwritten.
        """
        if owned and _can_add_in_place(self.convolution, x, shortcut):
            return convolve_add_relu_(self.convolution, self.convolution.weight, x, shortcut)
        return F.relu_(self.convolution(x).add_(shortcut))


@functools.cache
def has_bfloat16_convolutions() -> bool:
    """Whether oneDNN computes bfloat16 convolutions on this CPU (AVX-512 or AVX-NE-CONVERT).

    Elsewhere PyTorch computes them without oneDNN, correctly but several times slower than
    float32, and oneDNN's fused operators reject them. Respects ``ONEDNN_MAX_CPU_ISA``.
    """
    available = torch.backends.mkldnn.is_available()
    return available and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _can_add_in_place(last: Any, x: torch.Tensor, into: torch.Tensor) -> bool:
    return (
        isinstance(last, nn.Conv2d)
        and getattr(last, "norm", None) is None
        and getattr(last, "activation", None) is None
        and x.device.type == "cpu"
        and x.dtype == into.dtype == last.weight.dtype  # not so under autocast
        and (x.dtype != torch.bfloat16 or _has_bfloat16_of(x))
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_convolution_pointwise_")
        and x.is_contiguous(memory_format=torch.channels_last)
        and into.is_contiguous(memory_format=torch.channels_last)
    )


def _has_bfloat16_of(x: torch.Tensor) -> bool:
    """Whether oneDNN's fused operator takes these maps: whose memory is clearly channels_last."""
    return has_bfloat16_convolutions() and x.shape[1] > 1 and x.shape[2:].numel() > 1


def convolve_add_relu_(
    settings: Any, weight: torch.Tensor, x: torch.Tensor, into: torch.Tensor
) -> torch.Tensor:
    """``into`` plus a convolution, and a ReLU, in one pass; ``into`` is overwritten.

    Args:
        settings: has the convolution's bias, padding, stride, dilation and groups.
        weight: the convolution's, as they are or packed by oneDNN.
        x: (N, I, H, W), in channels_last memory.
        into: (N, O, H', W'), likewise.
    """
    # oneDNN's fused operator, as used by torch.compile. It saves allocating a feature map, which on
    # CPU costs more than the 1x1 convolution.
    return torch.ops.mkldnn._convolution_pointwise_.binary(
        into,
        x,
        weight,
        settings.bias,
        settings.padding,
        settings.stride,
        settings.dilation,
        settings.groups,
        "add",
        1.0,
        "relu",
        [],
        "",
    )
