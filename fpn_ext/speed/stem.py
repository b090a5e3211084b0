"""The beginning of Detectron2's ResNet for inference: its max pooling by the compiled kernel."""

from typing import Any

import torch
import torch.nn.functional as F
from detectron2.modeling.backbone.resnet import BasicStem, ResNet
from torch import nn

from ..kernels.compiled import kernels


def replace_stems(model: nn.Module) -> None:
    """Those of a model's ResNets, whose norms are folded, in place."""
    for module in model.modules():
        if isinstance(module, ResNet) and type(module.stem) is BasicStem:
            module.stem = Stem(module.stem)


class Stem(nn.Module):
    """A convolution with the ReLU after it, and max pooling."""

    def __init__(self, stem: Any):
        super().__init__()
        self.conv1 = stem.conv1
        self.conv1.activation = F.relu_

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) -> (N, C, H / 4, W / 4)."""
        x, found = self.conv1(x), kernels()
        if found is not None and found.can_max_pool(x):
            return found.max_pool(x)
        return F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
