"""Training on CPU with Winograd's convolution, forward and backward.

The gradient of a convolution's input is a convolution of the output's gradient with the flipped
filters: as many multiplications, and as many saved. So has the gradient of its filters, which the
compiled kernels compute; without them it is torch's.
"""

from typing import Any

import torch
from detectron2.layers import Conv2d
from torch import nn

from ..exporting import records_a_graph
from ..kernels import winograd
from ..kernels.compiled import kernels
from ..kernels.first_derivative import first_derivative_only
from ..keys import declare
from ..modeling.roi_heads import reads_channels_last

declare(
    "MODEL.FPN_EXT.WINOGRAD",
    False,
    "Training on CPU computes 3x3 convolutions of 256 channels and more (64 with compiled "
    "kernels) by Winograd's algorithm, equal within rounding error. "
    "NUMERICS fast sets it where it is quicker.",
    "training",
)


# For the compiled kernel; torch's operators need winograd.FEWEST_CHANNELS to save anything.
FEWEST_CHANNELS = 64
# The gradient of filters reads and writes 36 matrices of products, which few tiles do not pay for.
FEWEST_TILES = 64


class TrainableWinogradConv2d(Conv2d):
    """Detectron2's Conv2d, 3x3 with stride 1 and padding 1: same parameters, norm and activation.

    On a GPU, in half precision, on small maps, and while tracing or compiling, it computes as its
    parent does.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, I, H, W) -> (N, O, H, W), in channels_last memory if by Winograd."""
        if not _serves(x, self.weight):
            return super().forward(x)
        x = _Convolution.apply(x, self.weight, self.bias)
        if self.norm is not None:
            x = self.norm(x)
        return x if self.activation is None else self.activation(x)


class PlainTrainableWinogradConv2d(nn.Conv2d):
    """The same of torch's own Conv2d, as the networks of torchvision and timm have it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, I, H, W) -> (N, O, H, W), in channels_last memory if by Winograd."""
        if not _serves(x, self.weight):
            return super().forward(x)
        return _Convolution.apply(x, self.weight, self.bias)


TRAINABLE: dict[type, type] = {
    Conv2d: TrainableWinogradConv2d,
    nn.Conv2d: PlainTrainableWinogradConv2d,
}


def train_with_winograd(model: nn.Module) -> int:
    """Use Winograd's algorithm in the model's 3x3 convolutions with many channels, in place.

    Parameter names are unchanged, so checkpoints load either way. Results equal the direct sums to
    rounding. Other subclasses of torch's Conv2d are left unchanged, those that
    :func:`fpn_ext.speed.folded_norms.fold_frozen_norms` has made among them.

    Returns:
        Number of convolutions changed.
    """
    count = 0
    contiguous = {inner for head in contiguous_heads(model) for inner in head.modules()}
    for module in model.modules():
        trainable = TRAINABLE.get(type(module))
        if trainable is not None and _pays(module) and module not in contiguous:
            module.__class__ = trainable  # a copy would have other parameters
            count += 1
    return count


def _pays(convolution: Any) -> bool:
    compiled, channels = kernels(), (convolution.in_channels, convolution.out_channels)
    return winograd.serves(convolution) or (
        compiled is not None
        and winograd.is_3x3(convolution)
        and convolution.weight.dtype == torch.float32
        and min(channels) >= FEWEST_CHANNELS
        and compiled.can_convolve(*channels)
        and compiled.can_convolve(*channels[::-1])
    )


def contiguous_heads(model: nn.Module) -> list[nn.Module]:
    """The heads on pooled features that are not known to read channels_last ones."""
    roi_heads = getattr(model, "roi_heads", None)
    heads: list[nn.Module] = []
    for name in ("box_head", "mask_head", "keypoint_head"):
        head = getattr(roi_heads, name, None)
        if isinstance(head, nn.Module):
            heads += head if isinstance(head, nn.ModuleList) else [head]  # a cascade's
    return [head for head in heads if not reads_channels_last(head)]


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return convolve(x, weight, bias)

    @staticmethod
    @first_derivative_only(
        "Winograd's convolution has no second derivative here: set MODEL.FPN_EXT.WINOGRAD False to "
        "take the gradient of a gradient"
    )
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        grad_x = grad_weight = grad_bias = None
        if of_x:
            grad_x = convolve(grad, weight, turned=True)
        if of_weight:
            grad_weight = gradient_of_filters(x, grad, weight)
        if of_bias:
            grad_bias = grad.sum((0, 2, 3))
        return grad_x, grad_weight, grad_bias


def convolve(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, turned: bool = False
) -> torch.Tensor:
    """The convolution with these filters or, turned, with those of its input's gradient."""
    compiled, (outputs, channels) = kernels(), weight.shape[:2]
    if turned:
        outputs, channels = channels, outputs
    if compiled is not None and compiled.can_convolve(channels, outputs):
        return compiled.convolve(x, compiled.pack_filters(weight, turned), outputs, bias)
    if turned:
        weight = weight.flip(2, 3).transpose(0, 1)
    return winograd.convolve(x, winograd.transform_weight(weight), bias)


def gradient_of_filters(x: torch.Tensor, grad: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The gradient of (O, I, 3, 3) filters, from (N, I, H, W) maps and (N, O, H, W) gradients."""
    compiled, (n, channels, height, width) = kernels(), x.shape
    if (
        compiled is not None
        and compiled.can_convolve(channels, len(weight))
        and n * -(-height // 4) * -(-width // 4) >= FEWEST_TILES
    ):
        return compiled.filter_gradient(x, grad)
    settings: Any = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False])
    _, found, _ = torch.ops.aten.convolution_backward(grad, x, weight, None, *settings)
    return found


def _serves(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not records_a_graph()
        and winograd.large_enough(x)
    )
