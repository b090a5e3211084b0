"""Steps with gradient accumulation, mixed precision, or both; and steps skipped by GradScaler."""

import pytest
import torch
from detectron2.engine import HookBase, SimpleTrainer
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from fpn_ext.engine.first_nonfinite import diagnose
from fpn_ext.engine.nonfinite import NonFiniteGuard, amp_dtype
from fpn_ext.engine.steps import MOST_SKIPPED, MicroBatchTrainer
from fpn_ext.modeling.pooler import LevelMappedROIPooler
from torch import distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel


class Squares(nn.Module):
    """One weight w; the loss of a batch of (x, y) is the mean of (w x - y)^2."""

    def __init__(self, weight=0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, batch):
        return {"loss": torch.stack([(self.weight * x - y) ** 2 for x, y in batch]).mean()}


def train(model, data, steps, rate=0.25, hooks=(), trainer_class=MicroBatchTrainer, **kwargs):
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    trainer = trainer_class(model, data, optimizer, **kwargs)
    trainer.register_hooks(list(hooks))
    trainer.train(0, steps)
    return trainer


FOUR = [(1.0, 1.0), (2.0, 1.0), (1.0, 3.0), (2.0, 0.0)]


def test_two_batches_of_two_are_one_of_four():
    """By hand: at w = 0 the gradient is the mean of -2 x y over (1, 2, 3, 0), so -3."""
    once = train(Squares(), [FOUR], 1, trainer_class=SimpleTrainer)
    assert once.model.weight.item() == 0.25 * 3
    twice = train(Squares(), [FOUR[:2], FOUR[2:]], 1, batches=2)
    assert twice.model.weight.item() == 0.25 * 3
    assert twice.storage.latest()["total_loss"] == (11 / 4, 0), "the mean of 1, 1, 9 and 0"


def test_a_step_takes_its_number_of_batches():
    """By hand: -2 (1 - 0) = -2 and w = 0.5, then the mean of 2 (0.5 - 1) = -1 and 2 (0.5 - 2)."""
    one = [(1.0, 1.0)]
    trainer = train(Squares(), [one, one, one, [(1.0, 2.0)], one], 2, batches=2)
    assert trainer.model.weight.item() == 0.5 + 0.25 * 2


@pytest.fixture
def one_process():
    """A process group of one."""
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_gradients_are_exchanged_once_a_step(one_process):
    model = DistributedDataParallel(Squares())
    exchanges = []

    def exchange(state, bucket):
        exchanges.append(bucket.buffer().tolist())
        return default_hooks.allreduce_hook(None, bucket)

    model.register_comm_hook(None, exchange)
    train(model, [FOUR[:1], FOUR[1:2], FOUR[2:3], FOUR[3:]], 1, batches=4)
    assert exchanges == [[-3.0]], "the sum over the batches, in the last backward pass"
    assert model.module.weight.item() == 0.25 * 3


def test_a_batch_with_nan_is_the_one_that_is_told(small_cfg, tmp_path):
    small_cfg.OUTPUT_DIR = str(tmp_path)
    named = [{"file_name": "good.jpg", "image": torch.ones(1)}]
    nan = [{"file_name": "bad.jpg", "image": torch.tensor([float("nan")])}]

    class Model(Squares):
        def forward(self, batch):
            return super().forward([(record["image"].sum(), 1.0) for record in batch])

    with pytest.raises(FloatingPointError, match=r"(?s)a loss became .*wrong alone: bad\.jpg"):
        train(Model(), [named, nan, named], 1, batches=3, hooks=[NonFiniteGuard(small_cfg)])


# Mixed precision.


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.seen = []

    def forward(self, batch):
        out = self.layer(batch)
        self.seen.append(out.dtype)
        return {"loss": out.float().square().mean()}


def test_bfloat16_on_the_cpu():
    model, images = Layer(), torch.randn(4, 8)
    before = model.layer.weight.detach().clone()
    trainer = train(model, [images] * 2, 2, dtype=torch.bfloat16)
    assert model.seen == [torch.bfloat16] * 2
    assert model.layer.weight.dtype == model.layer.weight.grad.dtype == torch.float32
    assert not torch.equal(model.layer.weight, before)
    assert "grad_scaler" not in trainer.state_dict(), "its range is float32's"


def maps(dtype=torch.float32):
    return [torch.randn(1, 6, 64 // s, 64 // s).to(dtype) for s in (1, 2, 4, 8)]


@pytest.mark.parametrize("implementation", ["per_level", "weighted_rows", "auto"])
def test_pooling_under_autocast(implementation):
    """Maps in bfloat16, as convolutions make them there; sums are in float32 all the same."""
    scales = [1 / 4, 1 / 8, 1 / 16, 1 / 32]
    pool = LevelMappedROIPooler(7, scales, 0, "ROIAlignV2", implementation=implementation)
    boxes = [Boxes(torch.tensor([[3.0, 5, 60, 90], [10, 20, 200, 180], [0, 0, 256, 250]]))]
    features = [f.requires_grad_() for f in maps(torch.bfloat16)]
    exact = [f.detach().float().requires_grad_() for f in features]
    expected = pool(exact, boxes)
    with torch.autocast("cpu", torch.bfloat16):
        found = pool(features, boxes)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected.bfloat16()), "rounded once"
    weights = torch.randn_like(expected).bfloat16()
    (found * weights).sum().backward()
    (expected * weights.float()).sum().backward()
    for given, reference in zip(features, exact, strict=True):
        assert given.grad.dtype == torch.bfloat16
        torch.testing.assert_close(given.grad.float(), reference.grad, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("implementation", ["per_level", "auto"])
def test_a_detector_trains_in_bfloat16(small_cfg, implementation):
    small_cfg.MODEL.FPN_EXT.POOLER_IMPLEMENTATION = implementation
    small_cfg.MODEL.BACKBONE.FREEZE_AT = 0
    small_cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = 40
    model = build_model(small_cfg)
    truth = Instances((64, 64))
    truth.gt_boxes = Boxes(torch.tensor([[5.0, 5, 40, 50]]))
    truth.gt_classes = torch.tensor([2])
    batch = [{"image": torch.rand(3, 64, 64) * 255, "instances": truth}]
    losses = {}
    for dtype in (None, torch.bfloat16):
        torch.manual_seed(0)
        trainer = train(model, [batch], 1, rate=0.0, dtype=dtype)
        losses[dtype] = trainer.storage.latest()["total_loss"][0]
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert len(gradients) >= 50
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32 and gradient.isfinite().all(), name
    assert losses[None] != losses[torch.bfloat16] == pytest.approx(losses[None], rel=0.05)


# float16's scaler, on the CPU: what it does depends on nothing else.


class Slope(nn.Module):
    """The loss is w times the batch, so the gradient of w is the batch."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1e-6))

    def forward(self, batch):
        return {"loss": self.weight * batch}


def scaled(batches, hooks=(), steps=None):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    steps = len(batches) if steps is None else steps
    return train(Slope(), map(torch.tensor, batches), steps, rate=1e-6, hooks=hooks, scaler=scaler)


TOO_MUCH = 1e35  # times 2^16 is beyond float32


def test_a_skipped_step_is_no_error(small_cfg, tmp_path, caplog):
    """With the guard against infinite gradients, which sees those of the steps that are made."""
    small_cfg.OUTPUT_DIR = str(tmp_path)
    caplog.set_level("INFO", logger="fpn_ext")
    trainer = scaled([1.0, TOO_MUCH, 2.0], [NonFiniteGuard(small_cfg)])
    assert trainer.model.weight.item() == pytest.approx(1e-6 - 3e-6)
    latest = trainer.storage.latest()
    assert latest["skipped_steps"] == (1, 2) and latest["loss_scale"] == (2.0**15, 2)
    assert "this step is skipped (1 so far), the losses' scale is now 32768" in caplog.text


def test_the_scale_is_part_of_the_state():
    trainer = scaled([1.0, TOO_MUCH, TOO_MUCH])
    state = trainer.state_dict()
    other = scaled([1.0])
    other.load_state_dict(state)
    assert other.state_dict() == state
    assert (other.scaler.get_scale(), other.num_skipped) == (2.0**14, 2)


def test_going_on_in_float16_from_float32(caplog):
    plain = train(Slope(), [torch.tensor(1.0)], 1, trainer_class=SimpleTrainer)
    scaled([1.0]).load_state_dict(plain.state_dict())
    assert "not trained in float16: the losses' scale begins at 65536" in caplog.text


def test_gradients_that_no_scale_can_mend(small_cfg, tmp_path):
    small_cfg.OUTPUT_DIR = str(tmp_path)

    class Endless(Slope):
        def forward(self, batch):
            return {"loss": (self.weight * 0).sqrt()}  # 0, and its slope there is infinite

    scaler = torch.amp.GradScaler("cpu")
    message = rf"infinite or NaN in {MOST_SKIPPED} steps on end, down to a loss scale of 6\.1"
    with pytest.raises(FloatingPointError, match=message):
        train(
            Endless(),
            [[{"image": torch.zeros(1)}]] * 99,
            99,
            hooks=[NonFiniteGuard(small_cfg)],
            scaler=scaler,
        )
    (folder,) = (tmp_path / "nonfinite").iterdir()
    assert folder.name == f"iteration_{MOST_SKIPPED - 1}"


def test_what_overflows_without_a_scale_is_found(small_cfg):
    model = Slope()
    model.forward = lambda batch: {"loss": (model.weight * 0).sqrt()}
    found = diagnose(model, [{"image": torch.zeros(1)}], torch.bfloat16)
    assert found.first.tensor == "gradient of weight"


def test_the_dtype_is_the_configs(small_cfg):
    assert amp_dtype(small_cfg) is None
    small_cfg.SOLVER.AMP.ENABLED = True
    assert amp_dtype(small_cfg) == torch.float16
    small_cfg.SOLVER.FPN_EXT.AMP_DTYPE = "bfloat16"
    assert amp_dtype(small_cfg) == torch.bfloat16


def test_metrics_are_those_of_detectron2():
    """Of the one that is installed: main's has one more than v0.6's."""
    ours, detectron2s = (
        set(train(Squares(), [FOUR], 1, trainer_class=trainer_class).storage.latest())
        for trainer_class in (MicroBatchTrainer, SimpleTrainer)
    )
    assert ours == detectron2s >= {"data_time", "total_loss"}


class WatchesGradients(HookBase):
    """Keeps what the gradient and the weight are after the backward passes of each step."""

    def __init__(self):
        self.seen = []

    def after_backward(self):
        weight = self.trainer.model.weight
        self.seen.append((weight.grad.item(), weight.item()))


def test_hooks_are_told_once_a_step_after_all_backward_passes():
    """By hand: the gradient is 2 (10 w - 6) / 4, so -3 at w = 0, and w is 3 / 4 then."""
    watch = WatchesGradients()
    train(Squares(), [FOUR[:2], FOUR[2:]] * 2, 2, batches=2, hooks=[watch])
    assert watch.seen == [(-3.0, 0.0), (0.75, 0.75)]
