"""The sides of whole_model.py: one Faster R-CNN with the same weights, built in each way."""

import contextlib
import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fpn_ext
import torch
from calibrated import picture, to_torchvision
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from fpn_ext.speed.folded_norms import fold_frozen_norms
from fpn_ext.speed.winograd_training import train_with_winograd
from torch import nn
from torchvision.models.detection import fasterrcnn_resnet50_fpn

CONFIGS = Path(__file__).parents[1] / "configs" / "detectron2"


class LeftOut(Exception):
    """A side that cannot be had here, and why."""


@dataclass
class Side:
    """``name`` is the library or variant and, after a comma, what is special about it."""

    name: str
    model: nn.Module
    device: str

    @property
    def is_torchvision(self) -> bool:
        return self.name.startswith("torchvision")

    @contextlib.contextmanager
    def inference(self) -> Iterator[None]:
        with torch.inference_mode():
            if self.name.endswith("autocast"):
                with torch.autocast(torch.device(self.device).type, torch.bfloat16):
                    yield
            else:
                yield

    def infer(self, inputs: list[dict]) -> list:
        with self.inference():
            return self.model(self.pictures(inputs) if self.is_torchvision else inputs)

    def pictures(self, inputs: list[dict]) -> list[torch.Tensor]:
        return [x["image"].to(self.device) for x in inputs]


def names_of_sides(dtypes: Sequence[str], device: str) -> list[str]:
    """Detectron2 in float32 is always there: the others are compared with it."""
    names = ["Detectron2"]
    if "float32" in dtypes:
        names += ["this project", "optimised", "torchvision"]
    if "bfloat16" in dtypes:
        names += ["optimised, bfloat16"]
        if device.startswith("cuda"):
            names += ["Detectron2, autocast", "torchvision, autocast"]
    return names


def config(file: str, device: str, opts: Sequence[str]) -> CfgNode:
    # The stride in the 3x3 convolution, as torchvision has it.
    opts = ["MODEL.RESNETS.STRIDE_IN_1X1", "False", "MODEL.DEVICE", device, *opts]
    return fpn_ext.load_config(str(CONFIGS / file), opts)


def builtin_config(device: str, opts: Sequence[str]) -> CfgNode:
    return config("faster_rcnn_R_50_FPN_1x_builtin.yaml", device, opts)


def build_side(name: str, weights: dict, device: str, opts: Sequence[str]) -> Side:
    """The side of that name, in evaluation mode.

    Raises:
        LeftOut: what it needs is not there.
    """
    variant, _, special = name.partition(", ")
    cfg = builtin_config(device, opts)
    if variant != "Detectron2":
        own = config("faster_rcnn_R_50_FPN_1x.yaml", device, opts)
    if variant == "torchvision":
        model = _torchvision(cfg, weights).to(device)
    elif variant == "Detectron2":
        model = _loaded(cfg, weights)
    elif variant == "optimised":
        if not hasattr(fpn_ext, "optimize_for_inference"):
            raise LeftOut("this version of the project has no optimize_for_inference")
        dtype = torch.bfloat16 if special == "bfloat16" else torch.float32
        model = fpn_ext.optimize_for_inference(_loaded(own, weights), dtype=dtype)
    else:
        switches = special.upper().split(", ") if special else []
        for key in switches:
            if key not in own.MODEL.FPN_EXT:
                raise LeftOut(f"this version of the project has no MODEL.FPN_EXT.{key}")
            own.MODEL.FPN_EXT[key] = True
        model = _loaded(own, weights)
        if "FOLD_NORMS" in switches:
            fold_frozen_norms(model)
        if "WINOGRAD" in switches:
            train_with_winograd(model)
    gc.collect()
    return Side(name, model, device)


def build_sides(
    names: Sequence[str], weights: dict, device: str, opts: Sequence[str], left_out: dict[str, str]
) -> dict[str, Side]:
    """Those that can be had; the others go to ``left_out``, with the reason."""
    sides = {}
    for name in names:
        try:
            sides[name] = build_side(name, weights, device, opts)
        except LeftOut as reason:
            left_out[name] = str(reason)
            print(f"left out: {name}: {reason}", flush=True)
    return sides


def _loaded(cfg: CfgNode, weights: dict) -> nn.Module:
    model = build_model(cfg).eval()
    model.load_state_dict(weights)
    return model


def _torchvision(cfg: CfgNode, weights: dict) -> nn.Module:
    num_classes = cfg.MODEL.ROI_HEADS.NUM_CLASSES
    model = fasterrcnn_resnet50_fpn(
        weights=None,
        weights_backbone=None,
        num_classes=num_classes + 1,
        image_mean=cfg.MODEL.PIXEL_MEAN,
        image_std=cfg.MODEL.PIXEL_STD,
    ).eval()
    try:
        model.load_state_dict(to_torchvision(weights, num_classes))
    except (RuntimeError, ValueError):
        raise LeftOut("the overrides make another network than its ResNet-50 FPN") from None
    model.transform.resize = lambda image, target: (image, target)  # as large as the others' input
    return model


def inputs_of(batch: int, size: tuple[int, int], seed: int = 0) -> list[dict]:
    height, width = size
    return [
        {"image": picture(height, width, seed + i), "height": height, "width": width}
        for i in range(batch)
    ]


def detections(output: Any) -> dict[str, torch.Tensor]:
    """Boxes, scores and classes of one image, from either library."""
    if "instances" in output:
        found = output["instances"]
        parts = found.pred_boxes.tensor, found.scores, found.pred_classes
    else:
        parts = output["boxes"], output["scores"], output["labels"] - 1
    boxes, scores, classes = (part.cpu() for part in parts)
    return {"boxes": boxes.float(), "scores": scores.float(), "classes": classes}


def found_again(outputs: list, reference: list) -> dict[str, float]:
    """How many of the reference's detections have one of the same class within a pixel."""
    same = count = 0
    score_difference = 0.0
    for own, other in zip(map(detections, outputs), map(detections, reference), strict=True):
        count += len(other["scores"])
        if len(own["scores"]) == 0 or len(other["scores"]) == 0:
            continue
        distance = (other["boxes"][:, None] - own["boxes"]).abs().amax(dim=2)
        distance[other["classes"][:, None] != own["classes"]] = torch.inf
        nearest, row = distance.min(dim=1)
        near = nearest < 1
        same += int(near.sum())
        difference = (other["scores"] - own["scores"][row]).abs()[near]
        score_difference = max([score_difference, *difference.tolist()])
    return {"detections": count, "found_again": same, "score_difference": score_difference}
