"""The ways in which an optimised model's layers can be computed on a CPU.

In bfloat16 there are torch's own and oneDNN's with packed weights (:mod:`.packed`), in float32 also
Winograd's algorithm and the compiled kernels. No way is fastest on every processor, for every
number of channels and every size of map: :mod:`.choose` takes one for each layer. All give the same
results to rounding, read and write channels_last maps, apply a ReLU if the layer has one, and
record no gradients.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d
from torch import nn

from ..kernels import winograd
from ..kernels.compiled import Kernels, kernels
from .packed import PackedConvolution, PackedFullyConnected, PackedSum
from .packed import serves as packs
from .residuals import DirectSum, has_relu


class Way(NamedTuple):
    """A way to compute a layer.

    Attributes:
        serves: whether it can compute this layer, on this machine.
        make: a module that computes the layer so; its weights are copied, packed as they are read.
    """

    serves: Callable[[Any], bool]
    make: Callable[[Any], nn.Module]


def is_plain(convolution: nn.Module) -> bool:
    """Whether it is Detectron2's convolution with nothing after it but, perhaps, a ReLU."""
    # Another's forward may do more, and a library's network may read a layer's weights.
    if type(convolution) is not Conv2d or convolution.norm is not None:
        return False
    activation = convolution.activation
    return activation is None or isinstance(activation, nn.ReLU) or activation in (F.relu, F.relu_)


def _is_float32(layer: Any) -> bool:
    return layer.weight.dtype == torch.float32 and layer.weight.device.type == "cpu"


def _compiled(panel: int = 0) -> Kernels:
    """The compiled kernels; ``panel`` is that of the weights, 0 if there are none yet.

    Raises:
        RuntimeError: the model was optimised with kernels that are not here.
    """
    found = kernels()
    if found is None or panel not in (0, found.panel):
        raise RuntimeError(
            "this model was optimised with kernels compiled for another processor, or that are "
            "gone: call optimize_for_inference on the model it was made from, here"
        )
    return found


class Direct(nn.Module):
    """torch's own convolution."""

    def __init__(self, convolution: nn.Conv2d):
        super().__init__()
        self.weight = nn.Parameter(convolution.weight.detach(), False)
        self.bias = convolution.bias
        self.stride, self.padding = convolution.stride, convolution.padding
        self.dilation, self.groups = convolution.dilation, convolution.groups
        self.relu = has_relu(convolution)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, I, H, W) -> (N, O, H', W')."""
        settings: Any = (self.stride, self.padding, self.dilation, self.groups)
        x = F.conv2d(x, self.weight, self.bias, *settings)
        return F.relu_(x) if self.relu else x


class CompiledWinograd(nn.Module):
    """A 3x3 convolution of stride 1 by the compiled Winograd kernel."""

    filters: torch.Tensor

    def __init__(self, convolution: nn.Conv2d):
        super().__init__()
        self.register_buffer("filters", _compiled().pack_filters(convolution.weight.detach()))
        self.panel = _compiled().panel
        self.bias = convolution.bias
        self.outputs, self.relu = convolution.out_channels, has_relu(convolution)

    @staticmethod
    def serves(convolution: Any) -> bool:
        found = kernels()
        return (
            found is not None
            and winograd.is_3x3(convolution)
            and _is_float32(convolution)
            and found.can_convolve(convolution.in_channels, convolution.out_channels)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, I, H, W) -> (N, O, H, W)."""
        x = x.float()  # autocast may have made it something else
        return _compiled(self.panel).convolve(x, self.filters, self.outputs, self.bias, self.relu)


class CompiledPointwise(nn.Module):
    """A 1x1 convolution by the compiled matrix product."""

    panels: torch.Tensor

    def __init__(self, convolution: nn.Conv2d):
        super().__init__()
        weight = convolution.weight.detach().flatten(1)
        self.register_buffer("panels", _compiled().pack_matrix(weight))
        self.panel = _compiled().panel
        self.bias = convolution.bias
        self.stride = int(convolution.stride[0])
        self.outputs, self.relu = convolution.out_channels, has_relu(convolution)

    @staticmethod
    def serves(convolution: Any) -> bool:
        return (
            kernels() is not None
            and convolution.kernel_size == (1, 1)
            and convolution.padding == (0, 0)
            and convolution.stride[0] == convolution.stride[1]
            and convolution.groups == 1
            and _is_float32(convolution)
        )

    def forward(self, x: torch.Tensor, added: torch.Tensor | None = None) -> torch.Tensor:
        """(N, I, H, W) -> (N, O, H', W'); with a sum, into its memory, and a ReLU after it."""
        relu = self.relu or added is not None
        return _compiled(self.panel).convolve_pointwise(
            x.float(), self.panels, self.outputs, self.bias, self.stride, added, relu
        )


CONVOLUTIONS = {
    "direct": Way(lambda convolution: True, Direct),
    "packed": Way(PackedConvolution.serves, PackedConvolution),
    "winograd": Way(
        lambda c: winograd.serves(c),
        lambda c: winograd.WinogradConv2d(c.weight, c.bias, has_relu(c)),
    ),
    "compiled winograd": Way(CompiledWinograd.serves, CompiledWinograd),
    "compiled product": Way(CompiledPointwise.serves, CompiledPointwise),
}


class CompiledSum(nn.Module):
    """A :class:`DirectSum` by the compiled matrix product or Winograd kernel."""

    def __init__(self, convolution: nn.Conv2d):
        super().__init__()
        pointwise = CompiledPointwise.serves(convolution)
        self.convolution = (CompiledPointwise if pointwise else CompiledWinograd)(convolution)

    @staticmethod
    def serves(convolution: Any) -> bool:
        return CompiledPointwise.serves(convolution) or CompiledWinograd.serves(convolution)

    def forward(self, x: torch.Tensor, shortcut: torch.Tensor, owned: bool) -> torch.Tensor:
        """As :meth:`DirectSum.forward`."""
        owned = owned and shortcut.is_contiguous(memory_format=torch.channels_last)
        owned = owned and shortcut.dtype == torch.float32  # not so under autocast
        if owned and isinstance(self.convolution, CompiledPointwise):
            return self.convolution(x, added=shortcut)
        return F.relu_(self.convolution(x).add_(shortcut))


SUMS = {
    "direct": Way(lambda convolution: True, DirectSum),
    "packed": Way(PackedConvolution.serves, PackedSum),
    "compiled": Way(CompiledSum.serves, CompiledSum),
}


class FullyConnected(nn.Module):
    """torch's own matrix product."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.relu = has_relu(layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(R, I) -> (R, O)."""
        x = F.linear(x, self.weight, self.bias)
        return F.relu_(x) if self.relu else x


class CompiledFullyConnected(nn.Module):
    """The compiled matrix product."""

    panels: torch.Tensor

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.register_buffer("panels", _compiled().pack_matrix(layer.weight.detach()))
        self.panel = _compiled().panel
        self.bias = layer.bias
        self.outputs, self.relu = len(layer.weight), has_relu(layer)

    @staticmethod
    def serves(layer: Any) -> bool:
        return kernels() is not None and _is_float32(layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(R, I) -> (R, O)."""
        return _compiled(self.panel).product(
            x.float(), self.panels, self.outputs, self.bias, self.relu
        )


FULLY_CONNECTED = {
    "torch": Way(lambda layer: True, FullyConnected),
    "packed": Way(packs, PackedFullyConnected),
    "compiled product": Way(CompiledFullyConnected.serves, CompiledFullyConnected),
}


class Rows(nn.Module):
    """(R, C, H, W) -> (R, H W C): the pooled features of a box as they lie in channels_last memory.

    Flattening them channel by channel, as the fc layer was trained, would copy them; its weights
    are reordered instead (:func:`fully_connected_on_rows`).
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.permute(0, 2, 3, 1).flatten(1)


def fully_connected_on_rows(layer: nn.Linear, size: tuple[int, int], relu: bool) -> FullyConnected:
    """An fc layer on (R, C, H, W) features, flattened, as one on their :class:`Rows`."""
    outputs = layer.out_features
    weight = layer.weight.detach().view(outputs, -1, *size).permute(0, 2, 3, 1)
    made = FullyConnected(layer)
    made.weight = nn.Parameter(weight.reshape(outputs, -1), False)
    made.relu = relu
    return made
