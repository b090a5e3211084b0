"""The model inside DistributedDataParallel."""

from typing import Any

from torch.nn.parallel import DistributedDataParallel


def unwrapped(model: Any) -> Any:
    """The model itself, whether or not it is wrapped in DistributedDataParallel.

    Two names for one thing: both have the same weights, but only the wrapped one's state dict has
    its keys behind ``module.``, and only it averages gradients over processes.
    """
    return model.module if isinstance(model, DistributedDataParallel) else model
