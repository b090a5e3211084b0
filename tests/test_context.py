"""benchmarks/context.py: what is taken away around an object, and that it counts."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from detectron2.structures import BoxMode
from PIL import Image
from tiny import config, register

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import context

NAME = "context_of_two"


@pytest.fixture
def of_two(tmp_path):
    """Black images of 128 x 96 px, to be halved; one has a white dot, 22 px right of its box.

    For the network it is 11 px from the box. A crowd is left out.
    """
    records = []
    for number, dots in enumerate((True, False)):
        pixels = np.zeros((96, 128, 3), np.uint8)
        pixels[44:52, 70:72] = 255 if dots else 0
        file = tmp_path / f"{number}.png"
        Image.fromarray(pixels).save(file)
        box = {"bbox": [40, 44, 8, 8], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 2}
        objects = [{**box, "iscrowd": 0}, {**box, "iscrowd": 1}]
        about = {"file_name": str(file), "height": 96, "width": 128, "image_id": number}
        records.append({**about, "annotations": objects})
    DatasetCatalog.register(NAME, lambda: records)
    yield config(tmp_path / "out", "INPUT.MIN_SIZE_TEST", 48, "INPUT.MAX_SIZE_TEST", 64)
    DatasetCatalog.remove(NAME)


def test_as_much_is_left_on_every_side():
    image = torch.arange(1, 36).view(1, 5, 7)
    kept = context.only_around(image, (2.5, 2, 4, 3), 1, torch.tensor([0.0]))
    rows, columns = kept[0].nonzero().T
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (1, 3, 1, 4)
    assert kept[0, 1, 1] == image[0, 1, 1] and len(rows) == 3 * 4


def test_objects_lie_where_the_network_sees_them(of_two):
    found = list(context.objects(of_two, NAME))
    assert [image.shape for image, *_ in found] == [(3, 48, 64)] * 2
    assert [rest for _, *rest in found] == [[[20, 22, 24, 26], 2, "small"]] * 2


def test_a_share_counts_what_is_known_with_each_margin(of_two, monkeypatch):
    """The dot says what the object is."""
    monkeypatch.setattr(context, "recognised", lambda m, image, box, c: bool((image > 110).any()))
    of_two.MODEL.PIXEL_MEAN = [0.0, 0.0, 0.0]
    (row,) = context.measured(None, of_two, NAME)
    assert (row["size"], row["objects"]) == ("small", 2)
    shares = {"0": 0.0, "8": 0.0, "16": 50.0, "32": 50.0, "64": 50.0, "all": 50.0}
    assert row["recognised"] == shares
    (row,) = context.measured(None, of_two, NAME, limit=1)
    assert row["recognised"] == {margin: 2 * share for margin, share in shares.items()}


def test_an_object_is_recognised_by_the_highest_of_all_scores(tmp_path, of_two):
    register(tmp_path / "images")
    model = build_model(of_two).eval()
    predictor = model.roi_heads.box_predictor.cls_score
    torch.nn.init.zeros_(predictor.weight)
    image, box = torch.zeros(3, 48, 64, dtype=torch.uint8), [20, 22, 24, 26]
    for highest in (2, 5):  # the object's class, the background's
        with torch.no_grad():
            predictor.bias.copy_(torch.arange(6) == highest)
        assert context.recognised(model, image, box, 2) == (highest == 2)
