"""The maps of a pyramid, recorded as it runs: C_k, M_k and P_k, and what each is made from."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from ..levels import map_name, stride_named


@dataclass(frozen=True)
class FeatureMap:
    """A map of the bottom-up network or of the pyramid.

    Attributes:
        name: ``"c4"``, ``"m4"`` or ``"p4"``.
        made_from: in words; of a C_k the network's name for it.
        height, width: in cells.
        stride: in pixels of the network input.
        channels: of the map.
    """

    name: str
    made_from: str
    height: int
    width: int
    stride: int
    channels: int


class PyramidMaps(NamedTuple):
    """What :func:`maps_of` records.

    Attributes:
        bottom_up: the C_k that the pyramid reads, fine to coarse.
        merged: the M_k, in the order they are computed.
        levels: the P_k, fine to coarse.
        outputs: the P_k themselves, (1, d, H_k, W_k), by name.
    """

    bottom_up: list[FeatureMap]
    merged: list[FeatureMap]
    levels: list[FeatureMap]
    outputs: dict[str, torch.Tensor]


class Call(NamedTuple):
    """A call of one of the pyramid's modules: its tensors. Kept, so that no id is used twice."""

    module: nn.Module
    inputs: list[torch.Tensor]
    outputs: list[torch.Tensor]


def maps_of(pyramid: Any, image: torch.Tensor) -> PyramidMaps:
    """Run a pyramid and record its maps.

    A map is followed from one of the pyramid's own modules to the next by its identity.

    Args:
        pyramid: a :class:`fpn_ext.FeaturePyramid` in evaluation mode.
        image: (1, C, H, W), with sides that it accepts, on its device; ``meta`` is enough.
    """
    calls: list[Call] = []

    def record(module: nn.Module, args: tuple, output: Any) -> None:
        calls.append(Call(module, _tensors(args), _tensors([output])))

    hooks = [child.register_forward_hook(record) for child in pyramid.children()]
    features: dict[str, torch.Tensor] = {}
    hooks.append(
        pyramid.bottom_up.register_forward_hook(lambda module, args, out: features.update(out))
    )
    try:
        with torch.no_grad():
            outputs = pyramid(image)
    finally:
        for hook in hooks:
            hook.remove()
    return _Reading(pyramid, features).read(calls, outputs)


class _Reading:
    """Names the tensors of a run, call by call."""

    def __init__(self, pyramid: Any, features: dict[str, torch.Tensor]):
        self.pyramid = pyramid
        self.laterals: list[nn.Module] = list(getattr(pyramid, "laterals", []))
        self.convolutions: list[nn.Module] = list(getattr(pyramid, "outputs", []))
        shapes = pyramid.bottom_up.output_shape()
        read = [*pyramid.in_features]
        if pyramid.top_block_source in features:
            read += [pyramid.top_block_source]
        self.strides: dict[str, int] = {}
        self.names: dict[int, str] = {}
        self.bottom_up = []
        self.read_at: dict[str, int] = {}  # the id of each C_k, by name
        for feature in dict.fromkeys(read):
            stride, tensor = int(shapes[feature].stride), features[feature]
            self.bottom_up.append(_map(map_name(stride, "c"), feature, tensor, stride))
            self.names[id(tensor)] = map_name(stride, "c")
            self.read_at[map_name(stride, "c")] = id(tensor)
            self.strides[map_name(stride, "c")] = stride
        self.merged: dict[str, tuple[list[str], torch.Tensor]] = {}
        self.made: dict[int, str] = {}  # what a P_k is made from, by its id

    def read(self, calls: list[Call], outputs: dict[str, torch.Tensor]) -> PyramidMaps:
        for call in calls:
            if call.module in self.laterals:
                self._lateral(call)
            elif call.module in self.convolutions:
                self._output(call)
            elif call.module is self.pyramid.top_block:
                source = self._name(call.inputs[0]) or self.pyramid.top_block_source
                kind = type(call.module).__name__
                for number, added in enumerate(call.outputs, 1):
                    which = f", {number} of {len(call.outputs)}" if len(call.outputs) > 1 else ""
                    self.made[id(added)] = f"{kind} on {source}{which}"
            elif len(call.inputs) == 2 and self._name(call.inputs[0]) in self.merged:
                self._merge(self._name(call.inputs[0]), call.inputs[1], call.outputs[0])
        for name, (_, tensor) in self.merged.items():
            self.made.setdefault(id(tensor), f"{name} itself")
        merged = [
            _map(name, " + ".join(made), tensor, self.strides[name])
            for name, (made, tensor) in self.merged.items()
        ]
        for feature in self.bottom_up:  # a hierarchy's levels
            self.made.setdefault(self.read_at[feature.name], f"{feature.name} itself")
        kind = type(self.pyramid).__name__
        levels = [
            _map(name, self.made.get(id(level), kind), level, stride_named(name) or 0)
            for name, level in outputs.items()
        ]
        return PyramidMaps(self.bottom_up, merged, levels, outputs)

    def _lateral(self, call: Call) -> None:
        source = self._name(call.inputs[0])
        channels = f"{call.inputs[0].shape[1]} to {call.outputs[0].shape[1]} channels"
        made = [f"{_kind(call.module)} on {source}, {channels}"]
        self._keep(map_name(self.strides[source], "m"), self.strides[source], made, call.outputs[0])

    def _output(self, call: Call) -> None:
        (merged,) = call.inputs
        name = self._name(merged)
        if name not in self.merged:  # upsampled, with no module between the two
            number = len(self.convolutions) - 1 - self.convolutions.index(call.module)
            level = self.pyramid.in_features[number]
            stride = int(self.pyramid.bottom_up.output_shape()[level].stride)
            name = map_name(stride, "m")
            if name not in self.merged:
                above, (_, coarser) = list(self.merged.items())[-1]
                self._keep(name, stride, [_upsampled(above, coarser, merged)], merged)
        self.made[id(call.outputs[0])] = f"{_kind(call.module)} on {name}"
        self.names[id(call.outputs[0])] = map_name(self.strides[name])

    def _merge(self, name: str, coarser: torch.Tensor, result: torch.Tensor) -> None:
        made, _ = self.merged[name]
        text = _upsampled(self._name(coarser), coarser, result)
        self._keep(name, self.strides[name], [*made, text], result)

    def _keep(self, name: str, stride: int, made: list[str], tensor: torch.Tensor) -> None:
        self.merged[name] = made, tensor
        self.names[id(tensor)] = name
        self.strides[name] = stride

    def _name(self, tensor: torch.Tensor) -> str:
        return self.names.get(id(tensor), "")


def _upsampled(name: str, coarser: torch.Tensor, finer: torch.Tensor) -> str:
    sizes = [f"{m.shape[-2]} x {m.shape[-1]}" for m in (coarser, finer)]
    return f"{name} from {sizes[0]} to {sizes[1]}"


def _kind(layer: Any) -> str:
    """ "3x3" of a convolution; the class of another layer."""
    size = getattr(layer, "kernel_size", None)
    return f"{size[0]}x{size[1]}" if size else type(layer).__name__


def _map(name: str, made_from: str, tensor: torch.Tensor, stride: int) -> FeatureMap:
    _, channels, height, width = tensor.shape
    return FeatureMap(name, made_from, height, width, stride, channels)


def _tensors(values: Iterable[Any]) -> list[torch.Tensor]:
    """The tensors among values, and in lists and dictionaries of them."""
    found = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, dict):
            found += _tensors(value.values())
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found
