"""Folds the norms of a library's network into the convolutions before them, for inference.

Detectron2's convolutions hold their norm. In the networks of torchvision and timm the two are
modules of their own: only a run shows which norm reads which convolution, and only comparing
outputs that nothing else reads it too.
"""

import copy
import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import nn

from .choose import replace_module
from .folded_norms import fold_into

logger = logging.getLogger(__name__)

# timm's, each a norm, a dropout and an activation in one.
WITH_ACTIVATION = ("BatchNormAct2d", "FrozenBatchNormAct2d")
TOLERANCE = 1e-3  # of a map's largest value


def with_folded_norms(backbone: nn.Module, image: torch.Tensor) -> nn.Module:
    """A copy in which norms with fixed statistics are folded into the ``nn.Conv2d`` before them.

    Such a convolution becomes a :class:`detectron2.layers.Conv2d`, with the ReLU after it if the
    norm has one; what else the norm does stays in its place. The copy is run without access to
    these convolutions but by calling them, so that they may be replaced by others.

    Args:
        backbone: in eval mode, returning feature maps by name.
        image: (N, C, H, W) float32, on the device of the backbone; what it is compared on.

    Returns:
        The copy; the backbone itself if it has no such norms, or if the copy's feature maps
        would be others.
    """
    kinds = {type(module) for module in backbone.modules() if _has_fixed_statistics(module)}
    if not kinds or not any(type(module) is nn.Conv2d for module in backbone.modules()):
        return backbone
    expected = backbone(image)
    folded = copy.deepcopy(backbone)
    convolutions = _fold(folded, image)
    if not convolutions:
        return backbone
    inside = [_Opaque(convolution) for convolution in convolutions]
    for convolution, opaque in zip(convolutions, inside, strict=True):
        replace_module(folded, convolution, opaque)
    try:
        alike = _alike(folded(image), expected)
    except (AttributeError, TypeError, NotImplementedError) as error:  # by reading their weights
        logger.debug("norms are not folded: %s", error)
        alike = False
    if not alike:
        logger.info("the backbone's norms are not folded: it uses their inputs otherwise too")
        return backbone
    for convolution, opaque in zip(convolutions, inside, strict=True):
        replace_module(folded, opaque, convolution)
    logger.info("%d norms of the backbone folded", len(convolutions))
    return folded


class _Opaque(nn.Module):
    """A convolution that can be called, and nothing else."""

    def __init__(self, convolution: nn.Module):
        super().__init__()
        self._call = convolution.forward  # a method is no submodule

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._call(x)


def _alike(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> bool:
    return all(
        bool((found[name] - value).abs().max() <= TOLERANCE * value.abs().max())
        for name, value in expected.items()
    )


def _fold(network: nn.Module, image: torch.Tensor) -> list[nn.Module]:
    """Fold in place; returns the convolutions."""
    pairs = _pairs(network, image)
    for convolution, norm in pairs.items():
        fold_into(convolution, norm)
        rest = _rest_of(norm)
        convolution.__class__ = Conv2d
        convolution.norm, convolution.activation = None, None
        if isinstance(rest, nn.ReLU):
            convolution.activation, rest = F.relu_, nn.Identity()
        replace_module(network, norm, rest)
    return list(pairs)


def _pairs(network: nn.Module, image: torch.Tensor) -> dict[Any, Any]:
    """Convolution -> the norm that reads it, in every call of either."""
    made: dict[int, tuple[nn.Module, torch.Tensor, int]] = {}  # outputs, and as of which write
    calls: Counter[nn.Module] = Counter()
    together: Counter[tuple[nn.Module, nn.Module]] = Counter()

    def after_convolution(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        calls[module] += 1
        made[id(output)] = module, output, output._version

    def before_norm(module: nn.Module, inputs: Any) -> None:
        calls[module] += 1
        if id(inputs[0]) in made:
            convolution, output, version = made[id(inputs[0])]
            if output._version == version:  # nothing was written to it in between
                together[convolution, module] += 1

    hooks = []
    for module in network.modules():
        if type(module) is nn.Conv2d:
            hooks.append(module.register_forward_hook(after_convolution))
        elif _has_fixed_statistics(module):
            hooks.append(module.register_forward_pre_hook(before_norm))
    try:
        network(image)
    finally:
        for hook in hooks:
            hook.remove()
    return {
        convolution: norm
        for (convolution, norm), times in together.items()
        if times == calls[convolution] == calls[norm]
    }


def _has_fixed_statistics(module: Any) -> bool:
    known = (
        isinstance(module, FrozenBatchNorm2d)
        or type(module).forward is nn.BatchNorm2d.forward
        or _has_activation(module)
    )
    return known and not module.training and module.running_mean is not None


def _has_activation(norm: nn.Module) -> bool:
    kind = type(norm)
    return kind.__module__.startswith("timm.") and kind.__name__ in WITH_ACTIVATION


def _rest_of(norm: Any) -> nn.Module:
    """What a norm does besides."""
    steps = [norm.drop, norm.act] if _has_activation(norm) else []
    steps = [step for step in steps if not isinstance(step, nn.Identity)]
    if len(steps) == 1:
        return steps[0]
    return nn.Sequential(*steps) if steps else nn.Identity()
