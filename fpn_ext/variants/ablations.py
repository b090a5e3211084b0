"""The pyramids of the paper's ablations: rows (d), (e) and (f) of Tables 1 and 2 (Sec. 5.1, 5.2).

And one that is not in the paper, without the 3x3 convolutions. Each removes one element of
:class:`FeaturePyramid` and has no unused convolution. Constructor arguments, names of parameters
and feature maps, and YAML keys are FeaturePyramid's. (Rows (a) and (b) have no pyramid: the heads
read a ResNet's ``res4`` or ``res5``.)
"""

from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from torch import nn

from ..modeling.fpn import FeaturePyramid


@BACKBONE_REGISTRY.register()
class BottomUpPyramid(FeaturePyramid):
    """Row (d): lateral connections without the top-down pathway, P_k = 3x3(1x1(C_k)).

    "The 1x1 lateral connections followed by 3x3 convolutions are attached to the bottom-up
    pyramid": high resolution, but fine levels get no semantics from coarse ones.
    """

    @configurable
    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        del self.top_down

    def levels_on_maps(self, maps: list[torch.Tensor]) -> list[torch.Tensor]:
        """As :meth:`FeaturePyramid.levels_on_maps`, each level independently."""
        levels: list[torch.Tensor] = []
        for lateral, output in zip(self.laterals, self.outputs):  # noqa: B905 (TorchScript)
            levels.insert(0, output(lateral(maps.pop())))
        return levels


@BACKBONE_REGISTRY.register()
class TopDownPyramid(FeaturePyramid):
    """Row (e): the top-down pathway without the lateral connections.

    A 1x1 convolution on C5, repeatedly upsampled by 2; a 3x3 convolution on each of these maps
    gives P_k. Strong semantics at all levels, but imprecise localisation. The paper leaves open
    whether the 3x3 convolutions stay; here they do.
    """

    @configurable
    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        _remove(self, self.laterals[1:])
        self.laterals = self.laterals[:1]
        del self.top_down

    def levels_on_maps(self, maps: list[torch.Tensor]) -> list[torch.Tensor]:
        """As :meth:`FeaturePyramid.levels_on_maps`; of C2..C4 only the sizes are used."""
        sizes = [c_k.shape[-2:] for c_k in maps]
        coarser = maps.pop()
        maps.clear()
        for lateral in self.laterals:  # only the coarsest C_k's
            coarser = lateral(coarser)
        levels: list[torch.Tensor] = []
        for output in self.outputs:
            coarser = F.interpolate(coarser, size=sizes.pop(), mode="nearest")
            levels.insert(0, output(coarser))
        return levels


@BACKBONE_REGISTRY.register()
class FinestLevelPyramid(FeaturePyramid):
    """Row (f): the whole pyramid is computed, but only its finest map is output.

    Anchors of all scales go on that one map, and every box is pooled from it.

    Raises:
        ValueError: a ``top_block`` is given; its levels would not be output.
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

    def levels_on_maps(self, maps: list[torch.Tensor]) -> list[torch.Tensor]:
        """As :meth:`FeaturePyramid.levels_on_maps`, with only the finest level: [P2]."""
        merged: torch.Tensor | None = None
        for lateral in self.laterals:
            finer = lateral(maps.pop())
            merged = finer if merged is None else self.top_down(finer, merged)
        assert merged is not None
        levels: list[torch.Tensor] = []
        for output in self.outputs:  # only the finest level's
            levels.append(output(merged))
        return levels


@BACKBONE_REGISTRY.register()
class UnsmoothedPyramid(FeaturePyramid):
    """The pyramid without its 3x3 convolutions: P_k is the merged map M_k itself.

    The paper has them "to reduce the aliasing effect of upsampling" (Sec. 3), and no figures
    without them. The heads of such a pyramid read sums of lateral connections and upsampled maps.
    """

    @configurable
    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        _remove(self, self.outputs)
        del self.outputs

    def levels_on_maps(self, maps: list[torch.Tensor]) -> list[torch.Tensor]:
        """As :meth:`FeaturePyramid.levels_on_maps`, without a convolution after the sum."""
        levels: list[torch.Tensor] = []
        for lateral in self.laterals:
            merged = lateral(maps.pop())
            if len(levels) > 0:
                merged = self.top_down(merged, levels[0])
            levels.insert(0, merged)
        return levels


def _remove(module: nn.Module, unused: list[nn.Module]) -> None:
    for name in [name for name, child in module.named_children() if child in unused]:
        delattr(module, name)
