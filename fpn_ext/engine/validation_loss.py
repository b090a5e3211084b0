"""The losses of a model on validation images: ``TEST.FPN_EXT.VALIDATION_LOSS``."""

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from ..keys import declare
from ..unwrap import unwrapped

declare(
    "TEST.FPN_EXT.VALIDATION_LOSS",
    False,
    "Evaluations during training also compute the losses on DATASETS.TEST, validation_loss/...",
    "training",
)

Batches = Iterable[list[dict[str, Any]]]


def validation_loss(model: nn.Module, loaders: Iterable[Batches]) -> dict[str, float]:
    """A model's mean losses over all images, without side effects on the model or the training.

    The model computes losses as in training and everything else as in inference: the backbone and
    every batch norm and dropout are in eval mode. Sampling of anchors and proposals is the same
    each time, and per image independent of other images. The outer RNG state is unchanged.

    Args:
        model: a Detectron2 model that returns losses in training mode; may be wrapped in
            DistributedDataParallel.
        loaders: batches of one image with ground truth each; in every process its shard.

    Returns:
        ``{"loss_cls": ..., "total_loss": ...}``, the same in all processes.
    """
    model = unwrapped(model)
    device = next(model.parameters()).device
    sums: Counter[str] = Counter()
    number = 0
    with (
        torch.no_grad(),
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        EventStorage(1),  # separate storage: keep these images out of the training's metrics
        _losses_of_inference(model),
    ):
        for loader in loaders:
            for batch in loader:
                torch.manual_seed(0)
                for name, loss in model(batch).items():
                    sums[name] += loss.item()
                number += 1
    gathered = comm.all_gather((number, dict(sums)))
    total = sum(images for images, _ in gathered)
    names = sorted({name for _, losses in gathered for name in losses})
    means = {n: sum(losses.get(n, 0.0) for _, losses in gathered) / total for n in names}
    return {**means, "total_loss": sum(means.values())}


@contextlib.contextmanager
def _losses_of_inference(model: Any) -> Iterator[None]:
    """Set the modes; on exit, restore all module state except parameters.

    Not only the modes: Detectron2's RetinaNet keeps a running normalizer, the pooler a count.
    """
    before = [(module, dict(vars(module)), dict(module._buffers)) for module in model.modules()]
    model.train()
    if isinstance(getattr(model, "backbone", None), nn.Module):
        model.backbone.eval()
    for module in model.modules():
        if isinstance(module, _NormBase | _DropoutNd):
            module.eval()
    try:
        yield
    finally:
        for module, attributes, buffers in before:
            vars(module).clear()
            vars(module).update(attributes)
            module._buffers.update(buffers)
