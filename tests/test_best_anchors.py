"""The best anchor of a box: hand-computed, and against an exhaustive search."""

import fpn_ext
import numpy as np
import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_anchor_generator, build_model
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator, RotatedAnchorGenerator
from detectron2.structures import Boxes, ImageList, pairwise_iou
from fpn_ext.data.training_boxes import ResizedBoxes
from fpn_ext.inspection.best_anchors import AnchorGrid, AnchorLevel, iou, levels_of


def rows(boxes, image_size):
    boxes = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    sizes = np.tile(image_size, (len(boxes), 1))
    return ResizedBoxes(boxes, np.arange(len(boxes)), sizes, np.ones(len(boxes)))


def one_level(boundary_thresh=-1, offset=0.0):
    """Anchors of 32 px, squares, on a map of 4 x 4 cells of 16 px."""
    level = AnchorLevel("p4", 16, offset, np.array([[-16.0, -16.0, 16.0, 16.0]]))
    return AnchorGrid([level], lambda height, width: [(4, 4)], boundary_thresh)


def test_by_hand():
    boxes = rows([(0, 0, 32, 32), (4, 0, 36, 32), (16, 16, 32, 32), (0, 0, 64, 64)], (64, 64))
    found = one_level().best(boxes)
    # As it is; 4 px beside it: 28 of 36 columns; a quarter of an anchor; four times an anchor.
    assert found.iou.tolist() == pytest.approx([1.0, 28 / 36, 0.25, 0.25])
    assert one_level().anchors_of(found, boxes)[0].tolist() == [0, 0, 32, 32]


def test_by_hand_at_the_border():
    """The last centre is at 48: a box around 60 has to do with it; one around 200 has none."""
    boxes = rows([(44, 0, 76, 32), (184, 0, 216, 32)], (64, 64))
    found = one_level().best(boxes)
    anchors = one_level().anchors_of(found, boxes)
    assert anchors[0].tolist() == [32, 0, 64, 32]
    assert found.iou.tolist() == pytest.approx([20 / 44, 0])
    assert np.isnan(anchors[1]).all()


def test_by_hand_with_a_boundary():
    """At 0 px the anchor of (16, 16), from 0 to 32, is in; that of 48, up to 64 of 64, is not."""
    boxes = [(0, 0, 20, 20), (40, 40, 64, 64)]
    on_64 = rows(boxes, (64, 64))
    within = one_level(boundary_thresh=0)
    anchors = within.anchors_of(within.best(on_64), on_64)
    assert anchors.tolist() == [[0, 0, 32, 32], [16, 16, 48, 48]]
    one_more = one_level(boundary_thresh=1)
    assert one_more.anchors_of(one_more.best(on_64), on_64)[1].tolist() == [32, 32, 64, 64]
    none = within.best(rows(boxes, (30, 30)))
    assert none.iou.tolist() == [0, 0]


def random_boxes(rng, count, image_size):
    """Inside the image, across its border, outside it, larger than it, tiny."""
    height, width = image_size
    middle = rng.uniform(-0.4, 1.4, (count, 2)) * (width, height)
    half = np.exp(rng.uniform(np.log(0.5), np.log(max(image_size)), (count, 2)))
    return np.concatenate([middle - half, middle + half], axis=1)


@pytest.mark.parametrize("generator", [fpn_ext.PyramidAnchorGenerator, DefaultAnchorGenerator])
@pytest.mark.parametrize("boundary_thresh", [-1, 0, 9])
def test_the_best_of_all_anchors(generator, boundary_thresh):
    rng = np.random.default_rng(boundary_thresh + 1)
    for offset in (0.0, 0.3, 0.5):
        strides = [4, 16, 24]
        anchors = generator(
            sizes=[[9.0, 20.0], [40.0], [130.0]],
            aspect_ratios=[[0.3, 1.0, 2.0]],
            strides=strides,
            offset=offset,
        )
        image_size = tuple(rng.integers(30, 110, 2).tolist())
        map_sizes = [tuple(-(-side // t) for side in image_size) for t in strides]
        grid = AnchorGrid(
            levels_of(anchors, ["a", "b", "c"]), lambda h, w, m=map_sizes: m, boundary_thresh
        )
        boxes = random_boxes(rng, 200, image_size)
        found = grid.best(rows(boxes, image_size))

        every = anchors([torch.zeros(1, 1, *size) for size in map_sizes])
        overlaps = []
        for level in every:
            inside = torch.ones(len(level), dtype=torch.bool)
            if boundary_thresh >= 0:
                inside = level.inside_box(image_size, boundary_thresh)
            # In float64: iou() is checked against Detectron2's below.
            of_level = iou(boxes[:, None], level.tensor.double().numpy()[None])
            overlaps.append(np.where(inside, of_level, 0).max(axis=1))
        np.testing.assert_allclose(found.iou, np.max(overlaps, axis=0), atol=1e-6)
        at_best = np.stack(overlaps)[found.level, np.arange(len(boxes))]
        np.testing.assert_allclose(at_best, found.iou, atol=1e-6)
        own = grid.anchors_of(found, rows(boxes, image_size))
        np.testing.assert_allclose(iou(boxes, own), found.iou)  # 0 for NaN


def test_iou_is_detectron2s():
    rng = np.random.default_rng(0)
    first, second = (random_boxes(rng, 50, (60, 80)) for _ in range(2))
    theirs = pairwise_iou(*(Boxes(torch.from_numpy(b)) for b in (first, second)))
    np.testing.assert_allclose(iou(first[:, None], second[None]), theirs.numpy(), atol=1e-6)


def test_the_best_among_the_anchors_of_a_model(small_cfg):
    """The anchors from the config alone equal those of the model's RPN on an image."""
    model = build_model(small_cfg)
    boxes = random_boxes(np.random.default_rng(3), 60, (100, 150)).clip(0, 100)
    boxes = boxes[(boxes[:, 2:] - boxes[:, :2] > 1).all(axis=1)]
    images = ImageList.from_tensors([torch.zeros(3, 100, 150)], model.backbone.size_divisibility)
    with torch.no_grad():
        features = model.backbone(images.tensor)
    rpn = model.proposal_generator
    every = Boxes.cat(rpn.anchor_generator([features[name] for name in rpn.in_features]))
    overlaps = pairwise_iou(Boxes(torch.from_numpy(boxes)), every)
    found = AnchorGrid.from_config(small_cfg).best(rows(boxes, (100, 150)))
    np.testing.assert_allclose(found.iou, overlaps.max(dim=1).values.numpy(), atol=1e-5)


@pytest.mark.parametrize("config", ["configs/Base-FPN.yaml", "configs/paper/table1/a.yaml"])
def test_the_grids_are_those_of_the_maps(config):
    cfg = fpn_ext.load_config(config, ["MODEL.DEVICE", "cpu", "MODEL.RESNETS.DEPTH", "50"])
    grid = AnchorGrid.from_config(cfg)
    model = build_model(cfg)
    for size in ((65, 97), (96, 64)):
        images = ImageList.from_tensors([torch.zeros(3, *size)], model.backbone.size_divisibility)
        with torch.no_grad():
            maps = model.backbone(images.tensor)
        real = [tuple(maps[name].shape[2:]) for name in cfg.MODEL.RPN.IN_FEATURES]
        assert [tuple(s[0].tolist()) for s in grid.map_sizes(np.array([size]))] == real


def test_other_models_and_anchors_are_refused(small_cfg):
    rotated = RotatedAnchorGenerator(
        sizes=[[32]], aspect_ratios=[[1.0]], angles=[[0]], strides=[16], offset=0.0
    )
    with pytest.raises(ValueError, match="RotatedAnchorGenerator: only anchors that are the same"):
        levels_of(rotated, ["p4"])
    small_cfg.MODEL.PROPOSAL_GENERATOR.NAME = "PrecomputedProposals"
    with pytest.raises(ValueError, match="PrecomputedProposals has no anchors"):
        AnchorGrid.from_config(small_cfg)
    small_cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    with pytest.raises(ValueError, match=r"those of an RPN .* got RetinaNet"):
        AnchorGrid.from_config(small_cfg)


def test_sizes_and_ratios_are_told_from_the_anchors(small_cfg):
    shapes = [ShapeSpec(channels=1, stride=t) for t in (4, 8, 16, 32, 64)]
    levels = levels_of(build_anchor_generator(small_cfg, shapes), list("abcde"))
    assert [level.sizes for level in levels] == [[32], [64], [128], [256], [512]]
    assert levels[0].aspect_ratios == [0.5, 1, 2]
