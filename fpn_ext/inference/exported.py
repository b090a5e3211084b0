"""A file of ``fpn-ext export``, for :class:`fpn_ext.Detector`."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from detectron2.data import transforms as T
from detectron2.structures import Instances

from ..export.runtime import ExportedModel
from ..files.run_folder import config_of, weights_of
from ..files.weight_files import sha256
from .predictor import TakesPictures, detections_of

# Files that hold a graph and numbers alone. What PyTorch saves may hold code.
SUFFIXES = (".onnx", ".xml")
OF_TRAININGS = (".yaml", ".yml", ".pth", ".pkl", ".safetensors")  # configs and checkpoints


def check_suffix(file: Path) -> None:
    """Raise ValueError if a file is no graph of numbers alone, by its name."""
    if file.suffix in OF_TRAININGS:
        raise ValueError(
            f"{file} is of a training, and no exported detector: load the training's folder, or "
            'load(config_file="....yaml", weights="....pth")'
        )
    if file.is_file() and file.suffix not in SUFFIXES:
        raise ValueError(
            f"{file}: an exported detector is loaded from {' or '.join(SUFFIXES)} (fpn-ext "
            "export --format onnx, openvino); what PyTorch saves may hold code, and is for "
            "torch.jit.load or torch.export.load, if you trust it"
        )


logger = logging.getLogger(__name__)


def _warn_of_other_weights(file: Path, exported_from: Mapping[str, str]) -> None:
    """Where a file lies in the folder of a training, say if that has other weights now."""
    try:
        config_of(file.parent)
        weights = weights_of(file.parent)
    except FileNotFoundError:  # it was taken elsewhere
        return
    if exported_from.get("sha256", "") not in ("", sha256(str(weights))):
        logger.warning(
            "%s was exported from %s, and the weights of the training are others now (%s): "
            "fpn-ext export --run %s makes it anew",
            *(file, exported_from["file"], weights.name, file.parent),
        )


class ExportedDetector(TakesPictures):
    """An exported detector, with what :class:`fpn_ext.inference.eager.EagerModel` has.

    Args:
        file: an ``.onnx`` or ``.xml`` file of ``fpn-ext export``.

    Attributes:
        classes (dict): COCO category id of each class, in the order of their numbers, and its name.
        weights (str): the file, and the checkpoint it was exported from.
        pixel_format (str): ``INPUT.FORMAT``.
        value_range: ``INPUT.FPN_EXT.VALUE_RANGE``.

    Raises:
        FileNotFoundError: no such file.
        ImportError: the runtime is not installed; with the line that installs it.
        ValueError: another suffix; a file that was not exported from here.
    """

    def __init__(self, file: Path):
        check_suffix(file)
        self.model = ExportedModel(file)
        self.device = torch.device("cpu")
        self.keypoint_names: list[str] = []  # the file does not say
        about = self.model.metadata
        exported_from = about.get("weights", {})
        self.weights = f"{file}, exported from {exported_from.get('file') or 'unknown weights'}"
        _warn_of_other_weights(file, exported_from)
        self.classes = dict(zip(about["category_ids"], about["class_names"], strict=True))
        self.pixel_format: str = about["pixel_format"]
        self.value_range = tuple(about["value_range"])
        self.needs_proposals = "proposals" in about["inputs"]
        shortest = about["resize"]["shortest_side"]
        longest = about["resize"]["longest_side_at_most"]
        self.aug = T.ResizeShortestEdge([shortest, shortest], longest)

    @property
    def refuses_boxes(self) -> str:
        """Why it takes no boxes of the user's; "" if it does."""
        if self.needs_proposals:
            return ""
        return "this exported file proposes boxes itself, and takes none: only a Fast R-CNN's does"

    def infer(self, inputs: list[dict[str, Any]]) -> list[Instances]:
        """The detections on each picture, in pixels of the pictures: one after the other."""
        return [detections_of(self.model([entry])[0]) for entry in inputs]
