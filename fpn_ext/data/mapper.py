"""From a record of a dataset to what a model takes: Detectron2's mapper, for more files."""

import copy
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.structures import BoxMode

from ..keys import declare, own_keys
from .reading import read_picture, value_range

declare(
    "INPUT.FPN_EXT.CROP_LEAST_VISIBLE",
    0.0,
    "The share of a box that INPUT.CROP must leave for the object to be trained on. 0: every "
    "sliver is, as in Detectron2, and proposals on the borders of an image crowd out others.",
    "training",
)


class PictureMapper(DatasetMapper):
    """Detectron2's mapper, which reads pictures by :func:`fpn_ext.data.reading.read_picture`.

    A record's ``page`` is that of a TIFF with several, from 0. Objects of which a crop leaves less
    than ``INPUT.FPN_EXT.CROP_LEAST_VISIBLE`` are left out. All else is as in Detectron2's.

    Args:
        cfg, is_train: as for Detectron2's.
    """

    def __init__(self, cfg: CfgNode, is_train: bool):
        super().__init__(cfg, is_train)
        self.value_range = value_range(cfg)
        self.least_visible = own_keys(cfg, "INPUT").CROP_LEAST_VISIBLE

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        """As Detectron2's.

        Raises:
            OSError, ValueError: as :func:`fpn_ext.data.reading.read_picture`.
        """
        mapped = copy.deepcopy(record)  # it is modified below
        page = mapped.pop("page", None)
        image = read_picture(mapped["file_name"], self.image_format, self.value_range, page)
        utils.check_image_size(mapped, image)
        segmentation = mapped.pop("sem_seg_file_name", None)
        if segmentation is not None:
            segmentation = utils.read_image(segmentation, "L").squeeze(2)
        inputs = T.AugInput(image, sem_seg=segmentation)
        transforms = self.augmentations(inputs)
        size = inputs.image.shape[:2]
        mapped["image"] = torch.as_tensor(np.array(inputs.image.transpose(2, 0, 1), order="C"))
        if inputs.sem_seg is not None:
            mapped["sem_seg"] = torch.as_tensor(inputs.sem_seg.astype("long"))
        if self.proposal_topk is not None:
            utils.transform_proposals(mapped, size, transforms, proposal_topk=self.proposal_topk)
        if not self.is_train:
            mapped.pop("annotations", None)
        elif "annotations" in mapped:
            if self.least_visible > 0:
                mapped["annotations"] = [
                    annotation
                    for annotation in mapped["annotations"]
                    if visible_share(annotation, transforms, size) >= self.least_visible
                ]
            self._transform_annotations(mapped, transforms, size)
        return mapped


def visible_share(
    annotation: dict[str, Any], transforms: T.TransformList, size: tuple[int, int]
) -> float:
    """How much of a box, by area, lies in the transformed image; 0 of a box without area.

    Args:
        annotation: of Detectron2, with ``bbox`` and ``bbox_mode`` in the image as it was.
        transforms: from that image to the transformed one.
        size: height and width of the transformed image.
    """
    box = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
    corners = transforms.apply_box(np.array([box]))[0].reshape(2, 2)
    inside = np.clip(corners, 0, size[::-1])
    area, left = (np.prod(np.maximum(c[1] - c[0], 0)) for c in (corners, inside))
    return float(left / area) if area > 0 else 0.0
