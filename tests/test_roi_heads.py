import copy

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model, build_roi_heads
from detectron2.structures import Boxes, ImageList, Instances
from fpn_ext.modeling.level_rules import assign_levels
from fpn_ext.modeling.pooler import LevelMappedROIPooler
from fpn_ext.modeling.roi_heads import LevelKeepingOutputLayers, PyramidROIHeads
from scripting import detectron2_scripting

SHAPES = {f"p{k}": ShapeSpec(channels=32, stride=2**k) for k in range(2, 7)}


def maps(size=128):
    return {f"p{k}": torch.randn(1, 32, size // 2**k, size // 2**k) for k in range(2, 7)}


def test_every_branch_pools_by_the_level_rule(small_cfg):
    small_cfg.MODEL.MASK_ON = small_cfg.MODEL.KEYPOINT_ON = True
    small_cfg.MODEL.FPN_EXT.CANONICAL_BOX_SIZE = 100
    small_cfg.MODEL.FPN_EXT.CANONICAL_LEVEL = 3
    heads = build_roi_heads(small_cfg, SHAPES)
    assert isinstance(heads, PyramidROIHeads)
    for pooler, side in (
        (heads.box_pooler, 7),
        (heads.mask_pooler, 14),
        (heads.keypoint_pooler, 14),
    ):
        assert isinstance(pooler, LevelMappedROIPooler)
        assert pooler.output_size == (side, side)
        assert (pooler.canonical_box_size, pooler.canonical_level) == (100, 3)
        assert pooler.levels == [2, 3, 4, 5]  # P6 is not pooled from


def test_an_empty_pooler_type_hands_the_head_whole_maps(small_cfg):
    small_cfg.MODEL.MASK_ON = True
    small_cfg.MODEL.ROI_MASK_HEAD.POOLER_TYPE = ""
    small_cfg.MODEL.ROI_MASK_HEAD.NAME = "TestWholeMapHead"
    from detectron2.modeling import ROI_MASK_HEAD_REGISTRY

    seen = []
    if "TestWholeMapHead" not in ROI_MASK_HEAD_REGISTRY:

        @ROI_MASK_HEAD_REGISTRY.register()
        def TestWholeMapHead(cfg, input_shape):
            seen.append(input_shape)
            return torch.nn.Identity()

    assert build_roi_heads(small_cfg, SHAPES).mask_pooler is None
    assert list(seen[0]) == ["p2", "p3", "p4", "p5"]


def test_explicit_construction(small_cfg):
    """The explicit constructor: components, no config."""
    built = build_roi_heads(small_cfg, SHAPES)
    pooler = LevelMappedROIPooler(7, [1 / 4, 1 / 8], 0, "ROIAlignV2")
    heads = PyramidROIHeads(
        box_in_features=["p2", "p3"],
        box_pooler=pooler,
        box_head=built.box_head,
        box_predictor=LevelKeepingOutputLayers(
            small_cfg, built.box_head.output_shape, pooler=pooler
        ),
        num_classes=5,
        batch_size_per_image=16,
        positive_fraction=0.25,
        proposal_matcher=built.proposal_matcher,
    ).eval()
    proposals = Instances((128, 128))
    proposals.proposal_boxes = Boxes(torch.tensor([[0.0, 0, 20, 20], [0, 0, 120, 120]]))
    proposals.objectness_logits = torch.zeros(2)
    with torch.no_grad():
        (found,), losses = heads(
            ImageList(torch.zeros(1, 3, 128, 128), [(128, 128)]), maps(), [proposals]
        )
    assert losses == {}
    assert set(found.pooled_level.tolist()) == {2, 3}


def test_pooled_level_is_that_of_the_proposal(small_cfg):
    """Proposals stay where they are (no regression), so each detection names its proposal."""
    small_cfg.MODEL.FPN_EXT.KEEP_LEVELS = True
    small_cfg.TEST.DETECTIONS_PER_IMAGE = 1000
    small_cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST = 1.0
    heads = build_roi_heads(small_cfg, SHAPES).eval()
    heads.box_predictor.bbox_pred.weight.data.zero_()
    sides = torch.tensor([20.0, 120, 230, 460, 30, 450])
    proposals = Instances((512, 512))
    proposals.proposal_boxes = Boxes(torch.stack([0 * sides, 0 * sides, sides, sides], dim=1))
    proposals.objectness_logits = torch.zeros(6)
    with torch.no_grad():
        (found,), _ = heads(
            ImageList(torch.zeros(1, 3, 512, 512), [(512, 512)]), maps(512), [proposals]
        )
    assert len(found) == 6 * 5
    assert torch.equal(found.pooled_level, assign_levels(found.pred_boxes.tensor, 2, 5))
    assert set(found.pooled_level.tolist()) == {2, 3, 4, 5}


def test_keeping_the_level_changes_no_detection(small_cfg):
    small_cfg.MODEL.MASK_ON = True
    small_cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 8
    image = [{"image": torch.rand(3, 128, 160) * 255}]
    results = []
    for keep in (False, True):
        torch.manual_seed(1)
        small_cfg.MODEL.FPN_EXT.KEEP_LEVELS = keep
        model = build_model(small_cfg).eval()
        with torch.no_grad():
            results.append(model(image)[0]["instances"])
    without, with_level = results
    assert not without.has("pooled_level") and with_level.has("pooled_level")
    assert len(without) > 0
    assert torch.equal(without.pred_boxes.tensor, with_level.pred_boxes.tensor)
    assert torch.equal(without.pred_masks, with_level.pred_masks)


def test_a_batch_without_any_object_trains(small_cfg):
    small_cfg.MODEL.BACKBONE.FREEZE_AT = 0
    model = build_model(small_cfg).train()
    empty = Instances((96, 96), gt_boxes=Boxes(torch.zeros(0, 4)), gt_classes=torch.zeros(0).long())
    from detectron2.utils.events import EventStorage

    with EventStorage():
        losses = model([{"image": torch.rand(3, 96, 96) * 255, "instances": empty}] * 2)
    assert all(torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


def test_a_wrong_pooler_names_its_branch(small_cfg):
    small_cfg.MODEL.MASK_ON = True
    small_cfg.MODEL.ROI_MASK_HEAD.POOLER_TYPE = "RoiAlign"
    with pytest.raises(ValueError, match=r"MODEL\.ROI_MASK_HEAD: POOLER_TYPE: 'RoiAlign'"):
        build_roi_heads(small_cfg, SHAPES)


@pytest.mark.torchscript
def test_torchscript_of_the_whole_model(small_cfg):
    """By Detectron2's own recipe for scripting a model with Instances."""
    scripting = detectron2_scripting()
    small_cfg.MODEL.FPN_EXT.POOLER_IMPLEMENTATION = "per_level"  # what a scripted pooler does
    model = build_model(small_cfg).eval()
    fields = {
        "proposal_boxes": Boxes,
        "objectness_logits": torch.Tensor,
        "pred_boxes": Boxes,
        "scores": torch.Tensor,
        "pred_classes": torch.Tensor,
    }
    scripted = scripting.scripting_with_instances(copy.deepcopy(model), fields)
    inputs = [{"image": torch.rand(3, 128, 160) * 255}]
    with torch.no_grad():
        eager = model.inference(inputs, do_postprocess=False)[0]
        compiled = scripted.inference(inputs, do_postprocess=False)[0]
    assert len(eager) > 10
    assert torch.equal(eager.pred_boxes.tensor, compiled.pred_boxes.tensor)
    assert torch.equal(eager.scores, compiled.scores)


def test_a_map_the_backbone_does_not_give(small_cfg):
    small_cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p7"]
    with pytest.raises(ValueError, match=r"ROI_HEADS\.IN_FEATURES asks for \['p7'\].*'p6'"):
        build_roi_heads(small_cfg, SHAPES)


def test_no_map_at_all(small_cfg):
    small_cfg.MODEL.ROI_HEADS.IN_FEATURES = []
    with pytest.raises(ValueError, match=r"ROI_HEADS\.IN_FEATURES asks for no map"):
        build_roi_heads(small_cfg, SHAPES)


def test_maps_of_different_widths(small_cfg):
    shapes = {**SHAPES, "p3": ShapeSpec(channels=64, stride=8)}
    with pytest.raises(ValueError, match=r"same number of channels, got .*'p3': 64"):
        build_roi_heads(small_cfg, shapes)
