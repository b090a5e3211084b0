"""On NaN or infinity, training reports origin and cause, and saves what reproduces it."""

import copy
import json
import types
from pathlib import Path

import pytest
import torch
from detectron2.engine import HookBase, SimpleTrainer
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints, PolygonMasks
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from fpn_ext.engine.first_nonfinite import Diagnosis, diagnose
from fpn_ext.engine.nonfinite import (
    NonFiniteGuard,
    check_gradients,
    random_numbers,
    random_state,
    says_non_finite,
)
from fpn_ext.engine.nonfinite_causes import causes_in_config, causes_in_diagnosis, causes_in_losses
from fpn_ext.engine.nonfinite_inputs import batch_faults
from fpn_ext.engine.saved_batches import load_batch, save
from torch import nn

NAN, INF = float("nan"), float("inf")


def record(name, *boxes):
    boxes = torch.tensor(boxes or [[8.0, 8.0, 60.0, 50.0]])
    instances = Instances((64, 64), gt_boxes=Boxes(boxes), gt_classes=torch.ones(len(boxes)).long())
    return {"file_name": name, "image": torch.rand(3, 64, 64) * 255, "instances": instances}


@pytest.fixture
def cfg(small_cfg, tmp_path):
    small_cfg.OUTPUT_DIR = str(tmp_path)
    small_cfg.MODEL.RESNETS.NORM = "BN"
    small_cfg.MODEL.BACKBONE.FREEZE_AT = 0
    small_cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN, small_cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 40, 16
    small_cfg.SOLVER.BASE_LR, small_cfg.SOLVER.IMS_PER_BATCH = 0.0025, 2
    return small_cfg


def train(cfg, model, batches, guard=True):
    optimizer = torch.optim.SGD(model.parameters(), lr=cfg.SOLVER.BASE_LR)
    trainer = SimpleTrainer(model, batches, optimizer)
    trainer.register_hooks([NonFiniteGuard(cfg)] if guard else [])
    trainer.train(0, len(batches))
    return trainer


def failure(cfg, model, batches):
    """The training's message, its report and folder."""
    with pytest.raises(FloatingPointError) as error:
        train(cfg, model, batches)
    (folder,) = (Path(cfg.OUTPUT_DIR) / "nonfinite").iterdir()
    return str(error.value), json.loads((folder / "report.json").read_text()), folder


# The whole model.


def test_a_pixel(cfg):
    batch = [record("a.jpg"), record("b.jpg")]
    batch[1]["image"][1, 5, 7] = NAN
    cfg.SOLVER.BASE_LR = 1.0  # not the cause, and not named
    text, report, folder = failure(cfg, build_model(cfg), [batch])
    assert text.splitlines()[0].startswith("training met NaN or infinity in iteration 0: ")
    assert (
        "first: input[0][1]['image'] of the model (GeneralizedRCNN): 1 NaN and 0 infinite among "
        "12288 values, float32"
    ) in text
    assert "images that go wrong alone: b.jpg\n" in text
    assert "  - b.jpg: a pixel is NaN or infinite" in text and "BASE_LR" not in text
    assert text.splitlines()[-1] == f"saved: {folder}/batch.pth, model.pth, report.json"
    assert (report["iteration"], report["images"]) == (0, ["b.jpg"])
    assert report["batch"] == ["a.jpg", "b.jpg"]


def test_a_weight_of_a_lateral_convolution(cfg):
    model = build_model(cfg)
    model.backbone.fpn_lateral4.weight.data[3, 5] = INF
    text, report, folder = failure(cfg, model, [[record("a.jpg"), record("b.jpg")]])
    first = report["first"]
    assert (first["module"], first["level"]) == ("backbone.fpn_lateral4", 4)
    assert first["tensor"] == "output" and first["num_nan"] + first["num_inf"] > 0
    assert "output of backbone.fpn_lateral4 (Conv2d), level 4: " in text
    assert "1 weights hold NaN or infinity before the batch, the first is " in text
    assert "backbone.fpn_lateral4.weight: start again from an earlier checkpoint" in text
    assert report["images"] == ["a.jpg", "b.jpg"]

    # What was saved shows the same again.
    again = build_model(cfg)
    again.load_state_dict(torch.load(folder / "model.pth", weights_only=True)["model"])
    assert diagnose(again, load_batch(folder / "batch.pth")).first.module == first["module"]


@pytest.mark.parametrize(
    ("box", "fault"),
    [
        ([8.0, NAN, 60.0, 50.0], "box 0 is [8, nan, 60, 50], NaN or infinite"),
        ([8.0, 8.0, INF, 50.0], "box 0 is [8, 8, inf, 50], NaN or infinite"),
    ],
)
def test_a_box(cfg, box, fault):
    batch = [record("a.jpg"), record("b.jpg", box)]
    text, report, _ = failure(cfg, build_model(cfg), [[record("c.jpg")], batch])
    assert "in iteration 1: " in text
    assert "first: input[0][1]['instances'].gt_boxes of the model" in text
    assert f"  - b.jpg: {fault}; run fpn-ext data" in text
    assert report["images"] == ["b.jpg"]


def test_a_box_without_area(cfg):
    batch = [record("a.jpg"), record("b.jpg", [8.0, 8.0, 8.0, 50.0])]
    text, report, _ = failure(cfg, build_model(cfg), [batch])
    assert report["first"]["module"] == "proposal_generator"
    assert "b.jpg: box 0 is [8, 8, 8, 50], a side is 0 or negative: no area" in text
    assert report["images"] == ["b.jpg"]


def test_a_learning_rate_that_explodes(cfg):
    cfg.SOLVER.BASE_LR, cfg.SOLVER.WARMUP_ITERS = 100.0, 0
    text, report, _ = failure(cfg, build_model(cfg), [[record("a.jpg")]] * 9)
    assert 0 < report["iteration"] < 9
    assert "SOLVER.BASE_LR 100 for SOLVER.IMS_PER_BATCH 2 is 4e+04 times" in text
    assert "(0.02 for 16); try 0.0025" in text
    assert "SOLVER.WARMUP_ITERS is 0: Detectron2's recipes warm up for 1000" in text
    assert "the weights have exploded: " in text
    assert report["first"] is not None and report["weight_faults"]


def test_an_rpn_layer_names_its_level(cfg):
    model = build_model(cfg).train()
    spoilt = []

    def spoil(module, args, output):
        spoilt.append(output)
        return output * NAN if len(spoilt) == 3 else output  # p2, p3, p4

    model.proposal_generator.rpn_head.conv.register_forward_hook(spoil)
    first = diagnose(model, [record("a.jpg")]).first
    assert (first.module, first.level) == ("proposal_generator.rpn_head.conv", 4)


def test_a_finite_training_is_left_alone(cfg, tmp_path):
    torch.manual_seed(3)
    model = build_model(cfg)
    batches = [[record("a.jpg")], [record("b.jpg")], [record("c.jpg")]]
    models = [model, copy.deepcopy(model)]
    for guard, each in zip((True, False), models, strict=True):
        torch.manual_seed(4)
        train(cfg, each, batches, guard)
    guarded, alone = (list(m.state_dict().values()) for m in models)
    assert all(torch.equal(a, b) for a, b in zip(guarded, alone, strict=True))
    assert not any(tmp_path.iterdir())
    assert not models[0]._forward_pre_hooks


# Small models: Detectron2's trainers take any that returns losses.


class Toy(nn.Module):
    """A loss made by a function of a layer's output."""

    def __init__(self, loss):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.end = Function(loss)

    def forward(self, batch):
        return {"loss": self.end(self.layer(torch.stack([r["image"] for r in batch])))}


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def rows(*names):
    return [{"file_name": name, "image": torch.ones(2)} for name in names]


def test_a_gradient(cfg):
    """The root of 0 is finite, its slope is not. The step that would spoil the weights is left."""
    model = Toy(lambda x: (x * 0).abs().sqrt().sum())
    weights = copy.deepcopy(model.state_dict())
    text, report, folder = failure(cfg, model, [rows("a.jpg")])
    assert "iteration 0: a gradient became infinite or NaN" in text
    assert report["first"]["module"] == "layer"
    assert report["first"]["tensor"] == "gradient of output"
    saved = torch.load(folder / "model.pth", weights_only=True)["model"]
    assert all(torch.equal(saved[name], weights[name]) for name in weights)


def test_a_gradient_of_a_weight_alone(cfg):
    model = Toy(lambda x: x.sum())
    model.layer.weight.register_hook(lambda gradient: gradient * INF)
    _, report, _ = failure(cfg, model, [rows("a.jpg")])
    assert report["first"]["module"] == "layer"
    assert report["first"]["tensor"] == "gradient of weight"


def test_a_large_finite_gradient_is_none(cfg):
    cfg.SOLVER.BASE_LR = 1e-30
    train(cfg, Toy(lambda x: x.sum() * 1e30), [rows("a.jpg")])


def test_a_step_without_gradients():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    optimizer.register_step_pre_hook(check_gradients)
    optimizer.step()


def test_the_same_random_numbers_are_drawn_again(cfg):
    """NaN once in about a hundred batches."""
    model = Toy(lambda x: x.sum() + (NAN if torch.rand(()) < 0.01 else 0))
    text, report, _ = failure(cfg, model, [rows("a.jpg")] * 2000)
    assert report["iteration"] > 0 and report["first"]["module"] == "end", text


def test_the_random_numbers_go_on_where_they_were():
    state = random_state()
    drawn = torch.rand(3)
    before = torch.get_rng_state()
    with random_numbers(state):
        assert torch.equal(torch.rand(3), drawn)
        torch.rand(9)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_weights_are_saved_before_the_batch_runs_again(cfg):
    model = Toy(lambda x: x.sum() * NAN)
    model.end = nn.Sequential(nn.BatchNorm1d(2), model.end)
    _, _, folder = failure(cfg, model, [rows("a.jpg", "b.jpg")])
    saved = torch.load(folder / "model.pth", weights_only=True)["model"]
    assert saved["end.0.num_batches_tracked"] == 1 < model.end[0].num_batches_tracked


def test_a_map_names_its_level():
    model = Toy(lambda x: {"p2": x, "p3": x * NAN}).train()
    first = diagnose(model, rows("a.jpg")).first
    assert (first.module, first.tensor, first.level) == ("end", "output['p3']", 3)


def test_what_does_not_come_again(cfg):
    calls = []

    def once(x):
        calls.append(x)
        return x.sum() * (NAN if len(calls) == 1 else 1)

    text, report, _ = failure(cfg, Toy(once), [rows("a.jpg")])
    assert "first: not found by running this process's batch again" in text
    assert report["first"] is None and "images that go wrong alone: none" in text


def test_another_processs_batch(monkeypatch):
    monkeypatch.setattr(comm, "get_world_size", lambda: 4)
    (cause,) = causes_in_diagnosis(Diagnosis())
    assert cause.startswith("another of the 4 processes had the batch")


def test_synchronised_batch_norm_is_not_run_alone(monkeypatch):
    model = Toy(lambda x: x.sum() * NAN).train()
    model.norm = nn.SyncBatchNorm(2)
    assert diagnose(model, rows("a.jpg")).first.module == "end"
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    assert diagnose(model, rows("a.jpg")).first is None


def test_a_guarded_model_is_copied_without_its_trainer(cfg):
    """As fpn_ext.optimize_for_inference does at each evaluation of a training."""
    guard, copies = NonFiniteGuard(cfg), []

    class Copy(HookBase):
        def after_step(self):
            copies.append(copy.deepcopy(self.trainer.model))

    model = Toy(lambda x: x.sum())
    trainer = SimpleTrainer(
        model, iter([rows("a.jpg")]), torch.optim.SGD(model.parameters(), lr=0.1)
    )
    trainer.register_hooks([guard, Copy()])
    trainer.train(0, 1)
    assert torch.equal(copies[0].layer.weight, model.layer.weight)


def test_float16_overflow():
    model = Toy(lambda x: x.float().sum())
    model.layer.weight.data.fill_(60000)  # float16 ends at 65504
    found = diagnose(model.train(), rows("a.jpg"), torch.float16)
    assert (found.first.module, found.first.dtype) == ("layer", "float16")
    assert found.finite_in_float32
    assert any("float16 overflow" in cause for cause in causes_in_diagnosis(found))


def test_training_that_cannot_be_saved(cfg, tmp_path):
    (tmp_path / "file").touch()
    cfg.OUTPUT_DIR = str(tmp_path / "file")
    with pytest.raises(FloatingPointError, match=r"(?s)first: output of end .*not saved: "):
        train(cfg, Toy(lambda x: x.sum() * NAN), [rows("a.jpg")])


# Other errors pass.


@pytest.mark.parametrize(
    ("error", "taken"),
    [
        (FloatingPointError("Loss became infinite or NaN"), True),
        (AssertionError("Box tensor contains infinite or NaN!"), True),
        (RuntimeError("probability tensor contains either `inf`, `nan` or element < 0"), True),
        (RuntimeError("CUDA out of memory"), False),
        (RuntimeError("banana"), False),
        (FileNotFoundError("no file nan.jpg"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_which_errors_are_taken_for_it(error, taken):
    assert says_non_finite(error) == taken


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA out of memory"), AssertionError("7 classes"), ValueError("nan")]
)
def test_another_error_goes_its_way(cfg, tmp_path, error):
    calls = []

    def fail(x):
        calls.append(x)
        raise error

    with pytest.raises(type(error), match=str(error)) as raised:
        train(cfg, Toy(fail), [rows("a.jpg")])
    assert raised.value is error
    assert not any(tmp_path.iterdir())
    assert (len(calls) > 1) == isinstance(error, AssertionError), "only that is worth a second run"


def test_an_assertion_without_a_word(cfg):
    """Detectron2's matcher asserts that overlaps are not negative, which NaN fails too."""

    def fail(x):
        raise AssertionError

    model = Toy(fail)
    model.layer.bias.data[0] = NAN
    text, report, _ = failure(cfg, model, [rows("a.jpg")])
    assert text.startswith("training met NaN or infinity in iteration 0: AssertionError\n")
    assert report["first"]["module"] == "layer"


# Causes.


def test_faults_of_a_batch():
    batch = [
        record("a.jpg", [0.0, 0.0, 64.0, 65.0]),
        record("b.jpg", [0.0, 0.0, 66.0, 60.0], [50.0, 50.0, 20.0, 20.0], [5.0, 5.0, 5.0, 9.0]),
        {"image": torch.zeros(3, 4, 4)},
    ]
    batch[0]["image"] = batch[0]["image"].to(torch.uint8)
    inverted, beyond = batch_faults(batch)
    assert inverted.startswith("b.jpg: box 1 (and 1 more) is [50, 50, 20, 20], a side is 0 or neg")
    assert beyond.startswith("b.jpg: box 0 is [0, 0, 66, 60], it reaches beyond the image")


def causes(cfg, iteration=5000):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    return list(causes_in_config(cfg, optimizer, iteration))


def test_causes_in_the_config(cfg):
    cfg.SOLVER.WARMUP_ITERS = 0
    assert causes(cfg) == []
    assert len(causes(cfg, iteration=10)) == 1
    cfg.SOLVER.WARMUP_ITERS = 1000
    assert causes(cfg, iteration=10) == []
    cfg.SOLVER.FPN_EXT.ACCUMULATE, cfg.SOLVER.BASE_LR = 4, 0.015
    assert causes(cfg) == []
    cfg.SOLVER.BASE_LR = 0.02
    assert "IMS_PER_BATCH 2 x SOLVER.FPN_EXT.ACCUMULATE 4 is 2 times" in causes(cfg)[0]
    cfg.SOLVER.FPN_EXT.ACCUMULATE = 1
    cfg.SOLVER.BASE_LR = 0.0037
    assert causes(cfg) == []
    cfg.SOLVER.BASE_LR = 0.004
    assert "is 1.6 times that of Detectron2's recipes" in causes(cfg)[0]
    cfg.SOLVER.BASE_LR = 0.001
    cfg.MODEL.RESNETS.NORM = "FrozenBN"
    assert "MODEL.RESNETS.NORM is FrozenBN" in causes(cfg)[0]
    cfg.MODEL.WEIGHTS = "model.pth"
    assert causes(cfg) == []
    cfg.MODEL.PIXEL_STD = [57.0, 0.0, 58.0]
    assert "divides by 0" in causes(cfg)[0]


@pytest.mark.parametrize(("last", "grown"), [(9.0, False), (11.0, True)])
def test_a_growing_loss(last, grown):
    with EventStorage() as storage:
        assert list(causes_in_losses(storage)) == []
        for loss in (1.0, 0.9, 1.1, 1.0, last):
            storage.put_scalar("total_loss", loss)
        found = list(causes_in_losses(storage))
    assert len(found) == grown
    assert not grown or "11 in the last iteration, 1 in the median of 5" in found[0]


# Saving.


def test_a_batch_comes_back_as_it_was(tmp_path):
    instances = Instances(
        (60, 80),
        gt_boxes=Boxes(torch.rand(2, 4)),
        gt_classes=torch.tensor([1, 0]),
        gt_masks=PolygonMasks([[[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]], [[0.0, 0.0, 9.0, 0.0, 9.0, 9.0]]]),
        gt_bitmasks=BitMasks(torch.rand(2, 60, 80) > 0.5),
        gt_keypoints=Keypoints(torch.rand(2, 17, 3)),
    )
    proposals = Instances((60, 80), proposal_boxes=Boxes(torch.rand(5, 4)))
    batch = [
        {"file_name": "a.jpg", "image_id": 3, "height": 60, "image": torch.rand(3, 60, 80),
         "instances": instances, "proposals": proposals, "other": types.SimpleNamespace(x=1)},
    ]  # fmt: skip
    save(tmp_path, batch, {}, {})
    (back,) = load_batch(tmp_path / "batch.pth")
    assert (back["file_name"], back["image_id"], back["height"]) == ("a.jpg", 3, 60)
    assert back["other"] == "namespace(x=1)"
    assert torch.equal(back["image"], batch[0]["image"])
    there = back["instances"]
    assert there.image_size == (60, 80)
    for name in ("gt_boxes", "gt_bitmasks", "gt_keypoints"):
        assert torch.equal(getattr(there, name).tensor, getattr(instances, name).tensor)
    assert torch.equal(there.gt_classes, instances.gt_classes)
    assert torch.equal(there.gt_masks.area(), instances.gt_masks.area())
    assert torch.equal(back["proposals"].proposal_boxes.tensor, proposals.proposal_boxes.tensor)


def test_a_saved_batch_cannot_run_code(tmp_path):
    victim = tmp_path / "touched"

    class Evil:
        def __reduce__(self):
            return victim.touch, ()

    torch.save([{"image": Evil()}], tmp_path / "batch.pth")
    with pytest.raises(ValueError, match="asks for getattr; it was not read"):
        load_batch(tmp_path / "batch.pth")
    assert not victim.exists()
