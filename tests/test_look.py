"""Drawings of a model's internals, for a tiny one with random weights."""

import numpy as np
import pytest
import tiny
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, ImageList, Instances, pairwise_iou
from fpn_ext.__main__ import main
from fpn_ext.inspection.best_anchors import AnchorLevel
from fpn_ext.inspection.look import (
    Inside,
    draw_best_anchors,
    draw_cell_anchors,
    draw_feature_maps,
    draw_proposals,
    proposals_by_level,
)
from fpn_ext.reporting.drawing import LEVEL_COLORS
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Command line of a tiny model; its images are 128 x 128 and made 64 x 64 for it."""
    root = tmp_path_factory.mktemp("look")
    tiny.register(root / "data")
    words = [
        *("DATASETS.TEST", f"('{tiny.DATASET}',)"),
        *("INPUT.MIN_SIZE_TEST", "64"),
        *("MODEL.WEIGHTS", str(root / "model.pth")),
    ]
    cfg = tiny.config(root, *words)
    torch.manual_seed(0)
    torch.save({"model": build_model(cfg).state_dict()}, root / "model.pth")
    return ["--config-file", tiny.FILE, *tiny.options(root, *words)]


def look(options, *words):
    return main(["look", *options[:2], *map(str, words), *options[2:]])


@pytest.mark.parametrize("name", ["PyramidRPN", "RPN"])
def test_the_proposals_of_the_levels_are_those_of_the_rpn(options, name):
    cfg = tiny.config("unused", *options[-6:], "MODEL.PROPOSAL_GENERATOR.NAME", name)
    cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 60
    model = build_model(cfg).eval()
    images = ImageList.from_tensors([torch.zeros(3, 60, 64)], model.backbone.size_divisibility)
    features = model.backbone(torch.randn(1, 3, 64, 64))
    rpn = model.proposal_generator
    with torch.no_grad():
        (every,), _ = rpn(images, features, None)
    by_level = proposals_by_level(rpn, images, features)
    boxes = torch.cat([found.proposal_boxes.tensor for found in by_level])
    scores = torch.cat([found.objectness_logits for found in by_level])
    order = scores.argsort(descending=True)
    assert len(every) == 60 and torch.equal(boxes[order], every.proposal_boxes.tensor)
    assert torch.equal(scores[order], every.objectness_logits)
    # The head is fresh: boxes hardly differ from the anchors of their level.
    assert sum(len(found) > 0 for found in by_level) >= 2
    maps = [features[name] for name in rpn.in_features]
    for found, anchors in zip(by_level, rpn.anchor_generator(maps), strict=True):
        clipped = anchors.clone()
        clipped.clip((60, 64))
        overlaps = pairwise_iou(found.proposal_boxes, clipped)
        assert (overlaps.max(dim=1).values > 0.8).all()


def proposal(box, score):
    found = Instances((32, 64))
    found.proposal_boxes = Boxes(torch.tensor([box]))
    found.objectness_logits = torch.tensor([score])
    return found


def by_hand():
    """An image of 64 x 32 in black; two levels of strides 16 and 32, anchors 16 and 64 px."""
    levels = [
        AnchorLevel(f"p{k}", stride, 0.0, np.array([[-s / 2, -s / 2, s / 2, s / 2]]))
        for k, stride, s in ((4, 16, 16), (5, 32, 64))
    ]
    coarse = torch.tensor([[[0.0, -4.0]], [[0.0, 0.0]]])  # 2 channels, 1 x 2 cells
    return Inside(
        image=np.zeros((32, 64, 3), dtype=np.uint8),
        names=["p4", "p5"],
        maps=[torch.zeros(2, 2, 4), coarse],
        proposals=[proposal([0, 0, 8, 20.5], -1.0), proposal([0, 0, 8, 30], 1.0)],
        levels=levels,
    )


def colors(picture, box):
    return {tuple(pixel) for pixel in np.asarray(picture.crop(box)).reshape(-1, 3).tolist()}


def test_best_anchors_by_hand():
    """The box is the anchor at (16, 16) of P4; all is drawn ten times as large."""
    picture = draw_best_anchors(by_hand(), np.array([[8.0, 8, 24, 24]]), -1)
    assert picture.size == (640, 320 + 56)
    line = colors(picture, (80, 150, 240, 151))  # across the box, beside the label
    assert line == {(255, 255, 255), LEVEL_COLORS[4], (0, 0, 0)}
    assert colors(picture, (0, 0, 640, 320)).isdisjoint({LEVEL_COLORS[5]})


def test_cell_anchors_by_hand():
    """P5's anchor of 64 px at (32, 0), of equally near ones, reaches 32 px beyond the top."""
    picture = draw_cell_anchors(by_hand())
    assert picture.size == (640, 640 + 56)
    found = colors(picture, (0, 0, 640, 640))
    assert {LEVEL_COLORS[4], LEVEL_COLORS[5], (255, 255, 255), (0, 0, 0)} <= found
    assert colors(picture, (10, 10, 300, 300)) == {(255, 255, 255)}  # above the image, in P5's


def test_proposals_by_hand():
    """One of each level; P5's has the higher score, and covers P4's in part."""
    picture = draw_proposals(by_hand(), most=1)
    assert colors(picture, (0, 0, 640, 320)) == {(0, 0, 0), LEVEL_COLORS[5]}
    picture = draw_proposals(by_hand(), most=50)
    assert colors(picture, (0, 0, 640, 320)) == {(0, 0, 0), LEVEL_COLORS[4], LEVEL_COLORS[5]}
    assert colors(picture, (0, 200, 100, 202)) == {(0, 0, 0), LEVEL_COLORS[5]}


def test_feature_maps_by_hand():
    """P5's two cells are 32 px each, 120 in the drawing: the darkest and the brightest colour."""
    picture = draw_feature_maps(by_hand())
    assert picture.size == (3 * (240 + 6) + 6, 120 + 28 + 6)
    x, y = 2 * (240 + 6) + 6, 28
    dark, bright = (68, 1, 84), (253, 231, 36)
    assert colors(picture, (x, y, x + 120, y + 120)) == {dark}
    assert colors(picture, (x + 120, y, x + 240, y + 120)) == {bright}
    assert colors(picture, (6, y, 6 + 240, y + 120)) == {(0, 0, 0)}  # the image itself


def test_the_command_draws_and_logs(options, tmp_path):
    assert look(options, "--num-images", 2, "--output", tmp_path, "--tensorboard") == 0
    tags = ("best_anchors", "cell_anchors", "feature_maps", "proposals")
    names = [f"000001_{tag}.png" for tag in tags] + [f"000006_{tag}.png" for tag in tags]
    assert sorted(f.name for f in tmp_path.glob("*.png")) == names
    for tag in ("best_anchors", "proposals"):
        with Image.open(tmp_path / f"000001_{tag}.png") as picture:
            assert picture.size == (640, 640 + 56)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    found = events.Tags()["images"]
    assert sorted(found) == sorted(f"{tag}/{name}" for tag in tags for name in ("000001", "000006"))
    logged = events.Images("proposals/000001")[0]
    assert (logged.width, logged.height) == (640, 696)


def test_pictures_of_the_users_own(options, tmp_path):
    """No ground truth, so no best anchors; the same name twice; wide, and not square cells."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (90, 50), "white").save(tmp_path / folder / "photo.png")
    inputs = [tmp_path / "a", tmp_path / "b" / "photo.png"]
    assert look(options, "--input", *inputs, "--output", tmp_path / "out") == 0
    drawn = sorted(f.name for f in (tmp_path / "out").iterdir())
    assert drawn == [
        f"{name}_{tag}.png"
        for name in ("photo_2", "photo")
        for tag in ("cell_anchors", "feature_maps", "proposals")
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--dataset", "tiny_trian"], "'tiny_trian' is not a registered dataset"),
        (["--image-id", "7000"], "--image-id: tiny_train has no image '7000'"),
        (["--input", "nowhere.jpg"], "--input nowhere.jpg: no such file or folder"),
        (["--proposals", "0"], "must be at least 1"),
    ],
)
def test_mistakes_end_in_a_message(options, tmp_path, capsys, words, said):
    assert look(options, *words, "--output", tmp_path) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
