"""An RPN head for levels with different numbers of anchors."""

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling import RPN_HEAD_REGISTRY, build_anchor_generator
from torch import nn


@RPN_HEAD_REGISTRY.register()
class VariedAnchorsRPNHead(nn.Module):
    """The paper's RPN head, shared across levels as far as their anchor counts allow.

    All levels share the 3x3 convolution (Lin et al. 2017, Sec. 4.1); the two 1x1 convolutions, for
    scores and deltas, are shared by levels with the same number of anchors per location. If that
    number is the same on all levels, this is Detectron2's StandardRPNHead.

    Parameters: ``conv.*``, and for each anchor count A ``objectness_logits.{A}.*`` and
    ``anchor_deltas.{A}.*``.

    Args:
        in_channels: of every level's map.
        num_anchors: per location, for each level, fine to coarse.
        box_dim: parameters per box.

    Raises:
        ValueError: no levels, or a level without anchors.
    """

    @configurable
    def __init__(self, *, in_channels: int, num_anchors: list[int], box_dim: int = 4):
        super().__init__()
        if not num_anchors or min(num_anchors) < 1:
            raise ValueError(
                "each map of MODEL.RPN.IN_FEATURES needs at least one anchor per location, got "
                f"{num_anchors}"
            )
        self.keys = [str(number) for number in num_anchors]
        self.conv = Conv2d(in_channels, in_channels, 3, padding=1, activation=nn.ReLU())
        self.objectness_logits = nn.ModuleDict(
            {str(a): nn.Conv2d(in_channels, a, 1) for a in sorted(set(num_anchors))}
        )
        self.anchor_deltas = nn.ModuleDict(
            {str(a): nn.Conv2d(in_channels, a * box_dim, 1) for a in sorted(set(num_anchors))}
        )
        for name, parameter in self.named_parameters():  # as in StandardRPNHead
            if name.endswith("weight"):
                nn.init.normal_(parameter, std=0.01)
            else:
                nn.init.zeros_(parameter)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: list[ShapeSpec]) -> dict:
        channels = {shape.channels for shape in input_shape}
        if len(channels) != 1:
            raise ValueError(
                "one convolution serves all levels, so the maps of MODEL.RPN.IN_FEATURES need the "
                f"same number of channels, got {[shape.channels for shape in input_shape]}"
            )
        if list(cfg.MODEL.RPN.CONV_DIMS) != [-1]:
            raise ValueError(
                "MODEL.RPN.CONV_DIMS must be [-1]: VariedAnchorsRPNHead has one 3x3 convolution, "
                f"got {cfg.MODEL.RPN.CONV_DIMS}"
            )
        generator = build_anchor_generator(cfg, input_shape)
        return {
            "in_channels": channels.pop(),
            "num_anchors": generator.num_anchors,
            "box_dim": generator.box_dim,
        }

    def forward(
        self, features: list[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """L maps (N, d, H_i, W_i) -> L (N, A_i, H_i, W_i) logits, L (N, 4 A_i, H_i, W_i) deltas."""
        logits: list[torch.Tensor] = []
        deltas: list[torch.Tensor] = []
        for key, level_map in zip(self.keys, features, strict=True):
            hidden = self.conv(level_map)
            logits.append(self.objectness_logits[key](hidden))
            deltas.append(self.anchor_deltas[key](hidden))
        return logits, deltas
