"""The components on a GPU, against the CPU. Skipped without a GPU.

On a machine with one: make test, or python -m pytest tests/test_cuda.py
"""

import itertools

import pytest
import torch
from fpn_ext import optimize_for_inference
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from fpn_ext.engine.ema import AveragedWeights
from fpn_ext.engine.nonfinite import NonFiniteGuard
from fpn_ext.engine.steps import MicroBatchTrainer
from fpn_ext.engine.validation_loss import validation_loss
from fpn_ext.files.checkpoint import SafeCheckpointer
from fpn_ext.modeling.anchors import PyramidAnchorGenerator
from fpn_ext.modeling.pooler import POOLER_TYPES, LevelMappedROIPooler

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SCALES = [1 / 4, 1 / 8, 1 / 16, 1 / 32]


def maps(dtype=torch.float32):
    return [torch.randn(2, 8, 256 // s, 256 // s).to(dtype) for s in (4, 8, 16, 32)]


def boxes():
    side = 4 * 64 ** torch.rand(80, 2)
    corner = torch.rand(80, 2) * 200
    together = torch.cat([corner, corner + side], dim=1)
    together[3, 0] = float("nan")
    return [Boxes(together[:50]), Boxes(together[50:])]


@pytest.mark.parametrize("pooler_type", POOLER_TYPES)
@pytest.mark.parametrize("implementation", ["per_level", "auto"])
def test_pooler(pooler_type, implementation):
    """auto: another implementation on the CPU than on the GPU (tests/test_fused_roi_align.py)."""
    pool = LevelMappedROIPooler(7, SCALES, 0, pooler_type, implementation=implementation)
    features, box_lists = [f.requires_grad_() for f in maps()], boxes()
    expected = pool(features, box_lists)
    weights = torch.randn_like(expected)
    gradients = torch.autograd.grad((expected * weights).sum(), features)
    on_gpu = [f.detach().cuda().requires_grad_() for f in features]
    found = pool(on_gpu, [b.to("cuda") for b in box_lists])
    assert found.is_cuda and not found[3].any()
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-4)
    for gradient, reference in zip(
        torch.autograd.grad((found * weights.cuda()).sum(), on_gpu), gradients, strict=True
    ):
        scale = max(1.0, reference.abs().max().item())
        torch.testing.assert_close(gradient.cpu(), reference, rtol=0, atol=1e-4 * scale)
    assert pool.num_degenerate.item() == 2


def test_weighted_rows_is_for_the_cpu():
    pool = LevelMappedROIPooler(7, SCALES, 0, "ROIAlignV2", implementation="weighted_rows")
    with pytest.raises(ValueError, match="weighted_rows cannot serve maps on another device"):
        pool([f.cuda() for f in maps()], [b.to("cuda") for b in boxes()])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("implementation", ["per_level", "auto"])
def test_pooler_of_half_precision_maps(dtype, implementation):
    pool = LevelMappedROIPooler(7, SCALES, 0, "ROIAlignV2", implementation=implementation)
    features, box_lists = maps(dtype), boxes()
    expected = pool([f.float() for f in features], box_lists)
    found = pool([f.cuda() for f in features], [b.to("cuda") for b in box_lists])
    assert found.dtype == dtype
    torch.testing.assert_close(found.float().cpu(), expected, rtol=2e-2, atol=2e-2)


def test_anchors_are_made_where_the_maps_are():
    generator = PyramidAnchorGenerator(sizes=[[32]], aspect_ratios=[[0.5, 1.0]], strides=[4, 8])
    features = [torch.zeros(1, 1, 8, 9), torch.zeros(1, 1, 4, 5)]
    on_cpu, on_gpu = generator(features), generator([f.cuda() for f in features])
    for a, b in zip(on_cpu, on_gpu, strict=True):
        assert b.device.type == "cuda" and torch.equal(a.tensor, b.tensor.cpu())


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("implementation", ["per_level", "auto"])
def test_a_model_trains_and_detects(small_cfg, autocast, implementation):
    from detectron2.utils.events import EventStorage

    small_cfg.MODEL.DEVICE = "cuda"
    small_cfg.MODEL.FPN_EXT.POOLER_IMPLEMENTATION = implementation
    small_cfg.MODEL.BACKBONE.FREEZE_AT = 0
    model = build_model(small_cfg)
    truth = Instances((128, 160))
    truth.gt_boxes = Boxes(torch.tensor([[10.0, 10, 90, 100]]))
    truth.gt_classes = torch.tensor([2])
    batch = [{"image": torch.rand(3, 128, 160) * 255, "instances": truth}]
    with EventStorage(), torch.autocast("cuda", enabled=autocast):
        losses = model.train()(batch)
    sum(losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    with torch.no_grad(), torch.autocast("cuda", enabled=autocast):
        assert model.eval()(batch)[0]["instances"].pred_boxes.tensor.is_cuda


def scattered(cfg):
    """A model whose random weights make proposals and scores that differ from each other."""
    cfg.MODEL.DEVICE = "cuda"
    model = build_model(cfg).eval()
    for name, tensor in model.state_dict().items():
        if "predictor" in name or "rpn_head" in name:
            tensor.mul_(10)
    return model


def pictures():
    return [{"image": torch.rand(3, height, 160) * 255} for height in (128, 96)]


def test_the_rpns_proposals_are_detectron2s(small_cfg):
    proposals = []
    for name in ("PyramidRPN", "RPN"):
        small_cfg.MODEL.PROPOSAL_GENERATOR.NAME = name
        torch.manual_seed(1)
        model = scattered(small_cfg)
        with torch.no_grad():
            torch.manual_seed(2)
            images = model.preprocess_image(pictures())
            proposals.append(model.proposal_generator(images, model.backbone(images.tensor))[0])
    for ours, theirs in zip(*proposals, strict=True):
        assert len(ours) == len(theirs) > 100
        close = dict(rtol=0, atol=0.01)
        torch.testing.assert_close(
            ours.proposal_boxes.tensor, theirs.proposal_boxes.tensor, **close
        )


@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_an_optimised_model(small_cfg, monkeypatch, dtype, cuda_graphs):
    """Maps to the dtype's rounding; with graphs recorded, replayed, and recorded for a new size."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model = scattered(small_cfg)
    optimised = optimize_for_inference(model, dtype, cuda_graphs=cuda_graphs)
    tolerance = 1e-4 if dtype == torch.float32 else 0.03
    with torch.no_grad():
        for size in ((128, 160), (128, 160), (64, 96), (128, 160)):
            image = torch.randn(2, 3, *size, device="cuda")
            found, expected = optimised.backbone(image), model.backbone(image)
            for name, features in expected.items():
                assert found[name].dtype == dtype
                error = (found[name].float() - features).norm() / features.norm()
                assert error < tolerance, (name, size)
        for out in optimised(pictures()):
            assert len(out["instances"]) > 10 and out["instances"].pred_boxes.tensor.is_cuda


class Train:
    """A few steps of a small detector on one image, by MicroBatchTrainer."""

    def __init__(self, cfg, dtype, batches=1, implementation="auto"):
        cfg.MODEL.DEVICE = "cuda"
        cfg.MODEL.FPN_EXT.POOLER_IMPLEMENTATION = implementation
        cfg.MODEL.BACKBONE.FREEZE_AT = 0
        torch.manual_seed(0)
        self.model = build_model(cfg)
        truth = Instances((128, 160))
        truth.gt_boxes = Boxes(torch.tensor([[10.0, 10, 90, 100]]))
        truth.gt_classes = torch.tensor([2])
        self.batch = [{"image": torch.rand(3, 128, 160) * 255, "instances": truth}]
        optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4)
        data = itertools.repeat(self.batch)
        self.trainer = MicroBatchTrainer(self.model, data, optimizer, batches, dtype)

    def steps(self, number):
        self.trainer.train(0, number)
        return {k: v for k, (v, _) in self.trainer.storage.latest().items()}


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("implementation", ["per_level", "auto"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_steps_in_mixed_precision(small_cfg, dtype, implementation, batches):
    training = Train(small_cfg, dtype, batches, implementation)
    before = [p.detach().clone() for p in training.model.parameters()]
    metrics = training.steps(8)
    assert torch.isfinite(torch.tensor(metrics["total_loss"]))
    after = list(training.model.parameters())
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in after)
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert ("loss_scale" in metrics) == (dtype == torch.float16)
    assert ("grad_scaler" in training.trainer.state_dict()) == (dtype == torch.float16)


def test_an_overflow_in_float16_skips_the_step(small_cfg, tmp_path):
    small_cfg.OUTPUT_DIR = str(tmp_path)
    training = Train(small_cfg, torch.float16)
    training.trainer.scaler = torch.amp.GradScaler("cuda", init_scale=2.0**60)
    training.trainer.register_hooks([NonFiniteGuard(small_cfg)])
    before = [p.detach().clone() for p in training.model.parameters()]
    metrics = training.steps(1)
    assert (metrics["skipped_steps"], metrics["loss_scale"]) == (1, 2.0**59)
    assert all(map(torch.equal, before, training.model.parameters()))


def test_validation_loss_leaves_random_numbers_of_the_gpu(small_cfg):
    training = Train(small_cfg, None)
    state = torch.cuda.get_rng_state()
    first = validation_loss(training.model, [[training.batch]])
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert validation_loss(training.model, [[training.batch]]) == pytest.approx(first, rel=1e-4)


def test_the_average_is_on_the_gpu(small_cfg, tmp_path):
    training = Train(small_cfg, None)
    checkpointer = SafeCheckpointer(training.model, str(tmp_path))
    hook = AveragedWeights(training.model, 0.5, checkpointer)
    training.trainer.register_hooks([hook])
    training.steps(2)
    assert all(p.is_cuda and p.isfinite().all() for p in hook.model.parameters())
    assert (tmp_path / "model_final_ema.pth").is_file()
