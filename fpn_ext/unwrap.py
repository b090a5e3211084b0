"""The model inside DistributedDataParallel."""

from typing import Any

from torch.nn.parallel import DistributedDataParallel


def unwrapped(model: Any) -> Any:
    """The model itself, whether or not it is wrapped in DistributedDataParallel.

    Both share the same weights, but only the wrapper prefixes state-dict keys with ``module.`` and
    averages gradients across processes.
    """
    return model.module if isinstance(model, DistributedDataParallel) else model
