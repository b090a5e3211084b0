"""An exported detector called like the model that it was made from."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.modeling import detector_postprocess
from detectron2.structures import Boxes, Instances
from detectron2.structures.keypoints import heatmaps_to_keypoints
from torch import nn

from .formats import load_exported


class ExportedModel(nn.Module):
    """A file of ``fpn-ext export``, called like a Detectron2 model: for its evaluators.

    Args:
        file: its suffix tells the runtime.

    Attributes:
        metadata (dict): what the file says of itself: class names, config, resize rule and more.

    Raises:
        FileNotFoundError, ImportError, ValueError: as :func:`load_exported`.
    """

    def __init__(self, file: Path):
        super().__init__()
        self.run, self.metadata = load_exported(file)

    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Instances]]:
        """Detections of each picture, one after the other.

        Args:
            batched_inputs: each with ``image`` (C, H, W), resized as the metadata say; ``height``
                and ``width`` of the picture, H and W if missing; ``proposals`` for Fast R-CNN.

        Returns:
            As Detectron2's: ``{"instances": ...}``, or of an RPN ``{"proposals": ...}``, in pixels
            of the picture.
        """
        return [self._one(entry) for entry in batched_inputs]

    def _one(self, entry: dict[str, Any]) -> dict[str, Instances]:
        arrays = arrays_of(entry, self.metadata["inputs"])
        height, width = arrays[0].shape[2:]
        found = dict(zip(self.metadata["outputs"], map(_tensor, self.run(*arrays)), strict=True))
        result = Instances((height, width))
        if "objectness_logits" in found:
            result.proposal_boxes = Boxes(found["boxes"])
            result.objectness_logits = found["objectness_logits"]
        else:
            result.pred_boxes = Boxes(found["boxes"])
            result.scores = found["scores"]
            result.pred_classes = found["classes"]
        if "masks" in found:
            result.pred_masks = found["masks"][:, None]
        if "keypoint_heatmaps" in found:
            heatmaps = found["keypoint_heatmaps"]
            points = heatmaps_to_keypoints(heatmaps, found["boxes"])
            result.pred_keypoints = points[:, :, [0, 1, 3]]  # x, y and score
        size = entry.get("height", height), entry.get("width", width)
        result = detector_postprocess(result, *size)
        return {"proposals" if "objectness_logits" in found else "instances": result}


def arrays_of(entry: dict[str, Any], inputs: Sequence[str]) -> tuple[np.ndarray, ...]:
    """The inputs of an exported file for a picture as Detectron2's models take it.

    Args:
        entry: with ``image`` (C, H, W), and ``proposals`` if ``inputs`` names them.
        inputs: of the file's metadata.

    Returns:
        (1, C, H, W) float32, and (1, P, 4) float32 where there are proposals.
    """
    arrays = [entry["image"].to(torch.float32)[None].numpy()]
    if "proposals" in inputs:
        arrays.append(entry["proposals"].proposal_boxes.tensor[None].numpy())
    return tuple(arrays)


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))
