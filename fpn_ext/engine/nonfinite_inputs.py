"""Faults of a batch and of the weights, before any computation."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from .saved_batches import Batch

EXPLODED_WEIGHT = 1e3  # no trained detector has weights this large


def batch_faults(batch: Batch) -> Iterable[str]:
    """Faults in the pixels and ground truth of a batch, per image."""
    for i, record in enumerate(batch):
        name = image_name(record, i)
        image = record["image"]
        if not image.float().isfinite().all():
            yield f"{name}: a pixel is NaN or infinite; look at the file and at your augmentations"
        instances = record.get("instances")
        if instances is None or not instances.has("gt_boxes") or not len(instances):
            continue
        boxes = instances.gt_boxes.tensor
        x0, y0, x1, y1 = boxes[:, :4].unbind(dim=1)
        height, width = image.shape[-2:]
        inverted = "a side is 0 or negative: no area, or written as (x, y, width, height)"
        for fault, bad in (
            ("NaN or infinite", ~boxes.isfinite().all(dim=1)),
            (inverted, (x1 <= x0) | (y1 <= y0)),
            ("it reaches beyond the image", (x1 > width + 1) | (y1 > height + 1)),
        ):
            for number in bad.nonzero().flatten().tolist()[:1]:
                values = ", ".join(f"{value:.6g}" for value in boxes[number].tolist())
                more = f" (and {int(bad.sum()) - 1} more)" if bad.sum() > 1 else ""
                yield (f"{name}: box {number}{more} is [{values}], {fault}; run fpn-ext data")


def weight_faults(model: nn.Module) -> Iterable[str]:
    """Faults of the weights; not of BatchNorm's running statistics, corrupted by the batch."""
    floating = [(name, p.detach()) for name, p in model.named_parameters() if p.numel()]
    bad = [name for name, tensor in floating if not tensor.isfinite().all()]
    if bad:
        yield (
            f"{len(bad)} weights hold NaN or infinity before the batch, the first is {bad[0]}: "
            "start again from an earlier checkpoint"
        )
        return
    largest, name = max(((float(t.abs().max()), name) for name, t in floating), default=(0.0, ""))
    if largest > EXPLODED_WEIGHT:
        yield (
            f"the weights have exploded: {name} holds {largest:.3g}; start again, with a lower "
            "SOLVER.BASE_LR or with SOLVER.CLIP_GRADIENTS.ENABLED True"
        )


def image_name(record: Mapping[str, Any], number: int) -> str:
    return str(record.get("file_name", f"image {number} of the batch"))
