"""Which levels share the weights of a model's heads, and what a head costs on each level."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..variants.unshared import UnsharedROIHeads


@dataclass(frozen=True)
class Weights:
    """Layers with one set of weights, and the levels that they work on.

    Attributes:
        part: of the model, ``"RPN head"``.
        layers: names of its layers in that part.
        levels: names of the maps.
    """

    part: str
    layers: list[str]
    levels: list[str]


class DenseHead(NamedTuple):
    """The head that slides over all levels, RPN's or RetinaNet's, and its anchors."""

    name: str
    module: nn.Module
    generator: Any
    levels: list[str]


def dense_head(model: Any) -> DenseHead | None:
    """The dense head of a model; None if it has none, as Fast R-CNN."""
    if hasattr(model, "head_in_features"):  # Detectron2's dense detectors
        name = f"{type(model).__name__} head"
        return DenseHead(name, model.head, model.anchor_generator, list(model.head_in_features))
    rpn = getattr(model, "proposal_generator", None)
    if rpn is None:
        return None
    return DenseHead("RPN head", rpn.rpn_head, rpn.anchor_generator, list(rpn.in_features))


def run_head(head: DenseHead, maps: list[torch.Tensor]) -> tuple[list[int], list[Weights]]:
    """Multiply-adds of a dense head on each map, and which layers work on which maps.

    Args:
        head: in evaluation mode.
        maps: (1, d, H_k, W_k) of its levels, on its device; ``meta`` is enough.
    """
    used: dict[str, list[str]] = {}
    level = ""

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            if args[0].numel() and level not in used.setdefault(name, []):
                used[name].append(level)

        return hook

    layers = [(n, m) for n, m in head.module.named_modules() if list(m.parameters(False))]
    hooks = [module.register_forward_hook(note(name)) for name, module in layers]
    costs = []
    for i, level in enumerate(head.levels):  # noqa: B007 (read by the hooks)
        # The other maps are there, with no image on them: each head gets as many as it needs.
        alone = [m if j == i else m[:0] for j, m in enumerate(maps)]
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            head.module(alone)
        costs.append(counter.get_total_flops() // 2)
    for hook in hooks:
        hook.remove()
    by_levels: dict[tuple[str, ...], list[str]] = {}
    for name, levels in _shortened(used).items():
        by_levels.setdefault(tuple(levels), []).append(name)
    return costs, [Weights(head.name, names, list(ls)) for ls, names in by_levels.items()]


def _shortened(used: dict[str, list[str]], depth: int = 1) -> dict[str, list[str]]:
    """Names of layers, cut to their first parts where all layers below have the same levels.

    >>> _shortened({"conv.0": ["p2", "p3"], "conv.1": ["p2", "p3"], "norm.0": ["p2"], "norm.1": []})
    {'conv': ['p2', 'p3'], 'norm.0': ['p2'], 'norm.1': []}
    """
    groups: dict[str, dict[str, list[str]]] = {}
    for name, levels in used.items():
        groups.setdefault(".".join(name.split(".")[:depth]), {})[name] = levels
    short: dict[str, list[str]] = {}
    for prefix, members in groups.items():
        first = next(iter(members.values()))
        alike = all(levels == first for levels in members.values())
        short |= {prefix: first} if alike else _shortened(members, depth + 1)
    return short


def weights_of_roi_heads(heads: nn.Module, levels: list[str]) -> list[Weights]:
    """Which levels share the layers of RoI heads that pool from ``levels``."""
    names = [name for name, child in heads.named_children() if list(child.parameters())]
    own: list[str] = []
    if isinstance(heads, UnsharedROIHeads):
        own = [name for name in names if name in ("box_head", "box_predictor")]
    rows = [
        Weights("RoI heads", [f"{name}.{i}" for name in own], [level])
        for i, level in enumerate(levels if own else [])
    ]
    shared = [name for name in names if name not in own]
    return rows + ([Weights("RoI heads", shared, levels)] if shared else [])
