"""A trained model on one picture after the other, with the names of its classes."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.data import transforms as T
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from ..config.level_table import level_table, level_table_in_errors
from ..config.load import load_config
from ..config.made_with import other_than_trained
from ..config.prepare import prepare
from ..data.class_names import class_names
from ..data.datasets import register_datasets
from ..data.reading import read_picture, value_range
from ..files.checkpoint import CompleteCheckpointer, described
from ..files.trained_on import TrainedOn, trained_on_of
from ..keys import own_keys


def load_inference_config(
    config_file: str, opts: Sequence[str] = (), *, of_run: bool = False
) -> CfgNode:
    """A config ready for a :class:`Predictor`, keeping the levels of each detection.

    Prints what was chosen, and the level table.

    Args:
        of_run: the file is that of a training, whose datasets may not be known here; those of
            another machine are left out.

    Raises:
        FileNotFoundError: no such config, or no such checkpoint (a local ``MODEL.WEIGHTS``).
        ValueError: what :func:`fpn_ext.prepare` finds wrong, or a model that needs proposals made
            beforehand.
    """
    cfg, notes = inference_config(config_file, opts, of_run=of_run)
    if cfg.MODEL.LOAD_PROPOSALS:
        raise ValueError(
            "MODEL.LOAD_PROPOSALS: this model needs proposals made beforehand for every picture; "
            "predict with a model that has its own RPN, or give fpn_ext.Detector the proposals"
        )
    print("\n".join(notes))
    return cfg


def inference_config(
    config_file: str, opts: Sequence[str] = (), *, of_run: bool = False
) -> tuple[CfgNode, list[str]]:
    """As :func:`load_inference_config`, and what that prints; of any model."""
    if of_run:
        opts = [*opts, *without_unknown_datasets(config_file, opts)]
    cfg, notes = prepare(config_file, opts, weights="required")
    notes = [note for note in (*notes, level_table(cfg)) if note]
    cfg.MODEL.FPN_EXT.KEEP_LEVELS = True
    cfg.freeze()
    return cfg, notes


def without_unknown_datasets(config_file: str, opts: Sequence[str]) -> list[str]:
    """Overrides that leave out of a config the datasets that are not registered, and their file."""
    register_datasets()
    cfg = load_config(config_file, opts)
    overrides = ["DATASETS.FPN_EXT.DATA", ""] if own_keys(cfg, "DATASETS").get("DATA") else []
    for key in ("TRAIN", "TEST"):
        known = tuple(name for name in cfg.DATASETS[key] if name in DatasetCatalog)
        overrides += [f"DATASETS.{key}", str(known)]
    return overrides


class TakesPictures:
    """How a picture, and boxes on it, become what a detector takes, as in Detectron2's evaluation.

    Attributes:
        aug: resizes a picture by ``INPUT.MIN_SIZE_TEST`` and ``MAX_SIZE_TEST``.
    """

    aug: T.ResizeShortestEdge

    def check_size(self, image: np.ndarray, name: str | os.PathLike[str] = "the picture") -> None:
        """Raise unless a picture has pixels, as it is and resized.

        Args:
            image: (H, W, C).
            name: for the message.

        Raises:
            ValueError: it is empty, or so long and thin that its shorter side is rounded to 0.
        """
        height, width = image.shape[:2]
        if 0 in image.shape:
            raise ValueError(f"{name} is empty: {width} x {height} px")
        resize = self.aug.get_transform(image)
        resized = getattr(resize, "new_w", width), getattr(resize, "new_h", height)
        if 0 in resized:
            raise ValueError(
                f"{name}, {width} x {height} px, would be resized to {resized[0]} x {resized[1]} "
                f"px by INPUT.MIN_SIZE_TEST {self.aug.short_edge_length[0]} and "
                f"MAX_SIZE_TEST {self.aug.max_size}: cut it into parts"
            )

    def network_input(self, image: np.ndarray) -> dict[str, Any]:
        """A picture as Detectron2's models take it: resized, (C, H', W') float32, on CPU.

        Args:
            image: (H, W, C) in the channels of ``INPUT.FORMAT``.
        """
        height, width = image.shape[:2]
        resized = self.aug.get_transform(image).apply_image(image)
        pixels = torch.as_tensor(resized.astype("float32").transpose(2, 0, 1))
        return {"image": pixels, "height": height, "width": width}

    def with_proposals(self, entry: dict[str, Any], boxes: np.ndarray) -> dict[str, Any]:
        """An input of :meth:`network_input` with boxes in Detectron2's form, and on its scale.

        Args:
            entry: the input.
            boxes: (R, 4), XYXY in pixels of the picture. Clipped to it, as in Detectron2.
        """
        height, width = entry["image"].shape[-2:]
        scale = np.array([width / entry["width"], height / entry["height"]] * 2)
        proposals = Instances((height, width))
        proposals.proposal_boxes = Boxes(torch.as_tensor(boxes * scale, dtype=torch.float32))
        proposals.proposal_boxes.clip((height, width))
        proposals.objectness_logits = torch.zeros(len(boxes))
        return {**entry, "proposals": proposals}


class Predictor(TakesPictures):
    """A trained model on one picture after the other, resized as in Detectron2's evaluation.

    Args:
        cfg: of :func:`load_inference_config`.

    Attributes:
        model: on its device, in eval mode.
        classes (dict): COCO category id of each class, in the order of their numbers, and its name.
        trained_on (TrainedOn or None): what the checkpoint says of itself.
        weights (str): the checkpoint, and how far its training was.
        pixel_format (str): ``INPUT.FORMAT``.
        aug: resizes a picture by ``INPUT.MIN_SIZE_TEST`` and ``MAX_SIZE_TEST``.

    Raises:
        ValueError: the checkpoint does not fill the model, or its classes are not those of
            ``DATASETS.TEST``.
    """

    def __init__(self, cfg: CfgNode):
        self.pixel_format = cfg.INPUT.FORMAT
        self.value_range = value_range(cfg)
        of_checkpoint = cfg.clone()
        of_checkpoint.defrost()
        # They may be those of BOTTOM_UP_WEIGHTS, a file that need not be here.
        of_checkpoint.MODEL.FPN_EXT.KEEP_PIXELS = True
        with level_table_in_errors(cfg):
            self.model = build_model(of_checkpoint).eval()
        checkpoint = CompleteCheckpointer(self.model).load(cfg.MODEL.WEIGHTS)
        self.weights = described(cfg.MODEL.WEIGHTS, checkpoint)
        self.trained_on = trained_on_of(checkpoint)
        self.classes = class_names(cfg, self.trained_on, num_classes(self.model))
        shortest = cfg.INPUT.MIN_SIZE_TEST
        self.aug = T.ResizeShortestEdge([shortest, shortest], cfg.INPUT.MAX_SIZE_TEST)
        for difference in other_than_trained(
            cfg, self.trained_on or TrainedOn(), cfg.MODEL.WEIGHTS
        ):
            print(f"warning: {difference}")

    def read(self, file: Any, page: int | None = None) -> np.ndarray:
        """A picture as the model takes it (:func:`fpn_ext.data.reading.read_picture`).

        Raises:
            ValueError: :meth:`check_size`'s; and what reading raises.
        """
        image = read_picture(file, self.pixel_format, self.value_range, page)
        self.check_size(image, file)
        return image

    @torch.no_grad()
    def __call__(self, image: np.ndarray) -> dict[str, Any]:
        """What the model gives for one picture, in pixels of ``image``.

        Args:
            image: (H, W, C) in the channels of ``INPUT.FORMAT``.
        """
        return self.model([self.network_input(image)])[0]


def build_predictor(cfg: CfgNode) -> Predictor:
    """A :class:`Predictor`; prints which checkpoint it has, and how far its training was."""
    predictor = Predictor(cfg)
    print(f"weights: {predictor.weights}")
    return predictor


def num_classes(model: Any) -> int | None:
    """How many classes a detector tells apart; None for one that does not say.

    Detectron2's ROI heads and one-stage detectors have it as an attribute.
    """
    count = getattr(getattr(model, "roi_heads", model), "num_classes", None)
    return count if isinstance(count, int) else None


def detections_of(output: dict[str, Any]) -> Instances:
    """The detections in a model's output for one image, on CPU; an RPN's proposals count as such.

    A proposal's class is 0 and its score the sigmoid of its objectness.
    """
    if "instances" in output:
        return output["instances"].to("cpu")
    proposals = output["proposals"].to("cpu")
    detections = Instances(proposals.image_size)
    detections.pred_boxes = proposals.proposal_boxes
    detections.scores = proposals.objectness_logits.sigmoid()
    detections.pred_classes = torch.zeros(len(proposals), dtype=torch.int64)
    if proposals.has("proposal_level"):
        detections.proposal_level = proposals.proposal_level
    return detections
