"""Layers of an optimised model whose weights oneDNN packs once, with the ReLU in the same pass.

torch's own convolution packs the weights at each call, which on small maps takes as long as the
sums, and applies a ReLU in a second pass over the map. The operators here are those that
torch.compile uses.
"""

from typing import Any

import torch
from torch import nn

from .residuals import convolve_add_relu_, has_bfloat16_convolutions, has_relu

_OPERATORS = (
    *("_convolution_pointwise", "_convolution_pointwise_", "_linear_pointwise"),
    *("_reorder_convolution_weight", "_reorder_linear_weight"),
)


def serves(layer: Any) -> bool:
    """Whether oneDNN can hold this convolution's or fc layer's weights, here."""
    return layer.weight.device.type == "cpu" and _has(layer.weight.dtype)


def _has(dtype: torch.dtype) -> bool:
    known = dtype == torch.float32 or (dtype == torch.bfloat16 and has_bfloat16_convolutions())
    return (
        known
        and torch.backends.mkldnn.is_available()
        and all(hasattr(torch.ops.mkldnn, name) for name in _OPERATORS)
    )


class _Packed(nn.Module):
    """A layer with packed weights; copies, pickles and state dicts hold them as they were."""

    packed: torch.Tensor

    def __init__(self, layer: Any):
        super().__init__()
        self.dtype, self.bias = layer.weight.dtype, layer.bias
        self.relu = has_relu(layer)

    @property
    def after(self) -> str:
        """oneDNN's name of what follows the sums."""
        return "relu" if self.relu else "none"

    def _pack(self, weight: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "packed": self.packed.to_dense()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if not _has(self.dtype):
            raise RuntimeError(
                f"this model was optimised in {self.dtype} for a processor whose oneDNN computes "
                "in it: call optimize_for_inference on the model it was made from, here"
            )
        self.packed = self._pack(self.packed)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.packed.to_dense()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        _, strict, missing, _, faults = others
        weight = state_dict.get(prefix + "weight")
        state_dict = {k: v for k, v in state_dict.items() if k != prefix + "weight"}
        super()._load_from_state_dict(state_dict, prefix, *others)
        if weight is None:
            missing.extend([prefix + "weight"] if strict else [])
        elif weight.shape != self.packed.shape:
            faults.append(
                f"size mismatch for {prefix}weight: {tuple(weight.shape)} from the checkpoint, "
                f"{tuple(self.packed.shape)} here."
            )
        else:
            self.packed = self._pack(weight.to(self.dtype))

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        like = fn(torch.empty(0, dtype=self.dtype))
        if like.dtype != self.dtype or like.device.type != "cpu":
            raise RuntimeError(
                f"this model came from optimize_for_inference in {self.dtype} on a CPU, and cannot "
                f"become {like.dtype} on {like.device}: convert the model it was made from, and "
                "optimise that"
            )
        return super()._apply(fn, recurse)


class PackedConvolution(_Packed):
    """A convolution; with a shortcut, the sum and the ReLU after it too."""

    def __init__(self, convolution: nn.Conv2d):
        super().__init__(convolution)
        self.stride, self.padding = convolution.stride, convolution.padding
        self.dilation, self.groups = convolution.dilation, convolution.groups
        self.packed = self._pack(convolution.weight.detach())

    @staticmethod
    def serves(convolution: Any) -> bool:
        # torch.nn.Conv2d may also pad by a word, or with other than zeros.
        padded = isinstance(convolution.padding, tuple) and convolution.padding_mode == "zeros"
        return padded and serves(convolution)

    def _pack(self, weight: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._reorder_convolution_weight(
            weight, self.padding, self.stride, self.dilation, self.groups
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, I, H, W) -> (N, O, H', W')."""
        return torch.ops.mkldnn._convolution_pointwise(
            *(self._input(x), self.packed, self.bias, self.padding, self.stride, self.dilation),
            *(self.groups, self.after, [], ""),
        )

    def _input(self, x: torch.Tensor) -> torch.Tensor:
        # autocast may have made it something else
        return x.to(self.dtype).contiguous(memory_format=torch.channels_last)


class PackedSum(PackedConvolution):
    """A :class:`.residuals.DirectSum`."""

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, shortcut: torch.Tensor, owned: bool
    ) -> torch.Tensor:
        """As :meth:`.residuals.DirectSum.forward`."""
        into = shortcut.to(self.dtype).contiguous(memory_format=torch.channels_last)
        if into is shortcut and not owned:
            into = into.clone()
        return convolve_add_relu_(self, self.packed, self._input(x), into)


class PackedFullyConnected(_Packed):
    """A fully connected layer."""

    def __init__(self, layer: Any):
        super().__init__(layer)
        self.packed = self._pack(layer.weight.detach())

    def _pack(self, weight: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._reorder_linear_weight(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(R, I) -> (R, O)."""
        return torch.ops.mkldnn._linear_pointwise(
            x.to(self.dtype), self.packed, self.bias, self.after, [], ""
        )
