"""What a crop leaves of an object, worked out on paper."""

import numpy as np
import pytest
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from fpn_ext.data.mapper import PictureMapper, visible_share
from PIL import Image

# In a picture of 100 x 80, cropped to its left half, (0, 0) to (50, 80).
BOXES = {  # XYXY, and the share that is left
    "inside": ((10, 10, 30, 40), 1.0),
    "a quarter cut": ((20, 10, 60, 40), 0.75),
    "half cut": ((40, 10, 60, 40), 0.5),
    "a sliver": ((49, 10, 99, 40), 0.02),
    "beside": ((60, 10, 90, 40), 0.0),
    "without area": ((10, 10, 10, 40), 0.0),
}
LEFT_HALF = T.CropTransform(0, 0, 50, 80, 100, 80)


@pytest.mark.parametrize("name", BOXES)
def test_the_share_that_is_left(name):
    (x1, y1, x2, y2), share = BOXES[name]
    xyxy = {"bbox": [x1, y1, x2, y2], "bbox_mode": BoxMode.XYXY_ABS}
    xywh = {"bbox": [x1, y1, x2 - x1, y2 - y1], "bbox_mode": BoxMode.XYWH_ABS}
    larger = T.TransformList(
        [LEFT_HALF, T.ResizeTransform(80, 50, 160, 100), T.HFlipTransform(100)]
    )
    for annotation in (xyxy, xywh):
        assert visible_share(annotation, T.TransformList([LEFT_HALF]), (80, 50)) == share
        assert visible_share(annotation, larger, (160, 100)) == pytest.approx(share)


@pytest.fixture
def left_half(monkeypatch):
    class ToTheLeft(T.RandomCrop):
        def get_transform(self, image):
            return LEFT_HALF

    monkeypatch.setattr(T, "RandomCrop", ToTheLeft)


def boxes(cfg, mapper, tmp_path):
    Image.new("RGB", (100, 80)).save(tmp_path / "a.png")
    annotations = [
        {"bbox": list(box), "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
        for box, _ in BOXES.values()
    ]
    record = {"file_name": str(tmp_path / "a.png"), "height": 80, "width": 100}
    mapped = mapper(cfg, True)({**record, "annotations": annotations})
    return mapped["instances"].gt_boxes.tensor.numpy()


@pytest.mark.parametrize(("least", "number"), [(0.0, 4), (0.02, 4), (0.5, 3), (0.6, 2), (1.0, 1)])
def test_what_is_trained_on(small_cfg, left_half, tmp_path, least, number):
    small_cfg.INPUT.CROP.ENABLED = True
    small_cfg.INPUT.MIN_SIZE_TRAIN, small_cfg.INPUT.RANDOM_FLIP = (0,), "none"
    small_cfg.INPUT.FPN_EXT.CROP_LEAST_VISIBLE = least
    found = boxes(small_cfg, PictureMapper, tmp_path)
    assert len(found) == number
    detectron2s = boxes(small_cfg, DatasetMapper, tmp_path)
    assert (detectron2s[:, 2] <= 50).all()
    np.testing.assert_array_equal(found, detectron2s[:number])
