"""Registered datasets of noise images, for tests."""

import contextlib

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from PIL import Image


def box(x0, y0, x1, y1, **more):
    return {
        "bbox": [x0, y0, x1, y1], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0, **more
    }  # fmt: skip


@contextlib.contextmanager
def registered(name, folder, images):
    """``images``: {image id: ((width, height), annotations)}; gives the records."""
    rng = np.random.default_rng(0)
    records = []
    folder.mkdir(parents=True, exist_ok=True)
    for image_id, ((width, height), annotations) in images.items():
        file = folder / f"{image_id}.png"
        pixels = rng.integers(0, 256, size=(height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file)
        records.append({
            "file_name": str(file), "image_id": image_id, "width": width, "height": height,
            "annotations": annotations,
        })  # fmt: skip
    DatasetCatalog.register(name, lambda: [dict(record) for record in records])
    MetadataCatalog.get(name).thing_classes = ["thing"]
    try:
        yield records
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
