"""Norms with fixed statistics folded into the preceding convolutions: for training, for inference.

A frozen norm is a per-channel scale and shift. Detectron2 multiplies and adds after the
convolution: two more maps to write, and one more for the gradient. Scaling the filters instead
costs next to nothing, and gradients reach the filters through the scale.
"""

from typing import Any

import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ..keys import declare

declare(
    "MODEL.FPN_EXT.FOLD_NORMS",
    False,
    "Training computes a convolution and the frozen norm after it as one convolution, "
    "equal within rounding error. Detectron2's networks only. NUMERICS fast sets it where "
    "it is quicker.",
    "training",
)


class FoldedConv2d(Conv2d):
    """Detectron2's Conv2d with a frozen norm: same parameters and buffers, one operation."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, I, H, W) -> (N, O, H', W')."""
        if not isinstance(self.norm, FrozenBatchNorm2d):  # removed since
            return super().forward(x)
        norm = self.norm
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        shift = norm.bias - norm.running_mean * scale
        if self.bias is not None:
            shift = shift + self.bias * scale
        x = self._conv_forward(x, self.weight * scale[:, None, None, None], shift)
        return x if self.activation is None else self.activation(x)


def fold_frozen_norms(model: nn.Module) -> int:
    """Fold every frozen norm of the model into the convolution before it, in place.

    Parameter names are unchanged, so checkpoints load either way. Results are equal to rounding.
    Handles Detectron2's own Conv2d, on every device; others are left unchanged.

    Returns:
        Number of convolutions changed.
    """
    count = 0
    for module in model.modules():
        if type(module) is Conv2d and isinstance(module.norm, FrozenBatchNorm2d):
            module.__class__ = FoldedConv2d  # a copy would have other parameters
            count += 1
    return count


def fold_into(convolution: Any, norm: Any) -> None:
    """Scale the filters of a convolution, and shift its bias, by a norm after it. For inference.

    Args:
        convolution: a ``nn.Conv2d``, changed in place.
        norm: with ``running_mean``, ``running_var``, ``weight``, ``bias`` and ``eps``.
    """
    convolution.weight, convolution.bias = fuse_conv_bn_weights(
        convolution.weight,
        convolution.bias,
        norm.running_mean,
        norm.running_var,
        norm.eps,
        norm.weight,
        norm.bias,
    )
