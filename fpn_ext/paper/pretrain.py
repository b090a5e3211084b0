"""Pretrained weights for the small scale: a ResNet that classifies the generated shapes.

The paper starts every row from the same ImageNet classifier, whose deep layers are semantic and
whose shallow ones, the first of them frozen, are not. Training from random weights closes that
semantic gap, and with it the effect of the ablations. This is the small scale's ImageNet: images of
one shape each, from the five object classes and the five distractors.

    fpn-ext pretrain --output output/pretrained.pth
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import build_resnet_backbone
from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock
from detectron2.utils.logger import setup_logger
from torch import nn

from ..config.load import load_config
from ..config.prepare import resolve_device
from ..data import demo_scenes
from ..data.demo_shapes import CLASS_NAMES, DISTRACTOR_NAMES
from ..files.atomic import replacing

NUM_CLASSES = len(CLASS_NAMES + DISTRACTOR_NAMES)
PICTURES = 3000
SIDE, CROP = 88, 80  # pixels
BATCH = 64
LEARNING_RATE = 2e-3


def batches(seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches of images and their classes; random crops, half of them flipped.

    Yields:
        (64, 3, 80, 80) float32 BGR in 0..255, and (64,) int64 classes.
    """
    rng = np.random.default_rng(seed)
    labels = np.arange(PICTURES) % NUM_CLASSES
    pictures = np.stack([np.asarray(demo_scenes.picture(rng, int(k), SIDE)) for k in labels])
    while True:
        chosen = rng.integers(PICTURES, size=BATCH)
        crops = []
        for picture in pictures[chosen]:
            y, x = rng.integers(SIDE - CROP + 1, size=2)
            crop = picture[y : y + CROP, x : x + CROP, ::-1]
            crops.append(crop[:, ::-1] if rng.random() < 0.5 else crop)
        pixels = torch.from_numpy(np.stack(crops).transpose(0, 3, 1, 2).astype(np.float32))
        yield pixels, torch.from_numpy(labels[chosen])


def pretrain(cfg: CfgNode, iterations: int, seed: int) -> tuple[nn.Module, float]:
    """Train the config's ResNet, with batch norm, as a classifier.

    Returns:
        The network without the classifier, and its accuracy over the last 20 batches in percent.
    """
    logger = setup_logger(name="fpn_ext", abbrev_name="fpn")
    torch.manual_seed(seed)
    cfg = cfg.clone()
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    network = build_resnet_backbone(cfg, ShapeSpec(channels=len(cfg.MODEL.PIXEL_MEAN)))
    for module in network.modules():
        # Residual blocks start as the identity: deep networks start to learn sooner.
        if isinstance(module, BasicBlock | BottleneckBlock):
            last = module.conv3 if hasattr(module, "conv3") else module.conv2
            nn.init.zeros_(last.norm.weight)
    classifier = nn.Linear(network.output_shape()["res5"].channels, NUM_CLASSES)
    model = nn.ModuleList([network, classifier]).to(cfg.MODEL.DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, iterations)
    mean = torch.tensor(cfg.MODEL.PIXEL_MEAN, device=cfg.MODEL.DEVICE).view(1, 3, 1, 1)
    std = torch.tensor(cfg.MODEL.PIXEL_STD, device=cfg.MODEL.DEVICE).view(1, 3, 1, 1)
    correct: list[float] = []
    data = batches(seed)
    for iteration in range(1, iterations + 1):
        pixels, classes = (tensor.to(cfg.MODEL.DEVICE) for tensor in next(data))
        scores = classifier(network((pixels - mean) / std)["res5"].mean(dim=(2, 3)))
        loss = F.cross_entropy(scores, classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        correct.append(100 * (scores.argmax(dim=1) == classes).float().mean().item())
        if iteration % 50 == 0:
            logger.info(f"pretraining {iteration}/{iterations}: accuracy {_last(correct):.1f} %")
    return network.eval(), _last(correct)


def _last(values: list[float], count: int = 20) -> float:
    return sum(values[-count:]) / len(values[-count:])


def write_pretrained(
    config_file: str, opts: Sequence[str], iterations: int, seed: int, file: Path
) -> float:
    """Train a config's bottom-up by :func:`pretrain`, and write it as a checkpoint.

    Returns:
        The accuracy over the last 20 batches, in percent.
    """
    cfg = load_config(config_file, opts)
    if note := resolve_device(cfg):
        print(note)
    network, accuracy = pretrain(cfg, iterations, seed)
    # A detector's names have these as suffixes: match by suffix.
    content = {"model": network.state_dict(), "matching_heuristics": True}
    with replacing(file) as stream:
        torch.save(content, stream)
    return accuracy
