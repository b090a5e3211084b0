"""Our components in place of Detectron2's, built as in a user's script.

That is: from the config of Detectron2's ``get_cfg``, which has none of this project's keys, or by
Detectron2's keywords alone. What its own unit tests of anchors, pooler, RPN and RoI heads ask of
its components is asked of ours here.
"""

import fpn_ext
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import StandardROIHeads, build_backbone, build_model
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator, build_anchor_generator
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import RPN, build_proposal_generator
from detectron2.structures import BitMasks, Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage
from scripting import detectron2_scripting

C4 = {"res4": ShapeSpec(channels=1024, stride=16)}


def two_images():
    return ImageList(torch.rand(2, 3, 40, 60), [(25, 30), (40, 60)])


def c4_maps():
    return {"res4": torch.rand(2, 1024, 3, 4)}


def truth(size, boxes, classes):
    return Instances(
        size,
        gt_boxes=Boxes(torch.tensor(boxes)),
        gt_classes=torch.tensor(classes),
        gt_masks=BitMasks(torch.rand(len(boxes), *size) > 0.5),
    )


def detector_cfg():
    """A Mask R-CNN's heads on C4."""
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 1
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 32
    cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE = "ROIAlignV2"
    cfg.MODEL.MASK_ON = True
    cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 16
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.01
    return cfg


# Anchors


def test_anchors_of_a_config():
    """Two sizes and three ratios at two places, 4 px apart; the first is centred at (0, 0)."""
    cfg = get_cfg()
    cfg.MODEL.ANCHOR_GENERATOR.NAME = "PyramidAnchorGenerator"
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16, 32]]
    cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS = [[0.25, 1, 4]]
    generator = build_anchor_generator(cfg, [ShapeSpec(stride=4)])
    assert type(generator) is fpn_ext.PyramidAnchorGenerator
    (anchors,) = generator([torch.zeros(2, 96, 1, 2)])
    half_sides = [(16, 4), (8, 8), (4, 16), (32, 8), (16, 16), (8, 32)]
    expected = [[x - w, -h, x + w, h] for x in (0, 4) for w, h in half_sides]
    assert anchors.tensor.tolist() == expected


def test_anchors_by_keyword_are_centred_on_cells():
    """Flat lists, no offset: half a stride, as Detectron2's."""
    keywords = {"sizes": [16, 32], "aspect_ratios": [0.25, 1, 4], "strides": [4]}
    features = [torch.zeros(2, 96, 2, 3)]
    (ours,) = fpn_ext.PyramidAnchorGenerator(**keywords)(features)
    (theirs,) = DefaultAnchorGenerator(**keywords)(features)
    assert torch.equal(ours.tensor, theirs.tensor)
    assert ours.tensor[1].tolist() == [-6, -6, 10, 10]  # 16 px around (2, 2)


# Pooler


def pooled_by(pooler):
    """(24, 4, 14, 14): boxes all over two maps of stride 16."""
    generator = torch.Generator().manual_seed(0)
    maps = [20 * torch.rand(2, 4, 10, 8, generator=generator) - 10]
    sides = torch.tensor([128.0, 160.0])
    corners = torch.rand(24, 2, 2, generator=generator) * sides
    boxes = torch.cat([corners.amin(dim=1), corners.amax(dim=1)], dim=1)
    return pooler(maps, [Boxes(boxes[:12]), Boxes(boxes[12:])])


POOLER = {"output_size": 14, "scales": (1 / 16,), "sampling_ratio": 0, "pooler_type": "ROIAlignV2"}


def test_the_pooler_by_keyword_is_detectron2s_to_the_bit():
    ours = pooled_by(fpn_ext.LevelMappedROIPooler(**POOLER))
    assert ours.shape == (24, 4, 14, 14)
    assert torch.equal(ours, pooled_by(ROIPooler(**POOLER)))


@pytest.mark.torchscript
def test_the_scripted_pooler_is_the_pooler_to_the_bit():
    pooler = fpn_ext.LevelMappedROIPooler(**POOLER)
    assert torch.equal(pooled_by(pooler), pooled_by(torch.jit.script(pooler)))


# RPN


def test_losses_and_proposals_of_the_rpn():
    """On Detectron2's default backbone, C4; the same random weights, the same sampling."""
    cfg = get_cfg()
    shapes = build_backbone(cfg).output_shape()
    images, features = two_images(), c4_maps()
    instances = [
        truth((25, 30), [[1.0, 1, 9, 12]], [0]),
        truth((40, 60), [[2.0, 2, 30, 25]], [0]),
    ]
    results = []
    for name in ("PyramidRPN", "RPN"):
        torch.manual_seed(3)
        cfg.MODEL.PROPOSAL_GENERATOR.NAME = name
        generator = build_proposal_generator(cfg, shapes)
        with EventStorage():
            results.append(generator(images, features, instances))
    assert type(generator) is RPN
    (ours, our_losses), (theirs, their_losses) = results
    assert set(our_losses) == {"loss_rpn_cls", "loss_rpn_loc"} and our_losses == their_losses
    for a, b, size in zip(ours, theirs, images.image_sizes, strict=True):
        assert a.image_size == size and len(a) > 0
        assert set(a.get_fields()) == {"proposal_boxes", "objectness_logits"}
        assert torch.equal(a.proposal_boxes.tensor, b.proposal_boxes.tensor)
        assert torch.equal(a.objectness_logits, b.objectness_logits)


@pytest.mark.torchscript
def test_the_scripted_rpn_gives_the_same_proposals():
    cfg = get_cfg()
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "PyramidRPN"
    generator = build_proposal_generator(cfg, C4).eval()
    fields = {"proposal_boxes": Boxes, "objectness_logits": torch.Tensor}
    scripted = detectron2_scripting().scripting_with_instances(generator, fields)
    images, features = two_images(), c4_maps()
    for a, b in zip(generator(images, features)[0], scripted(images, features)[0], strict=True):
        assert a.image_size == b.image_size
        assert torch.equal(a.proposal_boxes.tensor, b.proposal_boxes.tensor)
        assert torch.equal(a.objectness_logits, b.objectness_logits)


# RoI heads


def test_losses_of_the_roi_heads():
    cfg, images, features = detector_cfg(), two_images(), c4_maps()
    instances = [
        truth((25, 30), [[1.0, 1, 9, 12], [2, 2, 16, 6]], [2, 1]),
        truth((40, 60), [[1.0, 5, 32, 38], [7, 3, 50, 25]], [1, 2]),
    ]
    proposals = [Instances(i.image_size, proposal_boxes=i.gt_boxes) for i in instances]
    for candidates in proposals:
        candidates.objectness_logits = torch.zeros(len(candidates))
    results = []
    for heads in (fpn_ext.PyramidROIHeads, StandardROIHeads):
        torch.manual_seed(3)
        built = heads(cfg, C4)
        with EventStorage():
            results.append(built(images, features, proposals, instances)[1])
    ours, theirs = results
    assert set(ours) == {"loss_cls", "loss_box_reg", "loss_mask"} == set(theirs)
    for name, loss in ours.items():
        torch.testing.assert_close(loss, theirs[name], rtol=1e-5, atol=1e-8)


@pytest.mark.torchscript
def test_the_scripted_roi_heads_give_the_same_detections():
    scripting = detectron2_scripting()
    cfg, images, features = detector_cfg(), two_images(), c4_maps()
    heads = fpn_ext.PyramidROIHeads(cfg, C4).eval()
    boxes = torch.tensor([[1.0, 1, 9, 12], [2, 2, 25, 20]])
    proposals = [
        Instances(size, proposal_boxes=Boxes(boxes), objectness_logits=torch.zeros(2))
        for size in images.image_sizes
    ]
    with torch.no_grad():
        eager, _ = heads(images, features, proposals)
    fields = {name: torch.Tensor for name in ("objectness_logits", "pred_classes", "scores")}
    fields |= {"proposal_boxes": Boxes, "pred_boxes": Boxes, "pred_masks": torch.Tensor}
    with scripting.freeze_training_mode(heads), scripting.patch_instances(fields) as scripted_type:
        scripted = torch.jit.script(heads)
        given = [scripted_type.from_instances(candidates) for candidates in proposals]
        with torch.no_grad():
            made, _ = scripted(images, features, given)
        for a, b in zip(eager, made, strict=True):
            assert len(a) > 0 and torch.equal(a.pred_classes, b.pred_classes)
            torch.testing.assert_close(a.pred_boxes.tensor, b.pred_boxes.tensor)
            torch.testing.assert_close(a.scores, b.scores)
            torch.testing.assert_close(a.pred_masks, b.pred_masks)


# All of them


@pytest.mark.parametrize(
    "heads", ["PyramidROIHeads", "ChunkedROIHeads", "UnsharedROIHeads", "AllLevelsROIHeads"]
)
@pytest.mark.parametrize("backbone", ["FeaturePyramid", "BiFPN"])
def test_names_swapped_in_a_config_of_detectron2s(backbone, heads):
    """Missing keys get the documented defaults."""
    found = []
    for make in (get_cfg, fpn_ext.get_cfg):
        cfg = make()
        assert ("FPN_EXT" in cfg.MODEL) == (make is fpn_ext.get_cfg)
        cfg.MODEL.DEVICE = "cpu"
        cfg.MODEL.RESNETS.DEPTH = 18
        cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
        cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
        cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
        cfg.MODEL.FPN.OUT_CHANNELS = 8
        cfg.MODEL.BACKBONE.NAME = backbone
        cfg.MODEL.ANCHOR_GENERATOR.NAME = "PyramidAnchorGenerator"
        cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
        cfg.MODEL.PROPOSAL_GENERATOR.NAME = "PyramidRPN"
        cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
        cfg.MODEL.ROI_HEADS.NAME = heads
        cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
        cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
        cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
        cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 1
        cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 16
        cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE = "ROIAlignV2"
        torch.manual_seed(0)
        model = build_model(cfg).eval()
        with torch.no_grad():
            (output,) = model([{"image": torch.full((3, 64, 96), 100.0)}])
        found.append(output["instances"])
    without, with_keys = found
    assert len(without) > 0 and set(without.get_fields()) == set(with_keys.get_fields())
    assert torch.equal(without.pred_boxes.tensor, with_keys.pred_boxes.tensor)
    assert torch.equal(without.scores, with_keys.scores)


def test_the_level_table_of_a_config_of_detectron2s():
    cfg = get_cfg()
    cfg.MODEL.ROI_HEADS.NAME = "PyramidROIHeads"
    cfg.MODEL.ROI_HEADS.IN_FEATURES = cfg.MODEL.RPN.IN_FEATURES = ["p3", "p4"]
    table = [line.split() for line in fpn_ext.level_table(cfg).splitlines()]
    assert table[1][-3:] == ["0", "to", "224"] and table[2][-3:] == ["224", "and", "more"]
