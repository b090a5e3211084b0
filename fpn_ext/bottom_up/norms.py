"""Replacing a network's batch norms by other norms that keep what was learned."""

import math
from typing import Any

from detectron2.layers import FrozenBatchNorm2d
from torch import nn

BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
KINDS = ("FrozenBN", "SyncBN", "GN")


def replace_norms(model: nn.Module, kind: str, name: str = "") -> int:
    """Replace each batch norm of ``model`` at or under ``name``.

    - ``"FrozenBN"``: batch norm with fixed running statistics and no trainable parameters.
    - ``"SyncBN"``: batch norm with statistics over the batches of all processes.
    - ``"GN"``: group norm, in gcd(32, channels) groups. It keeps scale and shift, and
      drops running statistics.

    Args:
        model: changed in place; not a batch norm itself.
        kind: one of the above.
        name: of a module of ``model``; ``""`` for the whole model.

    Returns:
        How many were replaced.

    Raises:
        TypeError: a batch norm that does more than ``nn.BatchNorm2d``, with no known replacement.
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
    # Detectron2's synchronised norm has its own forward: only its statistics differ.
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
