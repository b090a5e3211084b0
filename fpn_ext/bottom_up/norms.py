"""Another normalisation in the place of a network's batch norms, with what they have learned."""

import math
from typing import Any

from detectron2.layers import FrozenBatchNorm2d
from torch import nn

BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
KINDS = ("FrozenBN", "SyncBN", "GN")


def replace_norms(model: nn.Module, kind: str, name: str = "") -> int:
    """Put another norm in the place of each batch norm of ``model`` at or under ``name``.

    - ``"FrozenBN"``: batch norm by running statistics that never change; nothing to train in it.
    - ``"SyncBN"``: batch norm by the statistics of all processes' batches together.
    - ``"GN"``: group norm, in 32 groups or as many as divide both 32 and the channels. It takes
      over scale and shift; running statistics have no use in it.

    Args:
        model: changed in place; not a batch norm itself.
        kind: one of the above.
        name: of a module of ``model``; ``""`` is the whole model.

    Returns:
        How many were replaced.

    Raises:
        TypeError: a batch norm of a kind that does more, for which no other form is known.
    """
    count = 0
    for path, module in list(model.named_modules()):
        within = not name or path == name or path.startswith(f"{name}.")
        if within and isinstance(module, BATCH_NORMS):
            parent, _, child = path.rpartition(".")
            model.get_submodule(parent).add_module(child, _replaced(module, kind))
            count += 1
    return count


def _replaced(norm: Any, kind: str) -> nn.Module:
    # Detectron2's synchronised norm has a forward of its own, which only counts otherwise.
    if _is_plain(norm) or type(norm).__module__.startswith("detectron2."):
        if kind == "FrozenBN":
            return FrozenBatchNorm2d.convert_frozen_batchnorm(norm)
        if kind == "SyncBN":
            return nn.SyncBatchNorm.convert_sync_batchnorm(norm)
        return _taking_over(nn.GroupNorm(_groups(norm), norm.num_features, norm.eps), norm)
    if type(norm).__module__.startswith("timm."):  # a norm and an activation in one
        from timm import layers

        if kind == "FrozenBN":
            return layers.freeze_batch_norm_2d(norm)
        if kind == "SyncBN":
            return layers.convert_sync_batchnorm(norm)
        group_norm = layers.GroupNormAct(norm.num_features, _groups(norm), norm.eps)
        group_norm.drop, group_norm.act = norm.drop, norm.act
        return _taking_over(group_norm, norm)
    raise TypeError(
        f"cannot make {kind} of a batch norm of type {type(norm).__module__}."
        f"{type(norm).__name__}: it does more than nn.BatchNorm2d"
    )


def _is_plain(norm: Any) -> bool:
    return type(norm).forward in (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward)


def _groups(norm: Any) -> int:
    return math.gcd(32, norm.num_features)


def _taking_over(group_norm: nn.Module, norm: Any) -> nn.Module:
    if norm.affine:
        group_norm.weight, group_norm.bias = norm.weight, norm.bias
    return group_norm
