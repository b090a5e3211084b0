"""What the kernels are given, checked."""

import ctypes
from typing import Any

import torch


def checked(outputs: int, bias: torch.Tensor | None, *tensors: torch.Tensor) -> torch.Tensor | None:
    """The bias, contiguous.

    Raises:
        TypeError: a tensor is not float32 on the CPU.
        ValueError: the bias is not of as many outputs.
    """
    for tensor in (*tensors, *([] if bias is None else [bias])):
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
            raise TypeError(
                "the compiled kernels compute in float32 on the CPU, "
                f"got {tensor.dtype} on {tensor.device}"
            )
    if bias is None:
        return None
    expect("bias", bias.shape, (outputs,))
    return bias.contiguous()


def expect(what: str, found: Any, expected: Any) -> None:
    if found != expected:
        raise ValueError(f"the {what} must be {expected}, got {found}: of another layer?")


def int64(*values: int) -> tuple[ctypes.c_int64, ...]:
    return tuple(map(ctypes.c_int64, values))


def pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
