"""A trained model in PyTorch, for :class:`fpn_ext.Detector`: batches, proposals, features."""

from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Instances
from torch import nn

from ..speed.optimize import model_for_inference
from .predictor import Predictor, detections_of


class BoxFeatures(NamedTuple):
    """Features of R boxes of one picture, on CPU.

    Attributes:
        pooled: (R, C, h, w) float32, what the box head is given: RoIAlign of the pyramid.
        vectors: (R, D) float32, what the box head makes of it.
        levels: (R,) int64, the level k that each was pooled from; None if the pooler does not
            choose one.
    """

    pooled: torch.Tensor
    vectors: torch.Tensor
    levels: torch.Tensor | None


class EagerModel(Predictor):
    """A :class:`Predictor` of batches, optimised as ``MODEL.FPN_EXT.INFERENCE_DTYPE`` says.

    Args:
        cfg: of :func:`fpn_ext.inference.predictor.inference_config`.
    """

    def __init__(self, cfg: CfgNode):
        super().__init__(cfg)
        self.model = model_for_inference(cfg, self.model)
        self.needs_proposals = bool(cfg.MODEL.LOAD_PROPOSALS)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def refuses_boxes(self) -> str:
        """Why it takes no boxes of the user's, as an RPN alone or RetinaNet; "" if it does."""
        heads = getattr(self.model, "roi_heads", None)
        if isinstance(self.model, GeneralizedRCNN) and hasattr(heads, "box_pooler"):
            return ""
        return (
            "this model has no heads on boxes to give boxes to (MODEL.META_ARCHITECTURE "
            "GeneralizedRCNN has)"
        )

    def check_has_features(self) -> None:
        """Raise TypeError unless there is one box head, whose features are meant."""
        heads = getattr(self.model, "roi_heads", None)
        if isinstance(getattr(heads, "box_head", None), nn.ModuleList):
            raise TypeError(
                f"features are what one box head makes of a box, and {type(heads).__name__} "
                "(MODEL.ROI_HEADS.NAME) have several"
            )

    @property
    def keypoint_names(self) -> list[str]:
        return self.trained_on.keypoint_names if self.trained_on else []

    @torch.no_grad()
    def infer(self, inputs: list[dict[str, Any]]) -> list[Instances]:
        """The detections on each picture of a batch, in pixels of the pictures, on CPU.

        Args:
            inputs: of :meth:`network_input`, all of one size; all with proposals, or none.
        """
        if "proposals" in inputs[0]:
            return [found.to("cpu") for found in self._of_proposals(inputs)]
        return [detections_of(output) for output in self.model(inputs)]

    def _of_proposals(self, inputs: list[dict[str, Any]]) -> list[Instances]:
        """As Detectron2's GeneralizedRCNN.inference, with or without an RPN of its own."""
        model: Any = self.model
        images = model.preprocess_image(inputs)
        features = model.backbone(images.tensor)
        proposals = [entry["proposals"].to(self.device) for entry in inputs]
        found, _ = model.roi_heads(images, features, proposals, None)
        return [
            detector_postprocess(detections, entry["height"], entry["width"])
            for detections, entry in zip(found, inputs, strict=True)
        ]

    @torch.no_grad()
    def features(self, entry: dict[str, Any]) -> BoxFeatures:
        """What the box head is given for the proposals of an input, and what it makes of it."""
        model: Any = self.model
        images = model.preprocess_image([entry])
        maps = model.backbone(images.tensor)
        heads = model.roi_heads
        boxes = entry["proposals"].proposal_boxes.to(self.device)
        pooled = heads.box_pooler([maps[name] for name in heads.box_in_features], [boxes])
        vectors = heads.box_head(pooled)
        assign = getattr(heads.box_pooler, "assign", None)
        return BoxFeatures(
            pooled.float().cpu().contiguous(),
            vectors.float().cpu().flatten(1),
            assign(boxes.tensor).cpu() if assign else None,
        )
