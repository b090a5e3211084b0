"""The stages of a Faster R-CNN, each to be called on its own, on the same inputs for all sides.

What a stage is given are the numbers that Detectron2's previous stage returned, in the dtype and
memory layout that the side's own previous stage returns; the conversion is done beforehand. Only
the pixels and the anchors are each side's own.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from detectron2.structures import Boxes, Instances
from fpn_ext.inspection.agreement import in_form_of
from sides import Side
from torch import nn
from torchvision.models.detection.rpn import concat_box_prediction_layers

STAGES = (
    "input",
    "bottom-up",
    "pyramid",
    "RPN head",
    "anchors",
    "proposals",
    "RoI pooling",
    "box head",
    "predictor",
    "final",
)
OWN = ("input", "anchors", "final")  # not replaced by the reference's


@dataclass
class Stages:
    """One call per stage, and how far what it returns is from ``reference``."""

    side: Side
    reference: dict[str, Any] | None = None
    calls: dict[str, Callable[[], Any]] = field(default_factory=dict)
    returned: dict[str, Any] = field(default_factory=dict)
    differences: dict[str, dict | None] = field(default_factory=dict)

    def add(self, name: str, call: Callable[[], Any]) -> Any:
        """What the next stage is to be given."""

        def run() -> Any:
            with self.side.inference():
                return call()

        self.calls[name] = run
        own = run()
        if self.reference is None:
            self.returned[name] = own
            return own
        if not self.side.is_torchvision and name != "input":
            self.differences[name] = difference(own, self.reference[name])
        if name in OWN:
            return own
        reference = self.reference[name]
        return reference if name == "proposals" else in_form_of(own, reference)


def stages_of(side: Side, inputs: list[dict], reference: dict[str, Any] | None) -> Stages:
    """Every stage of ``side``; ``reference`` is what Detectron2's stages returned.

    With no reference, the stages are Detectron2's, and keep what they returned.
    """
    if side.is_torchvision:
        return _torchvision_stages(side, inputs, reference)
    model = side.model
    rpn, heads = model.proposal_generator, model.roi_heads
    stages = Stages(side, reference)
    images = stages.add("input", lambda: model.preprocess_image(inputs))
    bottom_up = stages.add("bottom-up", lambda: model.backbone.bottom_up(images.tensor))

    ready = _Ready(bottom_up)

    def pyramid_alone() -> dict[str, torch.Tensor]:
        with _bottom_up_replaced(model.backbone, ready):
            return model.backbone(images.tensor)

    pyramid = stages.add("pyramid", pyramid_alone)
    assert ready.used, f"{side.name}: the backbone does not call its bottom_up"
    maps = [pyramid[f] for f in rpn.in_features]
    logits, deltas = stages.add("RPN head", lambda: rpn.rpn_head(maps))
    anchors = stages.add("anchors", lambda: rpn.anchor_generator(maps))

    def propose() -> list[Instances]:
        # As in RPN.forward.
        flat_logits = [x.permute(0, 2, 3, 1).flatten(1) for x in logits]
        flat_deltas = [
            x.view(x.shape[0], -1, 4, *x.shape[-2:]).permute(0, 3, 4, 1, 2).flatten(1, -2)
            for x in deltas
        ]
        return rpn.predict_proposals(anchors, flat_logits, flat_deltas, images.image_sizes)

    proposals = stages.add("proposals", propose)
    boxes = [p.proposal_boxes for p in proposals]
    pooled_maps = [pyramid[f] for f in heads.box_in_features]
    pooled = stages.add("RoI pooling", lambda: heads.box_pooler(pooled_maps, boxes))
    hidden = stages.add("box head", lambda: heads.box_head(pooled))
    predictions = stages.add("predictor", lambda: heads.box_predictor(hidden))
    stages.add("final", lambda: heads.box_predictor.inference(predictions, proposals)[0])
    return stages


def _torchvision_stages(side: Side, inputs: list[dict], reference: dict[str, Any]) -> Stages:
    model, pictures = side.model, side.pictures(inputs)
    rpn, heads = model.rpn, model.roi_heads
    stages = Stages(side, _as_torchvision(reference))
    images = stages.add("input", lambda: model.transform(pictures)[0])
    bottom_up = stages.add("bottom-up", lambda: model.backbone.body(images.tensors))
    pyramid = stages.add("pyramid", lambda: model.backbone.fpn(bottom_up))
    maps = list(pyramid.values())
    logits, deltas = stages.add("RPN head", lambda: rpn.head(maps))
    anchors = stages.add("anchors", lambda: rpn.anchor_generator(images, maps))

    def propose() -> tuple:
        # As in RegionProposalNetwork.forward.
        per_level = [x[0].numel() for x in logits]
        flat_logits, flat_deltas = concat_box_prediction_layers(logits, deltas)
        boxes = rpn.box_coder.decode(flat_deltas, anchors).view(len(anchors), -1, 4)
        return rpn.filter_proposals(boxes, flat_logits, images.image_sizes, per_level)

    boxes, _ = stages.add("proposals", propose)
    sizes = images.image_sizes
    pooled = stages.add("RoI pooling", lambda: heads.box_roi_pool(pyramid, boxes, sizes))
    hidden = stages.add("box head", lambda: heads.box_head(pooled))
    scores, offsets = stages.add("predictor", lambda: heads.box_predictor(hidden))
    stages.add("final", lambda: heads.postprocess_detections(scores, offsets, boxes, sizes))
    return stages


def _as_torchvision(reference: dict[str, Any]) -> dict[str, Any]:
    proposals = reference["proposals"]
    scores, deltas = reference["predictor"]
    return {
        **reference,
        # It numbers the maps that Detectron2 names.
        "bottom-up": dict(zip("0123", reference["bottom-up"].values(), strict=True)),
        "pyramid": dict(zip((*"0123", "pool"), reference["pyramid"].values(), strict=True)),
        "proposals": (
            [p.proposal_boxes.tensor for p in proposals],
            [p.objectness_logits for p in proposals],
        ),
        # Background comes first there, and has boxes.
        "predictor": (
            torch.cat([scores[:, -1:], scores[:, :-1]], dim=1),
            torch.cat([torch.zeros_like(deltas[:, :4]), deltas], dim=1),
        ),
    }


class _Ready(nn.Module):
    def __init__(self, maps: dict[str, torch.Tensor]):
        super().__init__()
        self.maps = maps
        self.used = False

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        self.used = True
        return dict(self.maps)  # a backbone may take them out, to free them


@contextlib.contextmanager
def _bottom_up_replaced(backbone: nn.Module, stub: nn.Module) -> Iterator[None]:
    original = backbone.bottom_up
    backbone.bottom_up = stub
    try:
        yield
    finally:
        backbone.bottom_up = original


def difference(own: Any, reference: Any) -> dict[str, float] | None:
    """Largest absolute difference, and the largest value; None if the shapes differ.

    For proposals and detections, which are compared in their order: of the boxes, with that of the
    scores and both counts.
    """
    if isinstance(own, Boxes):
        return difference(own.tensor, reference.tensor)
    if isinstance(own, torch.Tensor):
        if own.shape != reference.shape:
            return None
        if own.numel() == 0:
            return {"difference": 0.0, "largest": 0.0}
        distance = (own.float() - reference.float()).abs().max().item()
        return {"difference": distance, "largest": reference.abs().max().item()}
    if isinstance(own, Instances):
        return _difference_of_instances(own, reference)
    if isinstance(own, dict):
        pairs = [(own[key], reference[key]) for key in own]
    else:
        pairs = list(zip(own, reference, strict=True))
    parts = [difference(a, b) for a, b in pairs]
    if None in parts:
        return None
    summed = ("count", "count_reference")
    return {
        key: (sum if key in summed else max)(part[key] for part in parts if part)
        for key in parts[0] or {}
    }


def _difference_of_instances(own: Instances, reference: Instances) -> dict[str, float] | None:
    proposals = own.has("proposal_boxes")
    boxes, scores = (
        ("proposal_boxes", "objectness_logits") if proposals else ("pred_boxes", "scores")
    )
    common = min(len(own), len(reference))
    first, second = own[:common], reference[:common]
    of_boxes = difference(first.get(boxes), second.get(boxes))
    of_scores = difference(first.get(scores), second.get(scores))
    return {
        **of_boxes,
        "scores_difference": of_scores["difference"],
        "scores_largest": of_scores["largest"],
        "count": len(own),
        "count_reference": len(reference),
    }
