"""The pyramids of the paper's ablations, on feature maps with hand-computed results."""

import fpn_ext
import pytest
import torch
from detectron2.modeling import Backbone, build_backbone, build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from fpn_ext.modeling.top_blocks import Subsample
from fpn_ext.variants.ablations import (
    BottomUpPyramid,
    FinestLevelPyramid,
    TopDownPyramid,
    UnsmoothedPyramid,
)

ROWS = [BottomUpPyramid, TopDownPyramid, FinestLevelPyramid, UnsmoothedPyramid]


class Constants(Backbone):
    """C2 = 1, C3 = 10, C4 = 100, C5 = 1000 everywhere, for any image."""

    def __init__(self):
        super().__init__()
        self._out_features = ["c2", "c3", "c4", "c5"]
        self._out_feature_strides = dict(zip(self._out_features, (4, 8, 16, 32), strict=True))
        self._out_feature_channels = dict.fromkeys(self._out_features, 1)

    def forward(self, image):
        n, _, height, width = image.shape
        return {
            name: torch.full((n, 1, -(-height // stride), -(-width // stride)), 10.0**i)
            for i, (name, stride) in enumerate(self._out_feature_strides.items())
        }


def pyramid_of_ones(row, **kwargs):
    """1x1 and centre-tap 3x3 convolutions with weight 1."""
    if row is not FinestLevelPyramid:
        kwargs.setdefault("top_block", Subsample("p5"))
    pyramid = row(
        bottom_up=Constants(), in_features=["c2", "c3", "c4", "c5"], out_channels=1, **kwargs
    )
    for lateral in pyramid.laterals:
        lateral.weight.data.fill_(1)
    for output in getattr(pyramid, "outputs", []):
        output.weight.data.zero_()
        output.weight.data[:, :, 1, 1] = 1
    return pyramid


# (c), the FPN: P5 = C5, P4 = C5 + C4, and so on.
@pytest.mark.parametrize(
    "row, expected",
    [
        (fpn_ext.FeaturePyramid, {"p2": 1111, "p3": 1110, "p4": 1100, "p5": 1000, "p6": 1000}),
        (BottomUpPyramid, {"p2": 1, "p3": 10, "p4": 100, "p5": 1000, "p6": 1000}),
        (TopDownPyramid, {"p2": 1000, "p3": 1000, "p4": 1000, "p5": 1000, "p6": 1000}),
        (FinestLevelPyramid, {"p2": 1111}),
        (UnsmoothedPyramid, {"p2": 1111, "p3": 1110, "p4": 1100, "p5": 1000, "p6": 1000}),
    ],
)
@pytest.mark.parametrize("size", [(64, 128), (70, 97)])
def test_constant_maps(row, expected, size):
    pyramid = pyramid_of_ones(row)
    maps = pyramid(torch.zeros(2, 3, *size))
    assert {name: m.unique().item() for name, m in maps.items()} == expected
    assert list(maps) == list(pyramid.output_shape()) == list(expected)
    for name, shape in pyramid.output_shape().items():
        sides = [-(-side // shape.stride) for side in size]
        assert maps[name].shape == (2, shape.channels, *sides)


def test_without_laterals_cells_are_blocks_of_c5(monkeypatch):
    """One cell of C5 is 8 x 8 cells of P2: nothing says where in it a thing is."""
    pyramid = pyramid_of_ones(TopDownPyramid)
    c5 = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).reshape(1, 1, 2, 2)
    features = pyramid.bottom_up(torch.zeros(1, 3, 64, 64)) | {"c5": c5}
    monkeypatch.setattr(pyramid.bottom_up, "forward", lambda image: features)
    p2 = pyramid(torch.zeros(1, 3, 64, 64))["p2"]
    assert torch.equal(p2, c5.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3))


def test_without_top_down_a_level_sees_its_own_c_k_alone(monkeypatch):
    pyramid = pyramid_of_ones(BottomUpPyramid)
    before = pyramid(torch.zeros(1, 3, 64, 64))
    features = pyramid.bottom_up(torch.zeros(1, 3, 64, 64))
    features["c4"] = features["c4"] + 7
    monkeypatch.setattr(pyramid.bottom_up, "forward", lambda image: features)
    after = pyramid(torch.zeros(1, 3, 64, 64))
    changed = [name for name in after if not torch.equal(after[name], before[name])]
    assert changed == ["p4"]


def test_without_3x3_convolutions_a_level_is_the_sum_itself():
    """Seams at every second cell of P2 where P3 changes: upsampling's, which nothing smooths."""
    maps = [torch.zeros(1, 1, 4, 4), torch.tensor([[1.0, 2.0], [3.0, 4.0]]).reshape(1, 1, 2, 2)]
    maps += [torch.zeros(1, 1, 1, 1)] * 2
    whole, unsmoothed = pyramid_of_ones(fpn_ext.FeaturePyramid), pyramid_of_ones(UnsmoothedPyramid)
    for output in whole.outputs:
        output.weight.data.fill_(1 / 9)  # a mean of 3 x 3 cells
    with torch.no_grad():
        smooth = whole.levels_on_maps(list(maps))[0].squeeze()
        p2 = unsmoothed.levels_on_maps([m.clone() for m in maps])[0].squeeze()
    assert p2.tolist() == [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]
    assert p2[1, 1:3].diff() == 1 and 0 < smooth[1, 1:3].diff() < 1


@pytest.mark.parametrize("gradients", [True, False])
def test_without_3x3_convolutions_no_level_is_overwritten(gradients):
    """A coarser map is read by the next sum, and is a level."""
    pyramid = pyramid_of_ones(UnsmoothedPyramid)
    with torch.set_grad_enabled(gradients):
        levels = pyramid(torch.zeros(1, 3, 64, 64))
    assert len({level.data_ptr() for level in levels.values()}) == len(levels)
    assert [level.unique().item() for level in levels.values()] == [1111, 1110, 1100, 1000, 1000]


@pytest.mark.parametrize(
    "row, convolutions",
    [
        (
            BottomUpPyramid,
            [f"fpn_{kind}{k}" for kind in ("lateral", "output") for k in (2, 3, 4, 5)],
        ),
        (TopDownPyramid, ["fpn_lateral5", *(f"fpn_output{k}" for k in (2, 3, 4, 5))]),
        (FinestLevelPyramid, [*(f"fpn_lateral{k}" for k in (2, 3, 4, 5)), "fpn_output2"]),
        (UnsmoothedPyramid, [f"fpn_lateral{k}" for k in (2, 3, 4, 5)]),
    ],
)
def test_it_owns_what_it_uses(row, convolutions):
    """Distributed training fails on a parameter without a gradient."""
    pyramid = pyramid_of_ones(row)
    owned = {name.partition(".")[0] for name, _ in pyramid.named_parameters()}
    assert sorted(owned) == sorted(convolutions)
    sum(m.sum() for m in pyramid(torch.zeros(1, 3, 64, 64)).values()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in pyramid.parameters())


@pytest.mark.parametrize("row", ROWS)
def test_by_name_from_yaml(row, small_cfg):
    small_cfg.MODEL.BACKBONE.NAME = row.__name__
    pyramid = build_backbone(small_cfg)
    assert type(pyramid) is row and getattr(fpn_ext, row.__name__) is row
    maps = pyramid(torch.rand(1, 3, 64, 64))
    assert list(maps) == list(pyramid.output_shape())


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.torchscript
def test_torchscript_equals_eager(row, small_cfg):
    small_cfg.MODEL.BACKBONE.NAME = row.__name__
    pyramid = build_backbone(small_cfg).eval()
    image = torch.rand(1, 3, 64, 96)
    scripted = torch.jit.script(pyramid)(image)
    with torch.no_grad():
        eager = pyramid(image)
    assert list(scripted) == list(eager)
    for name in eager:
        torch.testing.assert_close(scripted[name], eager[name])


def test_the_finest_level_alone_takes_no_top_block():
    with pytest.raises(ValueError, match="top_block must be None"):
        pyramid_of_ones(FinestLevelPyramid, top_block=Subsample("p5"))


def test_the_config_check_knows_that_p2_is_all_there_is(small_cfg):
    small_cfg.MODEL.BACKBONE.NAME = "FinestLevelPyramid"
    with pytest.raises(
        ValueError, match=r"MODEL.RPN.IN_FEATURES asks for \['p3', .*gives \['p2'\]"
    ):
        fpn_ext.check_config(small_cfg)


# -------------------------------------------------------------------------- unshared heads


def test_an_rpn_head_for_each_level(small_cfg):
    small_cfg.MODEL.RPN.HEAD_NAME = "UnsharedRPNHead"
    # Two sizes on P2, one elsewhere: a shared head could not.
    small_cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16, 24], [32], [64], [128], [256]]
    fpn_ext.check_config(small_cfg)
    model = build_model(small_cfg).eval()
    head = model.proposal_generator.rpn_head
    channels = small_cfg.MODEL.FPN.OUT_CHANNELS
    maps = [torch.rand(2, channels, s, s) for s in (16, 8, 4, 2, 1)]
    logits, deltas = head(maps)
    assert [x.shape[1] for x in logits] == [6, 3, 3, 3, 3]
    assert [x.shape[1] for x in deltas] == [24, 12, 12, 12, 12]
    for level, own in enumerate(head.heads):
        (alone,), _ = own([maps[level]])
        assert torch.equal(logits[level], alone)
    with torch.no_grad():
        head.heads[0].objectness_logits.bias.fill_(5)
    changed = [not torch.equal(a, b) for a, b in zip(head(maps)[0], logits, strict=True)]
    assert changed == [True, False, False, False, False]
    with torch.no_grad():
        model.inference([{"image": torch.zeros(3, 64, 64, dtype=torch.uint8)}])


def test_an_rpn_without_levels():
    with pytest.raises(ValueError, match=r"MODEL\.RPN\.IN_FEATURES names no map"):
        fpn_ext.UnsharedRPNHead(heads=[])


@pytest.fixture
def unshared(small_cfg):
    small_cfg.MODEL.ROI_HEADS.NAME = "UnsharedROIHeads"
    small_cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    fpn_ext.check_config(small_cfg)
    return build_model(small_cfg)


def proposals(*sides, size=256):
    """One square at (10, 10) of each side, labelled as class 0."""
    boxes = Boxes(torch.tensor([[10.0, 10.0, 10.0 + s, 10.0 + s] for s in sides]).reshape(-1, 4))
    count = len(sides)
    return Instances(
        (size, size),
        proposal_boxes=boxes,
        objectness_logits=torch.zeros(count),
        gt_boxes=boxes,
        gt_classes=torch.zeros(count, dtype=torch.int64),
    )


def test_a_box_head_for_each_level(unshared, small_cfg):
    """With the same weights on all levels it is the shared head; a level's weights are its own."""
    heads = unshared.roi_heads.eval()
    for of_level in (*heads.box_head[1:], *heads.box_predictor[1:]):
        first = heads.box_head[0] if of_level in heads.box_head else heads.box_predictor[0]
        of_level.load_state_dict(first.state_dict())
    small_cfg.MODEL.ROI_HEADS.NAME = "PyramidROIHeads"
    shared = build_model(small_cfg).roi_heads.eval()
    shared.box_head.load_state_dict(heads.box_head[0].state_dict())
    shared.box_predictor.load_state_dict(heads.box_predictor[0].state_dict())
    channels = small_cfg.MODEL.FPN.OUT_CHANNELS
    maps = {f"p{k}": torch.rand(2, channels, 256 >> k, 256 >> k) for k in range(2, 7)}
    # Levels 2 to 5 of Eq. 1, out of order and in two images.
    images = [proposals(230, 20, 120), proposals(40, 450, 20)]
    with torch.no_grad():
        found = heads._forward_box(maps, images)
        expected = shared._forward_box(maps, images)
        for ours, theirs in zip(found, expected, strict=True):
            assert len(ours) > 0
            torch.testing.assert_close(ours.scores, theirs.scores)
            torch.testing.assert_close(ours.pred_boxes.tensor, theirs.pred_boxes.tensor)
        heads.box_predictor[2].cls_score.bias[0] += 50  # P4: the 230 px box of the first image
        changed = heads._forward_box(maps, images)
    assert changed[0].scores[0] > 0.99
    assert torch.equal(changed[1].scores, found[1].scores)


def test_every_level_gets_a_gradient_even_without_a_box(unshared, small_cfg):
    heads = unshared.roi_heads.train()
    channels = small_cfg.MODEL.FPN.OUT_CHANNELS
    maps = {f"p{k}": torch.rand(1, channels, 256 >> k, 256 >> k) for k in range(2, 7)}
    with EventStorage():
        losses = heads._forward_box(maps, [proposals(20)])
    sum(losses.values()).backward()
    for level in range(4):
        parameters = [*heads.box_head[level].parameters(), *heads.box_predictor[level].parameters()]
        assert all(p.grad is not None for p in parameters)
        assert any(p.grad.abs().sum() > 0 for p in parameters) == (level == 0)


def test_no_box_at_all(unshared, small_cfg):
    heads = unshared.roi_heads.eval()
    channels = small_cfg.MODEL.FPN.OUT_CHANNELS
    maps = {f"p{k}": torch.rand(1, channels, 256 >> k, 256 >> k) for k in range(2, 7)}
    assert len(heads._forward_box(maps, [proposals()])[0]) == 0


def test_a_box_head_for_each_level_that_there_is(small_cfg):
    """P3 is missing: its boxes and those of P2 go to the first of three heads."""
    small_cfg.MODEL.ROI_HEADS.NAME = "UnsharedROIHeads"
    small_cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p4", "p5"]
    heads = build_model(small_cfg).roi_heads.eval()
    with torch.no_grad():
        for i, predictor in enumerate(heads.box_predictor):
            predictor.cls_score.weight.zero_()
            predictor.cls_score.bias.zero_()
            predictor.cls_score.bias[i] = 50  # the class is the number of the head
        channels = small_cfg.MODEL.FPN.OUT_CHANNELS
        maps = {f"p{k}": torch.rand(1, channels, 512 >> k, 512 >> k) for k in (2, 4, 5)}
        for side, head in ((20, 0), (150, 0), (230, 1), (460, 2)):
            found = heads._forward_box(maps, [proposals(side, size=512)])[0]
            assert found.pred_classes[found.scores > 0.9].tolist() == [head]


def test_training_on_predicted_boxes_is_refused(small_cfg):
    small_cfg.MODEL.ROI_HEADS.NAME = "UnsharedROIHeads"
    small_cfg.MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES = True
    with pytest.raises(ValueError, match="TRAIN_ON_PRED_BOXES must be False"):
        build_model(small_cfg)
