"""Level-mapped RoI pooling (Lin et al. 2017, Sec. 4.2) of operators that every runtime has."""

from typing import Any

import torch
from torch import nn
from torchvision.ops import roi_align

from ..modeling.pooler import LevelMappedROIPooler


class LevelMappedRoIAlign(nn.Module):
    """What a :class:`LevelMappedROIPooler` computes, of tensors alone.

    Each level pools its own boxes by one RoIAlign. A box without width or height has no sample if
    the sampling is adaptive: torchvision and ONNX Runtime then give 0, OpenVINO 0/0. Here it is 0.

    Args:
        pooler: whose levels, rule, output size and sampling are used.

    Raises:
        ValueError: ``pooler`` is none of this project's RoIAlign.
    """

    def __init__(self, pooler: Any):
        super().__init__()
        if not isinstance(pooler, LevelMappedROIPooler):
            raise ValueError(
                f"cannot export a {type(pooler).__name__}: a box must be pooled from one level by "
                "LevelMappedROIPooler (MODEL.ROI_HEADS.NAME PyramidROIHeads)"
            )
        if pooler.pooler_type == "ROIPool":
            raise ValueError(
                "cannot export POOLER_TYPE ROIPool, which runtimes round differently; a model "
                "trained with ROIAlignV2 or ROIAlign can be exported"
            )
        self.rule = pooler.rule
        self.scales = pooler.scales
        self.output_size = pooler.output_size
        self.sampling_ratio = pooler.sampling_ratio
        self.aligned = pooler.pooler_type == "ROIAlignV2"

    def forward(self, maps: list[torch.Tensor], rois: torch.Tensor) -> torch.Tensor:
        """Pool boxes of all images.

        Args:
            maps: (N, C, H_i, W_i) float32 maps of the levels, fine to coarse.
            rois: (R, 5) image index and XYXY in pixels of the network input; R may be 0.

        Returns:
            (R, C, output height, output width) in the order of ``rois``.
        """
        index = self.rule(rois[:, 1:])
        rows, pooled = [], []
        for i, (features, scale) in enumerate(zip(maps, self.scales, strict=True)):
            of_level = torch.nonzero(index == i).squeeze(1)
            rows.append(of_level)
            size = self.output_size
            pooled.append(
                roi_align(features, rois[of_level], size, scale, self.sampling_ratio, self.aligned)
            )
        order = torch.cat(rows)
        back = torch.zeros_like(order).scatter(0, order, torch.arange(order.shape[0]))
        found = torch.cat(pooled)[back]
        if self.aligned and self.sampling_ratio == 0:
            has_area = (rois[:, 3] > rois[:, 1]) & (rois[:, 4] > rois[:, 2])
            found = torch.where(has_area[:, None, None, None], found, torch.zeros_like(found))
        return found
