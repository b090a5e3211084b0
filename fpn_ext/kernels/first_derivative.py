"""A backward pass that has no derivative of its own, and says so in a sentence."""

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import torch

ROI_ALIGN = (
    "RoIAlign has no second derivative here, as it has none in torchvision: take no gradient of a "
    "gradient through RoI pooling (create_graph=True)"
)

Backward: TypeAlias = Callable[..., tuple[torch.Tensor | None, ...]]


def first_derivative_only(sentence: str) -> Callable[[Backward], Backward]:
    """As ``torch.autograd.function.once_differentiable``, with a message of its own.

    Gradients may be taken with ``create_graph=True``; what is differentiated once more through this
    function raises RuntimeError.

    Args:
        sentence: what cannot be done, and what to do instead.
    """

    def decorate(backward: Backward) -> Backward:
        @functools.wraps(backward)
        def once(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            with torch.no_grad():
                results = backward(ctx, *gradients)
            if not torch.is_grad_enabled() or not any(g.requires_grad for g in gradients):
                return results
            tensors = [result for result in results if result is not None]
            refused = iter(_Refused.apply(sentence, len(gradients), *gradients, *tensors))
            return tuple(None if result is None else next(refused) for result in results)

        return once

    return decorate


class _Refused(torch.autograd.Function):
    """Tensors as they are, which seem to depend on others; their gradient is an error."""

    @staticmethod
    def forward(ctx: Any, sentence: str, count: int, *tensors: torch.Tensor) -> Any:
        ctx.sentence = sentence
        return tuple(tensor.view_as(tensor) for tensor in tensors[count:])

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError(ctx.sentence)
