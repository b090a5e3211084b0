"""Detectron2's own pyramid over any of this project's networks: the control in comparisons."""

from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool

from ..bottom_up.build import build_bottom_up


@BACKBONE_REGISTRY.register()
class Detectron2Pyramid(FPN):
    """Detectron2's FPN, P2 to P6, over the network that ``MODEL.FPN_EXT.BOTTOM_UP`` names.

    Detectron2's builders know ResNets alone. Parameter names, and the order in which they are
    drawn, are FeaturePyramid's, so that the same seed gives the same weights.

    Args:
        bottom_up, in_features, out_channels, norm, top_block, fuse_type: Detectron2's.

    Raises:
        ValueError, FileNotFoundError: as :func:`fpn_ext.bottom_up.build.build_bottom_up`.
    """

    @configurable
    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        bottom_up, in_features = build_bottom_up(cfg, input_shape)
        return {
            "bottom_up": bottom_up,
            "in_features": in_features,
            "out_channels": cfg.MODEL.FPN.OUT_CHANNELS,
            "norm": cfg.MODEL.FPN.NORM,
            "top_block": LastLevelMaxPool(),
            "fuse_type": cfg.MODEL.FPN.FUSE_TYPE,
        }
