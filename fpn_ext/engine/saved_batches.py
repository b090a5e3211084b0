"""Save the batch that broke a training, and load it without executing code."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints, PolygonMasks

from ..files.atomic import replacing
from ..files.weight_files import read_torch
from ..reporting.json_files import write_json

Batch = list[dict[str, Any]]
# Types allowed in Instances, each rebuilt from the given attribute.
FIELD_TYPES: dict[str, tuple[type, str]] = {
    "Boxes": (Boxes, "tensor"),
    "BitMasks": (BitMasks, "tensor"),
    "Keypoints": (Keypoints, "tensor"),
    "PolygonMasks": (PolygonMasks, "polygons"),
}


def save(
    folder: Path, batch: Batch, weights: Mapping[str, torch.Tensor], report: Mapping[str, Any]
) -> None:
    """Write ``batch.pth`` and ``model.pth``, tensors and plain values only, and the report."""
    write_json(folder / "report.json", report)
    with replacing(folder / "batch.pth") as stream:
        torch.save([_plain(record) for record in batch], stream)
    with replacing(folder / "model.pth") as stream:
        torch.save({"model": dict(weights)}, stream)


def load_batch(file: str | Path) -> Batch:
    """A saved batch, ready for ``model(batch)``. Executes no code from the file.

    Raises:
        ValueError: it is damaged, or requests code.
    """
    return [_restored(record) for record in read_torch(os.fspath(file))]


def _plain(value: Any) -> Any:
    """A batch's values in types accepted by ``torch.load(..., weights_only=True)``."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_plain(item) for item in value]
    if isinstance(value, Instances):
        fields = {name: _plain(item) for name, item in value.get_fields().items()}
        return {"type": "Instances", "size": list(value.image_size), "fields": fields}
    for name, (kind, attribute) in FIELD_TYPES.items():
        if type(value) is kind:
            return {"type": name, "value": _plain(getattr(value, attribute))}
    if hasattr(value, "__array__"):  # NumPy's arrays and scalars
        return torch.as_tensor(value)
    return repr(value)


def _restored(value: Any) -> Any:
    if isinstance(value, list):
        return [_restored(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.get("type") == "Instances":
        fields = {name: _restored(item) for name, item in value["fields"].items()}
        return Instances(tuple(value["size"]), **fields)
    if value.get("type") in FIELD_TYPES:
        return FIELD_TYPES[value["type"]][0](_restored(value["value"]))
    return {key: _restored(item) for key, item in value.items()}
