"""Every proposal and detection keeps the levels it comes from."""

import json

import fpn_ext
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model, build_proposal_generator, build_roi_heads
from detectron2.structures import BitMasks, Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage
from fpn_ext.config.unread import unread_keys
from fpn_ext.data import demo_data
from fpn_ext.evaluation.evaluators import build_evaluator
from fpn_ext.inference.predictor import detections_of
from fpn_ext.modeling.roi_heads import LevelKeepingOutputLayers
from fpn_ext.reporting.coco_json import annotations_of
from fpn_ext.reporting.drawing import (
    CLASS_COLORS,
    LEVEL_COLORS,
    NO_LEVEL_COLOR,
    draw_boxes,
    draw_detections,
)

SIZES = {2: (60, 80), 3: (30, 40), 4: (15, 20), 5: (8, 10)}
SHAPES = {f"p{k}": ShapeSpec(channels=32, stride=2**k) for k in range(2, 7)}
IMAGE_SIZES = [(240, 320), (200, 300)]
OWN_HEADS = ("PyramidROIHeads", "ChunkedROIHeads", "UnsharedROIHeads", "AllLevelsROIHeads")
HEADS = (*OWN_HEADS, "StandardROIHeads", "CascadeROIHeads")


@pytest.fixture
def cfg(small_cfg):
    small_cfg.MODEL.FPN_EXT.KEEP_LEVELS = True
    small_cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 8
    small_cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = small_cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 60
    return small_cfg


# The RPN


def rpn(cfg, keep, levels=(2, 3, 4, 5)):
    torch.manual_seed(1)
    cfg.MODEL.FPN_EXT.KEEP_LEVELS = keep
    cfg.MODEL.RPN.IN_FEATURES = [f"p{k}" for k in levels]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[8 * 2**k] for k in levels]
    cfg.MODEL.RPN.PRE_NMS_TOPK_TRAIN = cfg.MODEL.RPN.PRE_NMS_TOPK_TEST = 1000
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 300
    return build_proposal_generator(cfg, SHAPES)


def predictions(generator, levels=(2, 3, 4, 5)):
    anchors = generator.anchor_generator([torch.zeros(2, 32, *SIZES[k]) for k in levels])
    logits = [torch.randn(2, len(a)) for a in anchors]
    deltas = [0.3 * torch.randn(2, len(a), 4) for a in anchors]
    return anchors, logits, deltas, IMAGE_SIZES


def assert_levels_are_true(generator, given, found, levels=(2, 3, 4, 5)):
    """Every proposal is a box of its level's map, with that score: all boxes decoded anew."""
    anchors, logits, deltas, _ = given
    decoded = generator._decode_proposals(anchors, deltas)
    for n, proposals in enumerate(found):
        assert proposals.proposal_level.dtype == torch.int64
        assert len(proposals.proposal_level) == len(proposals) > 0
        for i, level in enumerate(levels):
            of_level = proposals[proposals.proposal_level == level]
            candidates = Boxes(decoded[i][n].nan_to_num())
            candidates.clip(IMAGE_SIZES[n])
            known = torch.cat([candidates.tensor, logits[i][n][:, None]], dim=1)
            known = {tuple(row) for row in known.tolist()}
            rows = torch.cat(
                [of_level.proposal_boxes.tensor, of_level.objectness_logits[:, None]], dim=1
            )
            assert {tuple(row) for row in rows.tolist()} <= known
        assert set(proposals.proposal_level.tolist()) <= set(levels)


def kept_and_not(cfg, given, training):
    """What the RPN that keeps levels gives, once it is the same, to the bit, as without."""
    keeping, plain = (rpn(cfg, keep).train(training) for keep in (True, False))
    found, control = (g.predict_proposals(*given) for g in (keeping, plain))
    for a, b in zip(found, control, strict=True):
        assert torch.equal(a.proposal_boxes.tensor, b.proposal_boxes.tensor)
        assert torch.equal(a.objectness_logits, b.objectness_logits)
        assert set(b.get_fields()) == {"proposal_boxes", "objectness_logits"}
    return keeping, found


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", ["the best are enough", "all are needed", "one level"])
def test_the_level_survives_top_k_and_suppression(cfg, training, kind):
    given = predictions(rpn(cfg, True))
    if kind == "all are needed":  # the best of P2 and P3 overlap, and one of each is left
        for i in (0, 1):
            given[1][i] += 100
            given[2][i][..., 2:] = 6.0
    if kind == "one level":
        given[1][2] += 100
    generator, found = kept_and_not(cfg, given, training)
    assert_levels_are_true(generator, given, found)
    for proposals in found:
        levels = proposals.proposal_level.tolist()
        if kind == "one level":
            assert set(levels[:50]) == {4}
        else:
            assert len(set(levels)) == 4


def test_the_level_survives_what_is_dropped(cfg):
    """Boxes that are NaN, and empty ones at the image's edge, come before others of their map."""
    given = predictions(rpn(cfg, True))
    given[2][0][0, 5:5000:7] = float("nan")
    given[2][1][..., 0] -= 20.0 * (torch.arange(given[2][1].shape[1]) % 3 == 0)
    generator, found = kept_and_not(cfg, given, training=False)
    assert_levels_are_true(generator, given, found)


def test_levels_with_a_gap(cfg):
    generator = rpn(cfg, True, levels=(3, 5)).eval()
    given = predictions(generator, levels=(3, 5))
    assert_levels_are_true(generator, given, generator.predict_proposals(*given), levels=(3, 5))


def test_a_map_asked_for_alone_has_no_level(cfg):
    generator = rpn(cfg, True).eval()
    *given, sizes = predictions(generator)
    (first, _) = generator.predict_proposals(*(of_maps[3:] for of_maps in given), sizes)
    assert len(first) > 10 and not first.has("proposal_level")


def test_as_many_levels_as_maps(cfg):
    arguments = fpn_ext.PyramidRPN.from_config(cfg, SHAPES)
    assert arguments["levels"] == [2, 3, 4, 5, 6]
    with pytest.raises(ValueError, match=r"the 5 maps .*MODEL\.RPN\.IN_FEATURES.* got \[2, 3\]"):
        fpn_ext.PyramidRPN(**{**arguments, "levels": [2, 3]})


# Training


def objects():
    sides = torch.tensor([40.0, 120.0])
    targets = Instances((160, 192))
    targets.gt_boxes = Boxes(torch.stack([0 * sides + 3, 0 * sides + 5, sides, sides], dim=1))
    targets.gt_classes = torch.tensor([1, 3])
    targets.gt_masks = BitMasks(torch.ones(2, 160, 192, dtype=torch.bool))
    return targets


def step(cfg, keep):
    """Losses of one training step, and the boxes sampled by the RoI heads."""
    cfg.MODEL.FPN_EXT.KEEP_LEVELS = keep
    torch.manual_seed(2)
    model = build_model(cfg).train()
    sampled = []
    sample = model.roi_heads.label_and_sample_proposals

    def keeping(proposals, targets):
        sampled.extend(sample(proposals, targets))
        return sampled

    model.roi_heads.label_and_sample_proposals = keeping
    image = {"image": torch.rand(3, 160, 192) * 255, "instances": objects()}
    with EventStorage():
        return model([image]), sampled[0]


@pytest.mark.parametrize("heads", HEADS)
def test_training_is_the_same_and_added_ground_truth_has_no_level(cfg, heads):
    cfg.MODEL.ROI_HEADS.NAME = heads
    cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = heads == "CascadeROIHeads"
    cfg.MODEL.MASK_ON = True
    losses, sampled = step(cfg, keep=True)
    control, without = step(cfg, keep=False)
    assert losses.keys() == control.keys() and len(losses) >= 5
    assert all(torch.equal(losses[name], control[name]) for name in losses)
    assert not without.has("proposal_level")
    is_truth = sampled.objectness_logits > 20
    assert is_truth.sum() == 2
    assert (sampled.proposal_level == -1).tolist() == is_truth.tolist()
    assert set(sampled.proposal_level[~is_truth].tolist()) <= {2, 3, 4, 5, 6}
    assert len(set(sampled.proposal_level.tolist())) > 2


# Detections


def detect(cfg, keep):
    cfg.MODEL.FPN_EXT.KEEP_LEVELS = keep
    torch.manual_seed(2)
    model = build_model(cfg).eval()
    with torch.no_grad():
        proposals = []
        model.proposal_generator.register_forward_hook(lambda _, __, out: proposals.append(out[0]))
        (found,) = model([{"image": torch.rand(3, 160, 192) * 255}])
    return found["instances"], proposals[0][0]


@pytest.mark.parametrize("heads", HEADS)
def test_detections_are_the_same_and_say_their_levels(cfg, heads):
    cfg.MODEL.ROI_HEADS.NAME = heads
    cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = heads == "CascadeROIHeads"
    cfg.MODEL.MASK_ON = True
    found, proposals = detect(cfg, keep=True)
    control, plain = detect(cfg, keep=False)
    assert len(found) > 10
    assert torch.equal(found.pred_boxes.tensor, control.pred_boxes.tensor)
    assert torch.equal(found.scores, control.scores)
    assert torch.equal(found.pred_masks, control.pred_masks)
    assert not plain.has("proposal_level")
    assert proposals.proposal_level.unique().numel() > 1
    assert found.has("proposal_level") == (heads in OWN_HEADS), "Detectron2's drop it"
    assert found.has("pooled_level") == (heads in OWN_HEADS and heads != "AllLevelsROIHeads")


def given_proposals(sides, levels):
    sides = torch.tensor(sides)
    proposals = Instances((512, 512))
    proposals.proposal_boxes = Boxes(torch.stack([0 * sides, 0 * sides, sides, sides], dim=1))
    proposals.objectness_logits = torch.zeros(len(sides))
    if levels:
        proposals.proposal_level = torch.tensor(levels)
    return proposals


def heads_on(cfg, proposals, name="PyramidROIHeads"):
    """RoI heads that leave every box as it is, on given proposals."""
    cfg.MODEL.ROI_HEADS.NAME = name
    cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST = 1.0
    heads = build_roi_heads(cfg, SHAPES).eval()
    for predictor in heads.box_predictor if name == "UnsharedROIHeads" else [heads.box_predictor]:
        torch.nn.init.zeros_(predictor.bbox_pred.weight)
    maps = {f"p{k}": torch.randn(1, 32, 512 // 2**k, 512 // 2**k) for k in range(2, 7)}
    images = ImageList(torch.zeros(1, 3, 512, 512), [(512, 512)])
    with torch.no_grad():
        return heads(images, maps, [proposals])[0][0]


@pytest.mark.parametrize("name", OWN_HEADS)
def test_the_levels_are_those_of_the_proposal(cfg, name):
    by_side = {30.0: (6, 2), 130.0: (2, 3), 230.0: (5, 4), 500.0: (-1, 5)}
    proposals = given_proposals(list(by_side), [proposed for proposed, _ in by_side.values()])
    found = heads_on(cfg, proposals, name)
    assert len(found) == 4 * 5, "every class of every box"
    for i, side in enumerate(found.pred_boxes.tensor[:, 2].round().tolist()):
        proposed, pooled = by_side[side]
        assert found.proposal_level[i] == proposed
        assert name == "AllLevelsROIHeads" or found.pooled_level[i] == pooled


def test_proposals_without_levels_leave_the_field_out(cfg):
    """Proposals from a file, or from Detectron2's RPN."""
    found = heads_on(cfg, given_proposals([30.0, 130.0], None))
    assert found.has("pooled_level") and not found.has("proposal_level")


def test_a_box_that_is_not_finite_shifts_no_level(cfg):
    predictor = LevelKeepingOutputLayers(cfg, ShapeSpec(channels=64), pooler=None)
    proposals = given_proposals([30.0, 130.0, 230.0], [6, 3, 4])
    scores, deltas = torch.zeros(3, 6), torch.zeros(3, 5 * 4)
    deltas[0] = float("nan")
    (found,), (rows,) = predictor.inference((scores, deltas), [proposals])
    sides = found.pred_boxes.tensor[:, 2].tolist()
    assert set(sides) == {130.0, 230.0}
    assert found.proposal_level.tolist() == [{130.0: 3, 230.0: 4}[side] for side in sides]
    assert rows.tolist() == [{130.0: 1, 230.0: 2}[side] for side in sides]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_optimised_model_keeps_them(cfg, dtype):
    torch.manual_seed(2)
    model = fpn_ext.optimize_for_inference(build_model(cfg), dtype)
    found = model([{"image": torch.rand(3, 160, 192) * 255}])[0]["instances"]
    assert set(found.proposal_level.tolist()) <= {2, 3, 4, 5, 6}
    assert set(found.pooled_level.tolist()) <= {2, 3, 4, 5}


def test_an_rpn_alone(cfg):
    cfg.MODEL.META_ARCHITECTURE = "ProposalNetwork"
    model = build_model(cfg).eval()
    with torch.no_grad():
        (output,) = model([{"image": torch.rand(3, 160, 192) * 255, "height": 80, "width": 96}])
    found = detections_of(output)
    assert torch.equal(found.proposal_level, output["proposals"].proposal_level)
    assert not found.has("pooled_level")


def test_two_components_read_the_key():
    key = "MODEL.FPN_EXT.KEEP_LEVELS"
    cfg = fpn_ext.get_cfg()
    assert key in unread_keys(cfg)
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "PyramidRPN"
    assert key not in unread_keys(cfg)
    cfg.MODEL.PROPOSAL_GENERATOR.NAME, cfg.MODEL.ROI_HEADS.NAME = "RPN", "UnsharedROIHeads"
    assert key not in unread_keys(cfg)
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "PrecomputedProposals"
    assert key not in unread_keys(cfg)


# JSON and pictures


def two_detections():
    found = Instances((60, 200))
    found.pred_boxes = Boxes(torch.tensor([[5.0, 20, 25, 50], [120.0, 20, 150, 50]]))
    found.scores = torch.tensor([0.9, 0.8])
    found.pred_classes = torch.tensor([0, 1])
    return found


def with_levels(found):
    found.proposal_level, found.pooled_level = torch.tensor([3, -1]), torch.tensor([4, 2])
    return found


@pytest.fixture
def coco_set(tmp_path):
    demo_data.generate(tmp_path, num_train=1, num_val=2)
    json_file = tmp_path / "annotations" / "instances_val.json"
    register_coco_instances("test_keep_levels", {}, str(json_file), str(tmp_path / "val"))
    yield json_file
    DatasetCatalog.remove("test_keep_levels")
    MetadataCatalog.remove("test_keep_levels")


def test_cocos_scores_do_not_change_and_its_json_has_the_levels(coco_set, tmp_path):
    scores = {}
    for keep in (False, True):
        evaluator = build_evaluator(fpn_ext.get_cfg(), "test_keep_levels", str(tmp_path / "out"))
        evaluator.reset()
        for record in DatasetCatalog.get("test_keep_levels"):
            truth = record["annotations"]
            found = Instances((record["height"], record["width"]))
            boxes = torch.tensor([a["bbox"] for a in truth])
            boxes[:, 2:] += boxes[:, :2]
            found.pred_boxes = Boxes(boxes)
            found.scores = torch.linspace(0.9, 0.5, len(truth))
            found.pred_classes = torch.tensor([a["category_id"] for a in truth])
            if keep:
                found.proposal_level = torch.arange(len(truth)) - 1
                found.pooled_level = torch.arange(len(truth)) + 2
            evaluator.process([record], [{"instances": found, "proposals": None}])
        scores[keep] = evaluator.evaluate()["bbox"]
        written = json.loads((tmp_path / "out" / "coco_instances_results.json").read_text())
        assert len(written) > 2
        for result in written:
            assert ("proposal_level" in result) == ("pooled_level" in result) == keep
    assert scores[True]["AP"] == pytest.approx(100)
    np.testing.assert_equal(scores[True], scores[False])
    assert [(r["proposal_level"], r["pooled_level"]) for r in written[:2]] == [(-1, 2), (0, 3)]


def test_an_image_without_detections_is_evaluated(coco_set, tmp_path):
    evaluator = build_evaluator(fpn_ext.get_cfg(), "test_keep_levels", str(tmp_path / "out"))
    evaluator.reset()
    record = DatasetCatalog.get("test_keep_levels")[0]
    evaluator.process([record], [{"instances": with_levels(two_detections())[:0]}])
    assert evaluator._predictions == [{"image_id": record["image_id"], "instances": []}]


def test_annotations_have_what_is_kept():
    plain = list(annotations_of(two_detections(), [7, 9]))
    assert [a["category_id"] for a in plain] == [7, 9]
    assert not any("proposal_level" in a or "pooled_level" in a for a in plain)
    kept = list(annotations_of(with_levels(two_detections()), [7, 9]))
    assert [(a["proposal_level"], a["pooled_level"]) for a in kept] == [(3, 4), (-1, 2)]


def test_colours_and_labels_of_levels():
    image = np.zeros((60, 200, 3), dtype=np.uint8)
    names = ["a", "b"]
    found = with_levels(two_detections())
    corners = [(5, 49), (120, 49)]
    drawn = draw_detections(image, found, names, color_by="level")
    assert [drawn.getpixel(at) for at in corners] == [LEVEL_COLORS[4], LEVEL_COLORS[2]]
    found.remove("pooled_level")
    drawn = draw_detections(image, found, names, color_by="level")
    assert [drawn.getpixel(at) for at in corners] == [LEVEL_COLORS[3], NO_LEVEL_COLOR]
    longer = draw_detections(image, found, names, label_levels=True, color_by="level")
    same = np.asarray(drawn) == np.asarray(longer)
    assert not same[:20, :120].all(), "p3"
    assert same[:, 120:].all(), "the second has no level to show"


def test_colours_are_of_classes():
    """Levels are no more than a mark on the box, unless they are asked for."""
    found = with_levels(two_detections())
    found.pred_classes[:] = found.pred_classes[0]
    drawn = draw_detections(np.zeros((60, 200, 3), np.uint8), found, ["a", "b"])
    assert drawn.getpixel((5, 49)) == drawn.getpixel((120, 49)) in CLASS_COLORS
    found.pred_classes[1] = 1 - found.pred_classes[0]
    drawn = draw_detections(np.zeros((60, 200, 3), np.uint8), found, ["a", "b"])
    assert drawn.getpixel((5, 49)) != drawn.getpixel((120, 49)) in CLASS_COLORS


def test_no_box_crosses_out_a_label():
    boxes = np.array([[20, 40, 60, 80], [10, 30, 90, 90]], np.float32)
    image = np.zeros((100, 100, 3), np.uint8)
    both = np.asarray(draw_boxes(image, boxes, ["label", ""], [2, 3]))
    alone = np.asarray(draw_boxes(image, boxes[:1], ["label"], [2]))
    label = np.s_[29:39, 21:40]  # above the first box, where the second's edge is
    np.testing.assert_array_equal(both[label], alone[label])
    assert (alone[label] == LEVEL_COLORS[2]).all(-1).any()
