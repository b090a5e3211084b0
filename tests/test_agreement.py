"""Stage-by-stage comparison of two small models with known differences."""

import math

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from fpn_ext.inspection.agreement import (
    TO_ROUNDING,
    TO_THE_BIT,
    Difference,
    Matches,
    StageByStage,
    end_to_end_rows,
    in_form_of,
)

BUILTIN = {
    "BACKBONE": "build_resnet_fpn_backbone",
    "ANCHOR_GENERATOR": "DefaultAnchorGenerator",
    "PROPOSAL_GENERATOR": "RPN",
    "ROI_HEADS": "StandardROIHeads",
}
MAPS = ["p2", "p3", "p4", "p5", "p6"]
RPN = ["anchors", "objectness logits", "anchor deltas", "proposals, boxes", "proposals, scores"]
BOX_HEAD = ["pooled box features", "box head", "class logits", "box deltas"]
BOX_HEAD += ["detections, boxes", "detections, scores"]


@pytest.fixture
def cfg(small_cfg):
    small_cfg.MODEL.FPN_EXT.POOLER_IMPLEMENTATION = "per_level"
    small_cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 50
    return small_cfg


def pair(cfg, builtin=BUILTIN):
    """The control and the model of a config, with the same weights, whose scores differ."""
    ours = build_model(cfg).eval()
    for name, tensor in ours.state_dict().items():
        if "predictor" in name or "rpn_head" in name:
            tensor.mul_(10)
    cfg = cfg.clone()
    for part, name in builtin.items():
        cfg.MODEL[part].NAME = name
    control = build_model(cfg).eval()
    control.load_state_dict(ours.state_dict())
    return control, ours


def inputs():
    return [{"image": torch.rand(3, 96, 128) * 255, "height": 96, "width": 128}]


def compared(control, ours):
    stages, batch = StageByStage(control, ours), inputs()
    stages.compare(batch, batch)
    return stages


def by_name(rows):
    return {row["what"]: row for row in rows}


def beyond(stages, tolerance=TO_THE_BIT):
    return [row["what"] for row in stages.rows(tolerance) if not row["within"]]


# Whole models


def test_all_stages_of_the_same_model_are_equal_to_the_bit(cfg):
    stages = compared(*pair(cfg))
    rows = by_name(stages.rows(TO_THE_BIT))
    assert list(rows) == MAPS + RPN + BOX_HEAD
    assert not beyond(stages) and not stages.left_out
    for row in rows.values():
        assert row["difference"] == row["relative"] == 0 and row["largest"] > 0, row
    for what, count in (("proposals, boxes", 50), ("detections, boxes", 100)):
        row = rows[what]
        assert (row["found_again"], row["of"], row["others"]) == (count, count, 0)


def test_a_stage_is_given_what_the_controls_stage_before_it_returned(cfg):
    """A wrong early weight shows only in its own map and in maps computed from it."""
    control, ours = pair(cfg)
    ours.backbone.fpn_lateral3.weight.data[0, 0] += 0.5
    assert beyond(compared(control, ours)) == ["p2", "p3"]


def test_a_wrong_weight_late_shows_there(cfg):
    control, ours = pair(cfg)
    ours.roi_heads.box_predictor.bbox_pred.bias.data[0] += 0.01
    stages = compared(control, ours)
    assert beyond(stages) == ["box deltas"]
    assert by_name(stages.rows(TO_THE_BIT))["box deltas"]["difference"] == pytest.approx(0.01)


def test_the_models_are_left_as_they_were(cfg):
    control, ours = pair(cfg)
    ours.backbone.fpn_lateral3.weight.data[0, 0] += 0.5
    batch = inputs()
    with torch.no_grad():
        before = [model(batch)[0]["instances"].scores for model in (control, ours)]
        returned = StageByStage(control, ours).compare(batch, batch)
        after = [model(batch)[0]["instances"].scores for model in (control, ours)]
    assert torch.equal(returned[0]["instances"].scores, before[0])
    assert not torch.equal(before[0], before[1])
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one, other)


def test_masks_and_keypoints(cfg):
    cfg.MODEL.MASK_ON = cfg.MODEL.KEYPOINT_ON = True
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 1
    cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 8
    cfg.MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS = [8]
    control, ours = pair(cfg)
    branches = ["pooled mask features", "masks", "pooled keypoint features", "keypoint heat maps"]
    stages = compared(control, ours)
    assert list(by_name(stages.rows(TO_THE_BIT)))[-4:] == branches and not beyond(stages)
    ours.roi_heads.mask_head.predictor.bias.data += 1
    assert beyond(compared(control, ours)) == ["masks"]


def test_boxes_in_chunks_stand_beside_the_same_boxes(cfg):
    cfg.MODEL.ROI_HEADS.NAME = "ChunkedROIHeads"
    cfg.MODEL.FPN_EXT.BOXES_PER_CHUNK = 7
    control, ours = pair(cfg)
    assert not beyond(compared(control, ours), TO_ROUNDING)
    assert not beyond(compared(ours, control), TO_ROUNDING), "nor the other way round"
    ours.roi_heads.box_head.fc2.bias.data += 1
    assert beyond(compared(control, ours), TO_ROUNDING) == ["box head"]


def test_boxes_that_the_model_leaves_out(cfg):
    control, ours = pair(cfg)

    class LazyHeads(type(ours.roi_heads)):
        def _forward_box(self, features, proposals):
            return super()._forward_box(features, [p[:10] for p in proposals])

    ours.roi_heads.__class__ = LazyHeads
    assert beyond(compared(control, ours))[:4] == BOX_HEAD[:4]
    assert beyond(compared(ours, control))[:4] == BOX_HEAD[:4]


def test_a_cascade(cfg):
    cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = True
    cfg.MODEL.ROI_HEADS.NAME = "CascadeROIHeads"
    builtin = BUILTIN | {"ROI_HEADS": "CascadeROIHeads"}
    control, ours = pair(cfg, builtin)
    assert not beyond(compared(control, ours))
    ours.roi_heads.box_predictor[1].cls_score.bias.data += 1
    assert beyond(compared(control, ours)) == ["class logits"]


def test_an_rpn_alone(cfg):
    cfg.MODEL.META_ARCHITECTURE = "ProposalNetwork"
    stages = compared(*pair(cfg))
    assert list(by_name(stages.rows(TO_THE_BIT))) == MAPS + RPN and not beyond(stages)


def test_what_has_another_shape_cannot_be_compared_and_is_not_exchanged(cfg):
    control, _ = pair(cfg)
    cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS = [[0.5, 1.0]]
    ours = build_model(cfg).eval()
    rows = by_name(compared(control, ours).rows(TO_THE_BIT))
    for what in ("anchors", "objectness logits", "anchor deltas"):
        assert rows[what]["difference"] is None and rows[what]["within"] is False
    assert rows["pooled box features"]["within"], "the control's proposals all the same"


def test_stages_that_one_model_alone_has(cfg):
    control, _ = pair(cfg)
    cfg.MODEL.META_ARCHITECTURE = "ProposalNetwork"
    ours = build_model(cfg).eval()
    ours.load_state_dict(control.state_dict(), strict=False)
    stages = compared(control, ours)
    assert stages.left_out == ["pooled box features", "box head", "box predictor", "detections"]
    assert not beyond(stages)


# Figures by hand


def test_difference_by_hand():
    difference = Difference()
    difference.add(torch.tensor([1.0, -4.5]), torch.tensor([1.0, -5.0]))
    difference.add(torch.tensor([2.25]), torch.tensor([2.0]))
    difference.add(torch.empty(0, 4), torch.empty(0, 4))
    row = difference.row("x", 0.4)
    assert row == {
        **{"what": "x", "difference": 0.5, "relative": 0.1, "largest": 5.0},
        **{"tolerance": 0.4, "within": False},
    }
    assert difference.row("x", 0.5)["within"] is True
    assert difference.row("x", None)["within"] is None


@pytest.mark.parametrize(
    ("own", "control"),
    [
        (torch.zeros(2), torch.zeros(3)),
        (torch.tensor([math.nan]), torch.tensor([0.0])),
        (None, torch.zeros(1)),
    ],
)
def test_what_cannot_be_compared_is_within_no_tolerance(own, control):
    difference = Difference()
    difference.add(own, control)
    assert difference.row("x", math.inf)["within"] is False
    assert difference.row("x", math.inf)["difference"] is None


def instances(*found):
    """(class, score, x0, y0, x1, y1)"""
    rows = torch.tensor([list(map(float, f)) for f in found]).reshape(-1, 6)
    return Instances(
        (99, 99), pred_boxes=Boxes(rows[:, 2:]), scores=rows[:, 1], pred_classes=rows[:, 0].long()
    )


def test_boxes_are_matched_whatever_their_order():
    control = instances((0, 0.9, 0, 0, 9, 9), (1, 0.8, 0, 0, 9, 9), (0, 0.7, 50, 50, 60, 60))
    own = instances((1, 0.8, 0, 0, 9, 9), (0, 0.75, 50, 50, 60.5, 60), (0, 0.3, 20, 20, 30, 30))
    matches = Matches()
    matches.add(own, control, "pred_boxes", "scores")
    boxes, scores = matches.rows("detections", 1.0, 0.1, 0.5)
    assert (boxes["found_again"], boxes["of"], boxes["others"]) == (2, 3, 1)
    assert boxes["difference"] == 0.5 and scores["difference"] == pytest.approx(0.05)
    # Two of three here and two of three there.
    assert matches.share == pytest.approx(2 / 3)
    assert boxes["within"] and scores["within"]
    assert not matches.rows("detections", 1.0, 0.1, 0.7)[0]["within"]


def test_of_two_equal_boxes_the_score_tells_which_is_which():
    found = instances((0, 0.9, 0, 0, 9, 9), (0, 0.2, 0, 0, 9, 9))
    matches = Matches()
    matches.add(found[torch.tensor([1, 0])], found, "pred_boxes", "scores")
    assert matches.scores.largest == 0


@pytest.mark.parametrize(("own", "control", "share"), [((), (), 1), ((0,), (), 0), ((), (0,), 0)])
def test_no_detections(own, control, share):
    some = [instances(*((0, 0.5, 0, 0, 9, 9) for _ in rows)) for rows in (own, control)]
    matches = Matches()
    matches.add(*some, "pred_boxes", "scores")
    assert matches.share == share
    boxes, _ = end_to_end_rows(matches, TO_THE_BIT)
    assert boxes["within"] is (share == 1)


def test_end_to_end_rounding_may_lose_a_box_in_a_hundred():
    boxes = [(0, 0.5, i, i, i + 9, i + 9) for i in range(0, 400, 4)]
    for lost, within in ((1, True), (5, False)):
        matches = Matches()
        matches.add(instances(*boxes[lost:]), instances(*boxes), "pred_boxes", "scores")
        (row, scores) = end_to_end_rows(matches, TO_ROUNDING)
        assert row["within"] is within and scores["within"] is None
        assert end_to_end_rows(matches, TO_THE_BIT)[0]["within"] is False
        assert end_to_end_rows(matches, None)[0]["within"] is None


def test_in_form_of():
    own = torch.zeros(1, 2, 3, 3, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    reference, boxes = torch.ones(1, 2, 3, 3), Boxes(torch.zeros(1, 4))
    changed = in_form_of(own, reference)
    assert changed.dtype == own.dtype and changed.stride() == own.stride() and changed.all()
    maps, others = in_form_of(({"p2": own, "p9": own}, [boxes]), ({"p2": reference}, ["theirs"]))
    assert maps["p2"].all() and others == ["theirs"]
    assert maps["p9"] is own, "there is none in the reference"
    assert in_form_of(own, torch.ones(1)) is own, "another shape"
    assert in_form_of([own], [reference] * 2) == [own], "another length"
