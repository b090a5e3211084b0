"""All 16 combinations of our and Detectron2's components are the same model.

Same weights, same images, same random samples: losses, gradients and detections are compared with
those of the model made of Detectron2's components alone. The operations are the same, and so is
every bit.
"""

import itertools

import fpn_ext
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

COMPONENTS = {  # part: (ours, Detectron2's)
    "backbone": ("FeaturePyramid", "build_resnet_fpn_backbone"),
    "anchors": ("PyramidAnchorGenerator", "DefaultAnchorGenerator"),
    "proposals": ("PyramidRPN", "RPN"),
    "roi_heads": ("PyramidROIHeads", "StandardROIHeads"),
}
PARTS = ("BACKBONE", "ANCHOR_GENERATOR", "PROPOSAL_GENERATOR", "ROI_HEADS")
MATRIX = list(itertools.product(*COMPONENTS.values()))
CONTROL = tuple(theirs for _, theirs in COMPONENTS.values())


def build(cfg, names, state_dict=None):
    cfg = cfg.clone()
    for part, name in zip(PARTS, names, strict=True):
        cfg.MODEL[part].NAME = name
    model = build_model(cfg)
    if state_dict is not None:
        model.load_state_dict(state_dict)  # strict: no key missing or left over
    return model


def weights_of_control(cfg):
    """Random weights, scaled so that proposals and scores differ from each other."""
    torch.manual_seed(3)
    state = build(cfg, CONTROL).state_dict()
    for name, tensor in state.items():
        if "predictor" in name or "rpn_head" in name or "logits" in name:
            tensor.mul_(10)
    return state


def images_with_objects(cfg):
    torch.manual_seed(4)
    batch = []
    for height, width, sides in ((160, 192, (20, 60, 120)), (128, 224, (30, 90))):
        truth = Instances((height, width))
        truth.gt_boxes = Boxes(torch.tensor([[4.0, 6.0, 4.0 + s, 6.0 + s] for s in sides]))
        truth.gt_classes = torch.arange(len(sides)) % cfg.MODEL.ROI_HEADS.NUM_CLASSES
        image = torch.rand(3, height, width) * 255
        batch.append({"image": image, "height": height, "width": width, "instances": truth})
    return batch


def losses_and_gradients(model, batch):
    model.train()
    torch.manual_seed(5)  # the samples that RPN and RoI heads draw
    with EventStorage():
        losses = model(batch)
    sum(losses.values()).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return losses, gradients


def detections(model, batch):
    model.eval()
    with torch.no_grad():
        return [out["instances"] for out in model(batch)]


@pytest.fixture
def cfg(small_cfg):
    small_cfg.MODEL.BACKBONE.FREEZE_AT = 0
    small_cfg.MODEL.FPN_EXT.POOLER_IMPLEMENTATION = "per_level"
    small_cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = 300
    small_cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 300
    return small_cfg


@pytest.mark.parametrize("names", MATRIX, ids=" ".join)
def test_same_losses_gradients_and_detections(cfg, names):
    weights, batch = weights_of_control(cfg), images_with_objects(cfg)
    control, model = build(cfg, CONTROL, weights), build(cfg, names, weights)

    for theirs, ours in zip(detections(control, batch), detections(model, batch), strict=True):
        assert len(ours) == len(theirs) > 10
        assert torch.equal(ours.pred_boxes.tensor, theirs.pred_boxes.tensor)
        assert torch.equal(ours.scores, theirs.scores)
        assert torch.equal(ours.pred_classes, theirs.pred_classes)

    their_losses, their_gradients = losses_and_gradients(control, batch)
    our_losses, our_gradients = losses_and_gradients(model, batch)
    assert {n: v.item() for n, v in our_losses.items()} == {
        n: v.item() for n, v in their_losses.items()
    }
    assert our_gradients.keys() == their_gradients.keys()
    for name, gradient in our_gradients.items():
        assert gradient.abs().max() > 0, f"{name} takes no part"
        assert torch.equal(gradient, their_gradients[name]), name


@pytest.mark.parametrize("names", MATRIX, ids=" ".join)
def test_same_masks_and_keypoints(cfg, names):
    cfg.MODEL.MASK_ON = cfg.MODEL.KEYPOINT_ON = True
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 1
    cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 8
    cfg.MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS = [8]
    weights, batch = weights_of_control(cfg), images_with_objects(cfg)[:1]
    (theirs,) = detections(build(cfg, CONTROL, weights), batch)
    (ours,) = detections(build(cfg, names, weights), batch)
    assert len(ours) > 10
    assert torch.equal(ours.pred_masks, theirs.pred_masks)
    assert torch.equal(ours.pred_keypoints, theirs.pred_keypoints)


def paired(ours, theirs):
    """Their detections in the order of ours, where scores that are equal to rounding differ in it.

    Each is paired with the nearest box of its class, one to one.
    """
    places = [
        torch.cat([found.pred_boxes.tensor, 1e6 * found.pred_classes[:, None]], dim=1).double()
        for found in (ours, theirs)
    ]
    nearest = torch.cdist(*places, p=float("inf")).argmin(dim=1)
    assert sorted(nearest.tolist()) == list(range(len(theirs)))
    return theirs[nearest]


def test_the_fast_pooler_trains_and_detects_the_same_to_rounding(cfg):
    """The same sums in a different order. Compared on the same samples and proposals."""
    weights, batch = weights_of_control(cfg), images_with_objects(cfg)
    control = build(cfg, CONTROL, weights)
    cfg.MODEL.FPN_EXT.POOLER_IMPLEMENTATION = "weighted_rows"
    fast = build(cfg, MATRIX[0], weights)
    for theirs, ours in zip(detections(control, batch), detections(fast, batch), strict=True):
        theirs = paired(ours, theirs)
        assert torch.equal(ours.pred_classes, theirs.pred_classes)
        torch.testing.assert_close(ours.scores, theirs.scores, rtol=0, atol=1e-5)
        torch.testing.assert_close(
            ours.pred_boxes.tensor, theirs.pred_boxes.tensor, rtol=0, atol=1e-3
        )
    their_losses, their_gradients = losses_and_gradients(control, batch)
    our_losses, our_gradients = losses_and_gradients(fast, batch)
    for name, loss in our_losses.items():
        torch.testing.assert_close(loss, their_losses[name], rtol=1e-6, atol=0)
    for name, gradient in our_gradients.items():
        scale = their_gradients[name].abs().max().item()
        torch.testing.assert_close(
            gradient, their_gradients[name], rtol=0, atol=1e-4 * scale, msg=name
        )


@pytest.mark.parametrize("pooler_type", ["ROIAlign", "ROIPool"])
def test_same_detections_with_other_poolers(cfg, pooler_type):
    cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE = pooler_type
    weights, batch = weights_of_control(cfg), images_with_objects(cfg)
    ours = detections(build(cfg, MATRIX[0], weights), batch)
    for a, b in zip(ours, detections(build(cfg, CONTROL, weights), batch), strict=True):
        assert torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)


def test_an_rpn_alone(cfg):
    cfg.MODEL.META_ARCHITECTURE = "ProposalNetwork"
    weights, batch = weights_of_control(cfg), images_with_objects(cfg)
    results = []
    for names in (MATRIX[0], CONTROL):
        model = build(cfg, names, weights).eval()
        with torch.no_grad():
            results.append([out["proposals"] for out in model(batch)])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours.objectness_logits, theirs.objectness_logits)
        assert in_order(ours) == in_order(theirs)


def in_order(proposals):
    """(score, box) of each; those of one score, whose order nothing defines, by their boxes."""
    boxes, scores = proposals.proposal_boxes.tensor.tolist(), proposals.objectness_logits.tolist()
    return sorted(zip(scores, boxes, strict=True), reverse=True)


def test_an_input_of_odd_size_direct(cfg):
    """Without padding Detectron2's pyramid fails; ours lands on each lateral's size."""
    model = build(cfg, MATRIX[0], weights_of_control(cfg)).eval()
    image = torch.rand(1, 3, 101, 133)
    with torch.no_grad():
        features = model.backbone(image)
    sizes = [tuple(f.shape[-2:]) for f in features.values()]
    assert sizes == [(26, 34), (13, 17), (7, 9), (4, 5), (2, 3)]
    control = build(cfg, CONTROL)
    with pytest.raises(RuntimeError, match="size of tensor"), torch.no_grad():
        control.backbone(image)


@pytest.mark.parametrize(
    "stem", ["faster_rcnn_R_50_FPN_1x", "faster_rcnn_R_101_FPN_3x", "mask_rcnn_R_50_FPN_1x"]
)
def test_a_model_zoo_checkpoint_has_our_keys_and_shapes(stem):
    """What Detectron2's own model of that name saves is what ours loads."""
    shapes = []
    for suffix in ("", "_builtin"):
        cfg = fpn_ext.load_config(f"configs/detectron2/{stem}{suffix}.yaml")
        cfg.MODEL.DEVICE = "cpu"
        shapes.append({k: v.shape for k, v in build_model(cfg).state_dict().items()})
    assert shapes[0] == shapes[1]
