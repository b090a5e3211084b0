"""Training, interrupted and resumed: the same bits; and the three ways to start one."""

import contextlib
import logging
import random

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import HookBase
from fpn_ext.engine.repeatable import use_deterministic_algorithms
from fpn_ext.engine.trainer import Trainer
from tiny import DATASET, config, leaves, register


@pytest.fixture(scope="module", autouse=True)
def images(tmp_path_factory):
    register(tmp_path_factory.mktemp("images") / "tiny")
    yield
    DatasetCatalog.remove(DATASET)
    MetadataCatalog.remove(DATASET)


class Killed(Exception):
    """Simulates a kill; tests/kill_resume.py does a real one."""


class Watch(HookBase):
    """Records the losses and learning rate of each iteration; stops early."""

    def __init__(self, stop_after=None):
        self.seen = {}
        self.stop_after = stop_after

    def after_step(self):
        latest = self.trainer.storage.latest()
        self.seen[self.trainer.iter] = {
            k: v for k, (v, _) in latest.items() if "loss" in k or k == "lr"
        }
        # As an evaluation would: nothing after may depend on what is drawn here.
        torch.rand(self.stop_after or 1), np.random.rand(), random.random()
        if len(self.seen) == self.stop_after:
            raise Killed


def train(cfg, resume=False, stop_after=None):
    torch.manual_seed(0)  # first weights
    trainer = Trainer(cfg)
    watch = Watch(stop_after)
    trainer.register_hooks([watch])
    trainer.resume_or_load(resume)
    with contextlib.suppress(Killed):
        trainer.train()
    return watch.seen


def content(file):
    return leaves(torch.load(file, weights_only=True))


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    for path, value in one.items():
        same = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: a == b
        assert same(value, other[path]), path


@pytest.fixture(scope="module")
def straight(images, tmp_path_factory):
    """The folder and losses of 8 uninterrupted iterations."""
    folder = tmp_path_factory.mktemp("straight")
    return folder, train(config(folder))


@pytest.mark.parametrize(("workers", "stop_after"), [(0, 3), (0, 5), (2, 3), (2, 5)])
def test_stopped_and_resumed_ends_with_the_same_bits(straight, tmp_path, workers, stop_after):
    """Weights, optimizer, schedule and losses; the checkpoints are those after 2, 4, 6, 8."""
    folder, losses = straight
    cfg = config(tmp_path, "DATALOADER.NUM_WORKERS", workers)
    assert list(train(cfg, stop_after=stop_after)) == list(range(stop_after))
    resumed = train(cfg, resume=True)
    assert list(resumed) == list(range(stop_after - 1, 8))
    assert resumed == {i: losses[i] for i in resumed}
    for name in ("model_0000005.pth", "model_final.pth"):
        assert_same_bits(content(folder / name), content(tmp_path / name))
    momentum = [p for p in content(folder / "model_final.pth") if "momentum_buffer" in p]
    assert len(momentum) > 30


def test_another_seed_gives_other_losses(straight, tmp_path):
    assert train(config(tmp_path, "SEED", 2), stop_after=2)[1] != straight[1][1]


def test_deterministic_algorithms_can_train(tmp_path):
    try:
        use_deterministic_algorithms()
        one = train(config(tmp_path), stop_after=2)
        assert train(config(tmp_path), stop_after=2) == one
    finally:
        torch.use_deterministic_algorithms(False)


# The ways to begin


@pytest.fixture
def log(caplog):
    caplog.set_level("INFO", logger="fpn_ext")
    return lambda: "\n".join(r.getMessage() for r in caplog.records if r.name.startswith("fpn_"))


def begin(cfg, mode):
    trainer = Trainer(cfg)
    trainer.extend() if mode == "extend" else trainer.resume_or_load(mode == "resume")
    return trainer


def momenta(trainer):
    return [s["momentum_buffer"] for s in trainer.optimizer.state.values() if s]


def test_init_takes_weights_alone(straight, tmp_path, log):
    file = straight[0] / "model_final.pth"
    trainer = begin(config(tmp_path, "MODEL.WEIGHTS", file), "init")
    assert trainer.start_iter == 0 and not momenta(trainer)
    weights = torch.load(file)["model"]
    assert all(torch.equal(v, weights[k]) for k, v in trainer.model.state_dict().items())
    assert f"Begun with the weights of {file}. Next: iteration 0, learning rate 1e-05; " in log()


def test_resume_takes_everything(straight, log, caplog):
    trainer = begin(config(straight[0], "SOLVER.MAX_ITER", 20, "SOLVER.STEPS", "(15,)"), "resume")
    assert trainer.start_iter == 8 and len(momenta(trainer)) > 30
    assert (
        f"Resumed {straight[0]}/model_final.pth: weights, optimizer, learning rate, order of "
        "images after 8 iterations. Next: iteration 8, learning rate 0.01; BASE_LR 0.01, "
        "STEPS (15,) (was (6,)), MAX_ITER 20 (was 8)" in log()
    )
    warned = "\n".join(r.getMessage() for r in caplog.records if r.levelname == "WARNING")
    assert f"SOLVER.STEPS was (6,) in {straight[0]}" in warned
    assert "SOLVER.MAX_ITER was 8 in " in warned and "it is now 20, as this command's" in warned


def test_resume_keeps_the_learning_rate_it_was_begun_with(straight, log):
    trainer = begin(config(straight[0], "SOLVER.MAX_ITER", 20, "SOLVER.BASE_LR", 0.5), "resume")
    assert trainer.optimizer.param_groups[0]["lr"] == 0.01 * 0.1
    assert "base learning rates [0.01] of the checkpoint go on, not [0.5] of the config" in log()


def test_extend_takes_weights_and_optimizer_for_a_new_schedule(straight, tmp_path, log):
    file = straight[0] / "model_final.pth"
    opts = ("MODEL.WEIGHTS", file, "SOLVER.BASE_LR", 0.5, "SOLVER.MOMENTUM", 0.8)
    trainer = begin(config(tmp_path, *opts), "extend")
    saved = torch.load(file)
    state = saved["trainer"]["_trainer"]["optimizer"]["state"]
    kept = momenta(trainer)
    assert len(kept) == len(state) > 30
    assert all(torch.equal(m, state[i]["momentum_buffer"]) for i, m in enumerate(kept))
    assert all(torch.equal(v, saved["model"][k]) for k, v in trainer.model.state_dict().items())
    assert trainer.start_iter == 0
    assert {g["momentum"] for g in trainer.optimizer.param_groups} == {0.8}
    assert trainer.scheduler.base_lrs[0] == 0.5
    assert (
        f"Extended {file}: its weights and optimizer, a new schedule after 8 iterations. Next: "
        "iteration 0, learning rate 0.0005; BASE_LR 0.5 (was 0.01), STEPS (6,), MAX_ITER 8" in log()
    )
    seen = Watch()
    trainer.register_hooks([seen])
    trainer.train()
    assert list(seen.seen) == list(range(8)) and seen.seen[7]["lr"] == pytest.approx(0.05)


def test_what_changed_in_the_config_is_said(straight, tmp_path, log):
    saved = straight[0] / "model_0000003.pth"
    (tmp_path / saved.name).write_bytes(saved.read_bytes())
    begin(config(tmp_path, "SOLVER.FPN_EXT.ACCUMULATE", 2, "SOLVER.MOMENTUM", 0.8), "resume")
    changed = [line for line in log().splitlines() if "it is now" in line]
    assert len(changed) == 2
    assert "SOLVER.MOMENTUM was 0.9 in" in changed[0] and changed[0].endswith("it is now 0.8")
    assert "SOLVER.FPN_EXT.ACCUMULATE was 1 in" in changed[1]


def test_a_finished_training_has_nothing_left(straight):
    message = r"model_final\.pth has done 8 of SOLVER\.MAX_ITER 8 .* Raise SOLVER\.MAX_ITER"
    with pytest.raises(ValueError, match=message):
        begin(config(straight[0]), "resume")


def test_weights_alone_cannot_be_resumed_or_extended(straight, tmp_path):
    file = tmp_path / "model_0000003.pth"
    torch.save({"model": torch.load(straight[0] / "model_final.pth")["model"]}, file)
    with pytest.raises(
        ValueError, match=r"model_0000003\.pth holds weights alone, so --resume can"
    ):
        begin(config(tmp_path), "resume")
    with pytest.raises(ValueError, match=r"--extend: .*pth holds no state of an optimizer"):
        begin(config(tmp_path, "MODEL.WEIGHTS", file), "extend")


@pytest.mark.parametrize("mode", ["resume", "extend"])
def test_the_optimizer_of_another_model_is_refused(straight, mode):
    file = straight[0] / "model_final.pth"
    opts = ("MODEL.WEIGHTS", file, "SOLVER.MAX_ITER", 20, "MODEL.ROI_BOX_HEAD.FC_DIM", 24)
    message = r"another model .* shapes \['\(16, 392\) for \(24, 392\)'"
    with pytest.raises(ValueError, match=message):
        begin(config(straight[0], *opts), mode)


def test_a_checkpoint_of_detectron2_v06_is_resumed_without_momentum(straight, tmp_path, log):
    saved = torch.load(straight[0] / "model_0000003.pth")
    del saved["trainer"]["_trainer"], saved["trainer"]["schedule"]
    del saved["trainer"]["hooks"]["SeededIterations"]
    torch.save(saved, tmp_path / "model_0000003.pth")
    trainer = begin(config(tmp_path), "resume")
    assert trainer.start_iter == 4 and not momenta(trainer)
    assert trainer.optimizer.param_groups[0]["lr"] == 0.01, "not the first of the warm-up"
    assert "holds no state of the optimizer" in log()


def test_a_damaged_checkpoint_costs_iterations_not_bits(straight, tmp_path, caplog):
    folder, losses = straight
    for file in folder.glob("model_000000[135].pth"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "last_checkpoint").write_text("model_0000005.pth")
    (tmp_path / "model_0000005.pth").write_bytes((folder / "model_0000005.pth").read_bytes()[:-9])
    resumed = train(config(tmp_path), resume=True)
    assert list(resumed) == [4, 5, 6, 7] and resumed == {i: losses[i] for i in resumed}
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert any("model_0000005.pth is damaged" in w and "model_0000003" in w for w in warnings)
    assert_same_bits(content(folder / "model_final.pth"), content(tmp_path / "model_final.pth"))
