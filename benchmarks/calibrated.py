"""Faster R-CNN with random weights that behave like trained ones, the same for every side.

Nothing can be downloaded where the benchmarks run, and an untrained model has nothing to do: all
its proposals lie on one level and no score passes the threshold. So random weights are calibrated
on one image: statistics of the batch norms; the gain of each pyramid level, so that the proposals
spread over the levels as a trained model's do; the gain of the classifier, so that a realistic
number of scores passes. No figure depends on more than that.
"""

import copy

import numpy as np
import torch
from fpn_ext import assign_levels  # before detectron2, where that is not compiled
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from PIL import Image
from torch import nn

# Where a trained R-50-FPN's 1000 proposals at 800x1333 are pooled from, and the maps whose anchors
# have those sizes.
SHARE_OF_PROPOSALS = {2: 0.450, 3: 0.357, 4: 0.160, 5: 0.033}
PROPOSED_BY = {2: ("p2", "p3"), 3: ("p4",), 4: ("p5",)}
SCORES_OVER_THRESHOLD = 400  # (box, class) pairs in an image with score over 0.05


def picture(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """(3, H, W) float32 in 0..255: random patches at five scales, edges and all."""
    generator = np.random.default_rng(seed)
    image = np.zeros((height, width, 3), np.float32)
    for side in (4, 16, 64, 128, 256):
        grid = generator.uniform(0, 255, (-(-height // side), -(-width // side), 3))
        layer = Image.fromarray(grid.astype(np.uint8)).resize((width, height), Image.NEAREST)
        image += np.asarray(layer, np.float32) / 5
    return torch.from_numpy(image).permute(2, 0, 1).contiguous()


def calibrated_weights(cfg: CfgNode, size: tuple[int, int], seed: int = 0) -> dict:
    """State dict of Detectron2's own Faster R-CNN with FPN of ``cfg``, calibrated at ``size``."""
    torch.manual_seed(seed)
    normed = cfg.clone()
    normed.MODEL.RESNETS.NORM = "BN"
    model = build_model(normed)
    inputs = [{"image": picture(*size, seed=seed), "height": size[0], "width": size[1]}]
    with torch.no_grad():
        images = model.preprocess_image(inputs)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0  # the statistics of this image
        model.backbone.train()
        model.backbone(images.tensor)
        model.eval()
        _spread_proposals(model, images)
        _spread_scores(model, images)
    return {k: v for k, v in model.state_dict().items() if "num_batches_tracked" not in k}


def _spread_proposals(model: nn.Module, images: object) -> None:
    head, pyramid = model.proposal_generator.rpn_head, model.backbone
    head.objectness_logits.weight.mul_(100)
    head.anchor_deltas.weight.mul_(5)
    features = pyramid(images.tensor)
    gain = {name: 1 / f.std().item() for name, f in features.items() if name != "p6"}
    start = dict(gain)
    for _ in range(20):
        # P6 is P5, subsampled: one gain for both.
        scaled = {name: f * gain.get(name, gain["p5"]) for name, f in features.items()}
        proposals, _ = model.proposal_generator(images, scaled)
        level = assign_levels(proposals[0].proposal_boxes.tensor, 2, 5)
        share = {k: (level == k).float().mean().item() for k in SHARE_OF_PROPOSALS}
        for k in PROPOSED_BY:
            factor = ((SHARE_OF_PROPOSALS[k] + 0.01) / (share[k] + 0.01)) ** 0.25
            for name in PROPOSED_BY[k]:
                # Within bounds: on small images, no gain makes proposals of the largest sizes.
                gain[name] = min(max(gain[name] * factor, 0.1 * start[name]), 10 * start[name])
    for name, factor in gain.items():
        output = getattr(pyramid, f"fpn_output{name[1:]}")
        output.weight.mul_(factor)
        output.bias.mul_(factor)


def _spread_scores(model: nn.Module, images: object) -> None:
    features = model.backbone(images.tensor)
    proposals, _ = model.proposal_generator(images, features)
    heads = model.roi_heads
    maps = [features[f] for f in heads.box_in_features]
    pooled = heads.box_pooler(maps, [p.proposal_boxes for p in proposals])
    hidden = heads.box_head(pooled)
    classifier = heads.box_predictor.cls_score
    low, high = 0.0, 1e4
    original = copy.deepcopy(classifier.weight)
    for _ in range(30):
        middle = (low + high) / 2
        scores = torch.softmax(hidden @ original.T * middle, dim=1)[:, :-1]
        low, high = (
            (middle, high) if (scores > 0.05).sum() < SCORES_OVER_THRESHOLD else (low, middle)
        )
    classifier.weight.copy_(original * high)
    heads.box_predictor.bbox_pred.weight.mul_(20)


def to_torchvision(state: dict, num_classes: int) -> dict:
    """The same weights under the names of torchvision's fasterrcnn_resnet50_fpn."""
    renamed = {}
    for name, value in state.items():
        new = _torchvision_name(name)
        if new is None:
            continue
        if "cls_score" in new:  # background comes first there
            value = torch.cat([value[-1:], value[:-1]])
        if "bbox_pred" in new and "box_predictor" in new:
            value = torch.cat([torch.zeros_like(value[:4]), value])
        renamed[new] = value
    return renamed


def _torchvision_name(name: str) -> str | None:
    part, *rest = name.split(".")
    if part in ("pixel_mean", "pixel_std"):
        return None
    if name.startswith("backbone.bottom_up."):
        stage, *rest = name.removeprefix("backbone.bottom_up.").split(".")
        if stage == "stem":
            return "backbone.body." + ".".join(rest).replace("conv1.norm", "bn1")
        block, convolution, *leaf = rest
        layer = f"backbone.body.layer{int(stage[3:]) - 1}.{block}."
        normed = leaf[0] == "norm"
        if convolution == "shortcut":
            return layer + "downsample." + (f"1.{leaf[1]}" if normed else f"0.{leaf[0]}")
        number = convolution[-1]
        return layer + (f"bn{number}.{leaf[1]}" if normed else f"conv{number}.{leaf[0]}")
    if name.startswith("backbone.fpn_"):
        kind, leaf = name.removeprefix("backbone.fpn_").split(".")
        blocks = "inner_blocks" if kind.startswith("lateral") else "layer_blocks"
        return f"backbone.fpn.{blocks}.{int(kind[-1]) - 2}.0.{leaf}"
    return (
        name.replace("proposal_generator.rpn_head.conv.", "rpn.head.conv.0.0.")
        .replace("proposal_generator.rpn_head.objectness_logits", "rpn.head.cls_logits")
        .replace("proposal_generator.rpn_head.anchor_deltas", "rpn.head.bbox_pred")
        .replace("roi_heads.box_head.fc1", "roi_heads.box_head.fc6")
        .replace("roi_heads.box_head.fc2", "roi_heads.box_head.fc7")
    )
