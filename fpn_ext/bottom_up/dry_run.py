"""A network's feature maps, measured by running it: strides, channels, layout, dependencies.

A network's own metadata cannot be trusted (levels that are not powers of two, channels last, maps
out of order), so none of it is read here.
"""

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..levels import map_name
from ..names import aligned

# Added to the height for the second run: a multiple of 64 and of 7, so that strides 1, 2, 4, ...
# 64 and 7, 14, 28, ... are exact with any padding, as are all others below 15.
MORE_HEIGHT, MORE_WIDTH = 448, 64


@dataclass(frozen=True)
class FoundMap:
    """One output of a network, measured at two input sizes.

    Attributes:
        key: the network's name for it, or its index.
        shapes: of the output at the smaller and at the larger input, batch first.
        stride: input pixels per cell, the same along y and x; 0 if not a feature map.
        channels: 0 if not a feature map.
        channels_last: (N, H, W, C) instead of (N, C, H, W).
        note: why it is not a feature map, or a remark about it.
    """

    key: str
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    stride: int = 0
    channels: int = 0
    channels_last: bool = False
    note: str = ""


@dataclass(frozen=True)
class DryRun:
    """The measured outputs of a network.

    Attributes:
        sizes: (H, W) of the two inputs.
        divisor: input sides must be multiples of it; 1 for any sides.
        maps: one per output, in the network's order.
    """

    sizes: tuple[tuple[int, int], tuple[int, int]]
    divisor: int
    maps: tuple[FoundMap, ...]

    def by_name(self) -> dict[str, FoundMap]:
        """The last feature map of each stride, fine to coarse.

        ``"c3"`` has stride 2^3, ``"s6"`` stride 6.
        """
        last = {found.stride: found for found in self.maps if found.stride}
        return {map_name(stride, "c"): last[stride] for stride in sorted(last)}

    def table(self) -> str:
        """All outputs as a text table, one line each."""
        names = {found: name for name, found in self.by_name().items()}
        header = ["name", "output", *(f"at {h}x{w}" for h, w in self.sizes), "stride", "channels"]
        lines = [[*header, ""]]
        for found in self.maps:
            shapes = ["x".join(map(str, shape)) for shape in found.shapes]
            numbers = [str(found.stride or "-"), str(found.channels or "-")]
            note = found.note or ("channels last" if found.channels_last else "")
            lines.append([names.get(found, "-"), found.key, *shapes, *numbers, note])
        return aligned(lines)


def dry_run(network: nn.Module, channels: int, native: int = 0) -> DryRun:
    """Run a network at two input sizes and measure its outputs.

    Odd sides are tried first, then multiples of 32, of 64 and of ``native``.

    Args:
        network: image (N, channels, H, W) -> list or dictionary of tensors. It runs on its device
            in evaluation mode, and its mode is restored.
        channels: of the image.
        native: image side it was designed for; 0 if unknown.

    Raises:
        ValueError: it accepts none of these sizes.
    """
    refused = ""
    with _evaluating(network):
        for divisor in dict.fromkeys((1, 32, 64, native or 64)):
            sizes = _sizes(divisor)
            try:
                # Traced networks print where they failed.
                with torch.no_grad(), contextlib.redirect_stderr(io.StringIO()):
                    small, large = (_outputs(_run(network, channels, size)) for size in sizes)
            # A forward may fail at a size with any error; the last is reported.
            except Exception as error:
                refused = f"at {sizes[1][0]}x{sizes[1][1]} {type(error).__name__}: {error}"
                continue
            maps = (_found(key, small[key], large[key], sizes) for key in small)
            return DryRun(sizes, divisor, tuple(maps))
    raise ValueError(f"it takes images of one size only ({refused})")


def parameters_behind(
    network: nn.Module, channels: int, size: tuple[int, int]
) -> dict[str, set[str]]:
    """Names of the trainable parameters that each output depends on.

    Args:
        network: as for :func:`dry_run`.
        channels: of the image.
        size: (H, W) of an image it accepts.
    """
    trainable = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    behind: dict[str, set[str]] = {}
    with _evaluating(network), torch.enable_grad():
        for key, output in _outputs(_run(network, channels, size)).items():
            behind[key] = set()
            if isinstance(output, torch.Tensor) and output.requires_grad:
                gradients = torch.autograd.grad(
                    output.sum(), [p for _, p in trainable], retain_graph=True, allow_unused=True
                )
                pairs = zip(trainable, gradients, strict=True)
                behind[key] = {name for (name, _), gradient in pairs if gradient is not None}
    return behind


@contextlib.contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    training = network.training
    network.eval()  # batch norms keep their statistics, and nothing is random
    try:
        yield
    finally:
        network.train(training)


def _sizes(divisor: int) -> tuple[tuple[int, int], tuple[int, int]]:
    height, width = (97, 131) if divisor == 1 else (max(divisor, 96), max(2 * divisor, 160))
    height, width = (side - side % divisor for side in (height, width))
    more_height = -(-MORE_HEIGHT // divisor) * divisor
    more_width = -(-MORE_WIDTH // divisor) * divisor
    return (height, width), (height + more_height, width + more_width)


def _run(network: Callable[[torch.Tensor], Any], channels: int, size: tuple[int, int]) -> Any:
    parameter = next(iter(network.parameters()), torch.zeros(0))  # type: ignore[attr-defined]
    return network(torch.zeros(1, channels, *size, device=parameter.device))


def _outputs(outputs: Mapping[str, Any] | Sequence[Any]) -> dict[str, Any]:
    if isinstance(outputs, Mapping):
        return dict(outputs)
    return {str(number): output for number, output in enumerate(outputs)}


def _found(key: str, small: Any, large: Any, sizes: tuple) -> FoundMap:
    if not isinstance(small, torch.Tensor):
        return FoundMap(key, ((), ()), note=f"a {type(small).__name__}, no tensor")
    shapes = (tuple(small.shape), tuple(large.shape))
    if small.dim() != 4:
        return FoundMap(key, shapes, note=f"{small.dim()} dimensions instead of 4")
    growing = [i for i in range(4) if shapes[0][i] != shapes[1][i]]
    if not growing:
        return FoundMap(key, shapes, note="of one size, whatever the image's")
    if growing not in ([2, 3], [1, 2]):
        return FoundMap(key, shapes, note="sides and channels cannot be told apart")
    more = [large - small for small, large in zip(*sizes, strict=True)]
    steps = [shapes[1][i] - shapes[0][i] for i in growing]
    stride = round(more[0] / max(steps[0], 1))
    if any(abs(s * stride - m) >= stride for s, m in zip(steps, more, strict=True)):
        return FoundMap(key, shapes, note="not of one stride, down and across")
    channels_last = growing == [1, 2]
    channels = shapes[0][3 if channels_last else 1]
    missing = sizes[0][0] - stride * shapes[0][growing[0]]
    note = ""
    if missing >= stride:
        note = f"lacks {missing} px of the image's border"
    return FoundMap(key, shapes, stride, channels, channels_last, note)
