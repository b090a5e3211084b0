"""Fig. 1(c): a pyramidal feature hierarchy, used "as if it were a featurized image pyramid".

SSD (Liu et al., ECCV 2016, arXiv 1512.02325, Fig. 2) predicts from a network's own maps and from
extra ones that it adds by convolutions of stride 2; no map learns of a coarser one. Here the maps
are C_k, from any level on; the extra layers are those of RetinaNet's P6 and P7. Everything else of
the detector is Detectron2's RetinaNet, so that it differs from one on the FPN in the maps alone.
Choices: docs/paper/differences.md.
"""

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY
from detectron2.modeling.meta_arch.retinanet import RetinaNet, RetinaNetHead
from torch import nn

from ..modeling.fpn import FeaturePyramid


@BACKBONE_REGISTRY.register()
class FeatureHierarchy(FeaturePyramid):
    """The bottom-up's own maps as the levels, P_k = C_k, without any convolution of a pyramid.

    Levels have the C_k's channels, each another number; a top block's have ``out_channels``.
    Arguments, names of levels and keys are FeaturePyramid's, of which ``norm`` and ``fuse_type`` do
    nothing.

    Raises:
        ValueError: as FeaturePyramid; a ``top_block`` that reads a P_k.
    """

    @configurable
    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        if self.top_block_level >= 0:
            raise ValueError(
                "MODEL.FPN_EXT.TOP_BLOCK must read a map of the bottom-up, as ConvolutionsOnC "
                f"does, got {type(self.top_block).__name__} on {self.top_block_source}: "
                "FeatureHierarchy has no levels of its own to put it on"
            )
        for name, child in list(self.named_children()):
            if child in self.laterals or child in self.outputs:
                delattr(self, name)
        del self.laterals, self.outputs, self.top_down
        shapes = self.bottom_up.output_shape()
        for level, c_k in zip(self._out_features, self.in_features, strict=False):
            self._out_feature_channels[level] = shapes[c_k].channels

    def levels_on_maps(self, maps: list[torch.Tensor]) -> list[torch.Tensor]:
        """The maps themselves: C_k, (N, C_k channels, H_k, W_k), fine to coarse."""
        levels: list[torch.Tensor] = []
        levels.extend(maps)
        maps.clear()
        return levels


class HierarchyHead(RetinaNetHead):
    """RetinaNet's head for maps that differ in their number of channels.

    The first 3x3 convolution of either subnet is one for each level; all others are shared by the
    levels, as in RetinaNet. Parameters: ``first_cls.{i}.*`` and ``first_bbox.{i}.*``, i from the
    finest level to the coarsest, and RetinaNetHead's.

    Args:
        input_shape: channels of each level's map, fine to coarse.
        conv_dims: output channels of each subnet's convolutions, the first included.
        norm: normalisation after each of them, a name known to
            :func:`detectron2.layers.get_norm`; ``""`` for none.
        **kwargs: of RetinaNetHead.

    Raises:
        ValueError: fewer than two convolutions.
    """

    @configurable
    def __init__(
        self, *, input_shape: list[ShapeSpec], conv_dims: list[int], norm: str = "", **kwargs: Any
    ):
        if len(conv_dims) < 2:
            raise ValueError(
                "MODEL.RETINANET.NUM_CONVS must be at least 2 for HierarchyRetinaNet, one for each "
                f"level and one that levels share; got {len(conv_dims)}"
            )
        width = conv_dims[0]
        shared = [ShapeSpec(channels=width, stride=shape.stride) for shape in input_shape]
        super().__init__(input_shape=shared, conv_dims=conv_dims[1:], norm=norm, **kwargs)
        channels = [shape.channels for shape in input_shape]
        self.first_cls = nn.ModuleList(_first(number, width, norm) for number in channels)
        self.first_bbox = nn.ModuleList(_first(number, width, norm) for number in channels)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: list[ShapeSpec]) -> dict:
        width = [cfg.MODEL.FPN.OUT_CHANNELS]  # as RetinaNet's on a pyramid
        return {
            **super().from_config(cfg, input_shape),
            "conv_dims": width * cfg.MODEL.RETINANET.NUM_CONVS,
        }

    def forward(
        self, features: list[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """L maps (N, C_i, H_i, W_i) -> L (N, A K, H_i, W_i) logits, L (N, 4 A, H_i, W_i) deltas."""
        logits: list[torch.Tensor] = []
        deltas: list[torch.Tensor] = []
        for first_cls, first_bbox, c_k in zip(
            self.first_cls, self.first_bbox, features, strict=True
        ):
            logits.append(self.cls_score(self.cls_subnet(first_cls(c_k))))
            deltas.append(self.bbox_pred(self.bbox_subnet(first_bbox(c_k))))
        return logits, deltas


def _first(in_channels: int, out_channels: int, norm: str) -> nn.Sequential:
    convolution = nn.Conv2d(in_channels, out_channels, 3, padding=1)
    nn.init.normal_(convolution.weight, std=0.01)  # as RetinaNet's
    nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]  # not None
    normalise = [get_norm(norm, out_channels)] if norm else []
    return nn.Sequential(convolution, *normalise, nn.ReLU())


@META_ARCH_REGISTRY.register()
class HierarchyRetinaNet(RetinaNet):
    """Detectron2's RetinaNet with a :class:`HierarchyHead`, for :class:`FeatureHierarchy`.

    Anchors, losses and inference are RetinaNet's, and so are the keys, ``MODEL.RETINANET``. The
    head is ``MODEL.FPN.OUT_CHANNELS`` wide.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        arguments: dict[str, Any] = super().from_config(cfg)
        shapes = arguments["backbone"].output_shape()
        of_levels = [shapes[name] for name in cfg.MODEL.RETINANET.IN_FEATURES]
        return {**arguments, "head": HierarchyHead(cfg, of_levels)}
