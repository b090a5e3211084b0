"""The pyramids of the paper's ablations: rows (d), (e) and (f) of Tables 1 and 2 (Sec. 5.1, 5.2).

Each takes one thing away from :class:`FeaturePyramid` and owns no convolution it does not use.
Constructor arguments, names of parameters and maps, and the YAML keys are FeaturePyramid's. (Rows
(a) and (b) have no pyramid: there the heads read a ResNet's ``res4`` or ``res5``.)
"""

from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from torch import nn

from .fpn import FeaturePyramid


@BACKBONE_REGISTRY.register()
class BottomUpPyramid(FeaturePyramid):
    """Row (d): lateral connections without the top-down pathway, P_k = 3x3(1x1(C_k)).

    "The 1x1 lateral connections followed by 3x3 convolutions are attached to the bottom-up
    pyramid": high resolution, but nothing tells the fine levels what the coarse ones have seen.
    """

    @configurable
    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        del self.top_down

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """As :meth:`FeaturePyramid.forward`, each level by itself."""
        features = self.bottom_up(image)
        results: dict[str, torch.Tensor] = {}
        if self.top_block_source in features:
            results[self.top_block_source] = features[self.top_block_source]
        level = len(self.in_features)
        for lateral, output in zip(self.laterals, self.outputs):  # noqa: B905 (TorchScript)
            level -= 1
            c_k = features[self.in_features[level]]
            results[self._out_features[level]] = output(lateral(c_k))
        return self._with_top_block(results)


@BACKBONE_REGISTRY.register()
class TopDownPyramid(FeaturePyramid):
    """Row (e): the top-down pathway without the lateral connections.

    A 1x1 convolution on C5, upsampled by 2 again and again; a 3x3 convolution on each of these
    maps gives P_k. Strong semantics everywhere, but where things are was lost on the way down.
    The paper leaves open whether the 3x3 convolutions stay: they do here.
    """

    @configurable
    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        _remove(self, self.laterals[1:])
        self.laterals = self.laterals[:1]
        del self.top_down

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """As :meth:`FeaturePyramid.forward`; of C2..C4 it takes the size alone."""
        features = self.bottom_up(image)
        results: dict[str, torch.Tensor] = {}
        if self.top_block_source in features:
            results[self.top_block_source] = features[self.top_block_source]
        level = len(self.in_features)
        coarser = features[self.in_features[level - 1]]
        for lateral in self.laterals:
            coarser = lateral(coarser)
        for output in self.outputs:
            level -= 1
            size = features[self.in_features[level]].shape[-2:]
            coarser = F.interpolate(coarser, size=size, mode="nearest")
            results[self._out_features[level]] = output(coarser)
        return self._with_top_block(results)


@BACKBONE_REGISTRY.register()
class FinestLevelPyramid(FeaturePyramid):
    """Row (f): the whole pyramid is built, and its finest map alone is given to the heads.

    Anchors of all scales belong on that one map, and every box is pooled from it.

    Raises:
        ValueError: a ``top_block`` is given; its levels would not be among the maps.
    """

    @configurable
    def __init__(self, **kwargs: Any):
        if kwargs.get("top_block") is not None:
            raise ValueError(
                "FinestLevelPyramid gives its finest map alone: top_block must be None"
            )
        super().__init__(**kwargs)
        _remove(self, self.outputs[:-1])
        self.outputs = self.outputs[-1:]
        self._out_features = self._out_features[:1]

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict:
        return {**super().from_config(cfg, input_shape), "top_block": None}

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """As :meth:`FeaturePyramid.forward`, with the finest map alone: ``{"p2": ...}``."""
        features = self.bottom_up(image)
        bottom_up_maps = [features[name] for name in self.in_features]
        features = {}
        merged: torch.Tensor | None = None
        for lateral in self.laterals:
            finer = lateral(bottom_up_maps.pop())
            merged = finer if merged is None else self.top_down(finer, merged)
        assert merged is not None
        results: dict[str, torch.Tensor] = {}
        for output in self.outputs:
            results[self._out_features[0]] = output(merged)
        return results


def _remove(module: nn.Module, unused: list[nn.Module]) -> None:
    for name in [name for name, child in module.named_children() if child in unused]:
        delattr(module, name)
