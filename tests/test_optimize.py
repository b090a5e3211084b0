"""optimize_for_inference: the same detections from a different module tree."""

import copy
import os
import subprocess
import sys

import fpn_ext
import pytest
import torch
from fpn_ext import optimize_for_inference
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock
from detectron2.structures import Boxes, ImageList, Instances
from fpn_ext.kernels import compiled, winograd
from fpn_ext.modeling.roi_heads import ChunkedROIHeads
from fpn_ext.speed.layers import CompiledWinograd, Rows
from fpn_ext.speed.residuals import ResidualBlock
from torch import nn

BUILTIN = {
    "BACKBONE": "build_resnet_fpn_backbone",
    "ANCHOR_GENERATOR": "DefaultAnchorGenerator",
    "PROPOSAL_GENERATOR": "RPN",
    "ROI_HEADS": "StandardROIHeads",
}


@pytest.fixture(autouse=True)
def winograd_for_small_networks(monkeypatch):
    monkeypatch.setattr(winograd, "FEWEST_CHANNELS", 32)
    monkeypatch.setattr(winograd, "SMALLEST_MAP", 128)


@pytest.fixture
def cfg(small_cfg):
    small_cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 200
    return small_cfg


def model_of(cfg):
    """Random weights scaled so that scores differ, norms with statistics of their own."""
    model = build_model(cfg).eval()
    for name, tensor in model.state_dict().items():
        if "predictor" in name or "rpn_head" in name:
            tensor.mul_(10)
        if "running_mean" in name:
            tensor.normal_(0, 0.1)
        if "running_var" in name:
            tensor.uniform_(1.5, 2.5)
        if "norm.weight" in name:
            tensor.uniform_(0.8, 1.2)
    return model


def images():
    return [{"image": torch.rand(3, h, w) * 255} for h, w in ((160, 192), (128, 224))]


def assert_same_stages(model, optimised, tolerance=2e-5):
    """Every stage on the same inputs."""
    with torch.no_grad():
        batch = ImageList.from_tensors([image["image"] - 128 for image in images()], 32)
        expected = model.backbone(batch.tensor)
        found = optimised.backbone(batch.tensor)
        for name, features in expected.items():
            scale = features.abs().max().item()
            assert found[name].is_contiguous(memory_format=torch.channels_last), name
            torch.testing.assert_close(found[name], features, rtol=0, atol=tolerance * scale)

        features = {k: v.contiguous(memory_format=torch.channels_last) for k, v in expected.items()}
        proposals, _ = model.proposal_generator(batch, expected)
        ours, _ = optimised.proposal_generator(batch, features)
        for a, b in zip(ours, proposals, strict=True):
            assert_same_boxes(a.proposal_boxes, b.proposal_boxes, tolerance=0.01)
        if not hasattr(model, "roi_heads"):
            return
        detections, _ = model.roi_heads(batch, expected, proposals)
        ours, _ = optimised.roi_heads(batch, features, proposals)
        for a, b in zip(ours, detections, strict=True):
            assert_same_boxes(a.pred_boxes, b.pred_boxes, tolerance=1e-3)
            torch.testing.assert_close(a.scores, b.scores, rtol=0, atol=1e-5)


def assert_same_boxes(found, expected, tolerance):
    """Box by box in the same order, except for pairs whose scores are equal up to rounding."""
    assert len(found) == len(expected) > 10
    distance = (found.tensor[:, None] - expected.tensor).abs().amax(dim=2)
    assert (distance.diagonal() <= tolerance).float().mean() >= 0.9
    assert (distance.amin(dim=1) <= tolerance).float().mean() >= 0.98


@pytest.mark.parametrize("depth, width", [(18, 64), (50, 256)])
@pytest.mark.parametrize("norm", ["FrozenBN", "BN", "GN"])
@pytest.mark.parametrize("components", ["ours", "builtin"])
def test_same_results_stage_by_stage(cfg, depth, width, norm, components):
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = depth, width
    cfg.MODEL.RESNETS.NORM = norm
    if components == "builtin":
        for part, name in BUILTIN.items():
            cfg.MODEL[part].NAME = name
    model = model_of(cfg)
    # Group norms divide by deviations that are small here, which enlarges what rounding does.
    tolerance = 1e-4 if norm == "GN" else 2e-5
    assert_same_stages(model, optimize_for_inference(model), tolerance)


def test_masks_and_pooled_levels(cfg):
    cfg.MODEL.MASK_ON = True
    cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 8
    cfg.MODEL.FPN_EXT.KEEP_LEVELS = True
    model = model_of(cfg)
    optimised = optimize_for_inference(model)
    assert_same_stages(model, optimised)
    batch = images()
    with torch.no_grad():
        for a, b in zip(optimised(batch), model(batch), strict=True):
            found, expected = a["instances"], b["instances"]
            assert found.has("pooled_level")
            same = (found.pred_boxes.tensor - expected.pred_boxes.tensor).abs().amax(dim=1) < 0.1
            assert same.sum() > 10
            differ = found.pred_masks[same] != expected.pred_masks[same]
            assert differ.float().mean() < 1e-3


def test_proposals_alone(cfg):
    cfg.MODEL.META_ARCHITECTURE = "ProposalNetwork"
    model = model_of(cfg)
    assert_same_stages(model, optimize_for_inference(model))


def test_a_head_of_convolutions(cfg):
    cfg.MODEL.ROI_BOX_HEAD.NUM_CONV, cfg.MODEL.ROI_BOX_HEAD.CONV_DIM = 1, 32
    cfg.MODEL.ROI_BOX_HEAD.NORM = "BN"
    model = model_of(cfg)
    assert_same_stages(model, optimize_for_inference(model))


def test_it_does_what_it_says(cfg):
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 50, 256
    optimised = optimize_for_inference(model_of(cfg))
    modules = list(optimised.modules())
    assert not any(isinstance(m, FrozenBatchNorm2d | BottleneckBlock | BasicBlock) for m in modules)
    assert sum(isinstance(m, ResidualBlock) for m in modules) == 3 + 4 + 6 + 3
    # A 3x3 in each residual block (this ResNet halves in the 1x1), 4 of the pyramid, the RPN's.
    quick = [m for m in modules if isinstance(m, CompiledWinograd)]
    if compiled.kernels():
        assert len(quick) == (3 + 4 + 6 + 3) + 4 + 1
        assert sum(m.relu for m in quick) == (3 + 4 + 6 + 3) + 1, "all but the pyramid's"
        assert all(m in quick for m in optimised.backbone.outputs)
    else:
        assert not quick
    assert isinstance(optimised.roi_heads, ChunkedROIHeads)
    first, *others = optimised.roi_heads.box_head
    assert isinstance(first, Rows) and all(layer.relu for layer in others)


def test_the_model_is_left_as_it_was(cfg):
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    model = model_of(cfg).train()
    before = copy.deepcopy(model.state_dict())
    modes = {name: module.training for name, module in model.named_modules()}
    optimised = optimize_for_inference(model)
    assert not optimised.training
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.requires_grad for p in model.backbone.parameters())


def test_what_a_stage_was_given_is_not_overwritten(cfg, monkeypatch):
    """The first block of a stage reads an output of the network, in res2 without a shortcut."""
    monkeypatch.setattr(winograd, "FEWEST_CHANNELS", 10**6)  # its sums are not in place
    cfg.MODEL.RESNETS.OUT_FEATURES = ["stem", "res2", "res3", "res4", "res5"]
    model = model_of(cfg)
    optimised = optimize_for_inference(model)
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected, found = model.backbone.bottom_up(image), optimised.backbone.bottom_up(image)
    for name in expected:
        assert found[name].is_contiguous(memory_format=torch.channels_last), name
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=2e-5 * scale)


def test_bfloat16(cfg):
    """Within what such arithmetic gives: maps to 2 %, and float32 where decisions are made."""
    model = model_of(cfg)
    optimised = optimize_for_inference(model, dtype=torch.bfloat16)
    with torch.no_grad():
        tensor = model.preprocess_image(images()).tensor
        expected, found = model.backbone(tensor), optimised.backbone(tensor)
        for name, features in expected.items():
            assert found[name].dtype == torch.bfloat16
            error = (found[name] - features).norm() / features.norm()
            assert error < 0.02, name
        for out in optimised(images()):
            detections = out["instances"]
            assert len(detections) > 10
            assert detections.pred_boxes.tensor.dtype == detections.scores.dtype == torch.float32


BFLOAT16_ALONE = """
import logging, sys, torch
import fpn_ext
from fpn_ext.speed.residuals import has_bfloat16_convolutions
from detectron2.modeling import build_model
records = []
logger = logging.getLogger("fpn_ext.speed.optimize")
logger.addHandler(handler := logging.Handler())
handler.emit = lambda record: records.append(record.getMessage())
cfg = fpn_ext.get_cfg()
cfg.MODEL.DEVICE, cfg.MODEL.META_ARCHITECTURE = "cpu", "ProposalNetwork"
cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.FREEZE_AT = "FeaturePyramid", 0
cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
cfg.MODEL.FPN_EXT.LEVELS, cfg.MODEL.FPN.OUT_CHANNELS = ["p2", "p3", "p4", "p5", "p6"], 16
fpn_ext.resolve_levels(cfg)
torch.manual_seed(0)
model = build_model(cfg).eval()
optimised = [fpn_ext.optimize_for_inference(model, torch.bfloat16) for _ in range(2)][0]
image = torch.randn(1, 3, 64, 96)
with torch.no_grad():
    expected, found = model.backbone(image), optimised.backbone(image)
for name, features in expected.items():
    assert found[name].dtype == torch.bfloat16
    assert (found[name] - features).norm() / features.norm() < 0.02, name
said = [text for text in records if "no bfloat16 convolutions" in text]
assert len(said) == (0 if has_bfloat16_convolutions() else 1), records
print("bfloat16", has_bfloat16_convolutions())
"""


def test_bfloat16_where_the_processor_has_none():
    """As on any processor without AVX-512: oneDNN refuses bfloat16 there; one warning says so."""
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, "-c", BFLOAT16_ALONE], env=environment, text=True, capture_output=True
    )
    assert process.returncode == 0, process.stderr[-2000:]
    assert process.stdout.split()[-2:] == ["bfloat16", "False"]


@pytest.mark.parametrize("mask_on", [False, True])
def test_bfloat16_with_detectron2s_components(cfg, mask_on):
    for part, name in BUILTIN.items():
        cfg.MODEL[part].NAME = name
    cfg.MODEL.MASK_ON = mask_on
    cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 8
    optimised = optimize_for_inference(model_of(cfg), dtype=torch.bfloat16)
    with torch.no_grad():
        assert all(len(out["instances"]) > 10 for out in optimised(images()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["precomputed proposals", "cascade", "C4"])
def test_other_models(cfg, kind, dtype):
    if kind == "precomputed proposals":
        cfg.MODEL.PROPOSAL_GENERATOR.NAME = "PrecomputedProposals"
    elif kind == "cascade":
        cfg.MODEL.ROI_HEADS.NAME = "CascadeROIHeads"
        cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = True
    else:
        cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 50, 256
        cfg.MODEL.RESNETS.OUT_FEATURES = ["res4"]
        cfg.MODEL.BACKBONE.NAME, cfg.MODEL.ROI_HEADS.NAME = "build_resnet_backbone", "Res5ROIHeads"
        cfg.MODEL.RPN.IN_FEATURES = cfg.MODEL.ROI_HEADS.IN_FEATURES = ["res4"]
        cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32, 64, 128]]
        cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 50  # all pass res5
    model = model_of(cfg)
    if kind == "C4" and dtype == torch.bfloat16:
        with pytest.raises(ValueError, match=r"MODEL\.ROI_HEADS\.NAME .* got Res5ROIHeads"):
            optimize_for_inference(model, dtype)
        return
    optimised = optimize_for_inference(model, dtype)
    batch = images()
    for image in batch:
        size = tuple(image["image"].shape[1:])
        corners = 100 * torch.rand(30, 2)
        boxes = Boxes(torch.cat([corners, corners + 20], dim=1))
        image["proposals"] = Instances(size, proposal_boxes=boxes, objectness_logits=corners[:, 0])
    with torch.no_grad():
        for a, b in zip(optimised(batch), model(batch), strict=True):
            found, expected = a["instances"].scores, b["instances"].scores
            assert len(found) == len(expected) > 10
            tolerance = 1e-3 if dtype == torch.float32 else 0.1
            torch.testing.assert_close(found[:10], expected[:10], rtol=0, atol=tolerance)


def test_it_can_be_copied_and_refuses_training(cfg):
    optimised = optimize_for_inference(model_of(cfg))
    again = copy.deepcopy(optimised)
    batch = images()
    with torch.no_grad():
        for a, b in zip(again(batch), optimised.eval()(batch), strict=True):
            assert torch.equal(a["instances"].scores, b["instances"].scores)
    with pytest.raises(RuntimeError, match="cannot be trained"):
        optimised.train()(batch)


@pytest.mark.parametrize("boxes_per_chunk", [1, 7, 1000])
def test_chunks(cfg, boxes_per_chunk):
    model = model_of(cfg)
    cfg.MODEL.ROI_HEADS.NAME = "ChunkedROIHeads"
    cfg.MODEL.FPN_EXT.BOXES_PER_CHUNK = boxes_per_chunk
    chunked = build_model(cfg).eval()
    chunked.load_state_dict(model.state_dict())
    counts = []
    chunked.roi_heads.box_head.register_forward_hook(lambda m, i, out: counts.append(len(out)))
    with torch.no_grad():
        for a, b in zip(chunked(images_of(1)), model(images_of(1)), strict=True):
            torch.testing.assert_close(a["instances"].scores, b["instances"].scores)
    assert max(counts) <= boxes_per_chunk and sum(counts) > 100


def images_of(seed):
    torch.manual_seed(seed)
    return images()


def test_it_is_optimized_once(cfg):
    optimized = optimize_for_inference(build_model(cfg))
    for model in (optimized, copy.deepcopy(optimized)):
        with pytest.raises(ValueError, match="optimize_for_inference: optimise the model"):
            optimize_for_inference(model)


def test_torch_export_of_it_is_refused(cfg):
    optimized = optimize_for_inference(build_model(cfg))
    inputs = [{"image": torch.zeros(3, 64, 64)}]
    with pytest.raises(RuntimeError, match=r"cannot be exported: export the model it was made"):
        torch.export.export(optimized, (inputs,), strict=False)


def test_chunks_train_as_one(cfg):
    from detectron2.utils.events import EventStorage

    cfg.MODEL.ROI_HEADS.NAME = "ChunkedROIHeads"
    cfg.MODEL.FPN_EXT.BOXES_PER_CHUNK = 5
    truth = Instances((160, 192))
    truth.gt_boxes, truth.gt_classes = Boxes(torch.tensor([[8.0, 8, 90, 99]])), torch.tensor([1])
    with EventStorage():
        losses = build_model(cfg).train()([{**images()[0], "instances": truth}])
    assert set(losses) == {"loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"}


@pytest.mark.parametrize("heads", ["PyramidROIHeads", "ChunkedROIHeads"])
def test_no_proposals(cfg, heads):
    cfg.MODEL.ROI_HEADS.NAME = heads
    roi_heads = model_of(cfg).roi_heads
    features = {f"p{k}": torch.rand(1, 32, 128 >> k, 128 >> k) for k in range(2, 7)}
    none = Instances((128, 128), proposal_boxes=Boxes(torch.zeros(0, 4)))
    with torch.no_grad():
        (found,), _ = roi_heads(None, features, [none])
    assert len(found) == 0


def test_wrong_arguments(cfg):
    with pytest.raises(TypeError, match=r"META_ARCHITECTURE.*Linear"):
        optimize_for_inference(nn.Linear(1, 1))
    model = build_model(cfg)
    with pytest.raises(ValueError, match="int8"):
        optimize_for_inference(model, dtype=torch.int8)
    with pytest.raises(ValueError, match="float16 needs a GPU"):
        optimize_for_inference(model, dtype=torch.float16)
    with pytest.raises(ValueError, match="cuda_graphs needs a model on a GPU"):
        optimize_for_inference(model, cuda_graphs=True)
    with pytest.raises(ValueError, match="BOXES_PER_CHUNK"):
        optimize_for_inference(model, boxes_per_chunk=0)


@pytest.mark.parametrize("norm", ["", "GN"])
@pytest.mark.parametrize("fuse_type", ["sum", "avg"])
def test_pyramid_and_heads_compile_without_graph_breaks(cfg, norm, fuse_type):
    """In one graph each, which is what torch.compile and torch.export need."""
    cfg.MODEL.FPN.NORM, cfg.MODEL.FPN.FUSE_TYPE = norm, fuse_type
    model = model_of(cfg)
    image = torch.randn(1, 3, 64, 96)
    pooled = torch.randn(3, 32, 7, 7)
    with torch.no_grad():
        features = model.backbone(image)
        maps = list(features.values())
        for module, argument in (
            (model.backbone, image),
            (model.proposal_generator.rpn_head, maps),
            (model.roi_heads.box_head, pooled),
        ):
            torch._dynamo.reset()
            compiled = torch.compile(module, fullgraph=True, backend="eager")
            expected, found = module(argument), compiled(argument)
            flat = torch.utils._pytree.tree_leaves
            for a, b in zip(flat(found), flat(expected), strict=True):
                torch.testing.assert_close(a, b)
    torch._dynamo.reset()


def test_it_is_exported():
    assert "optimize_for_inference" in fpn_ext.__all__
