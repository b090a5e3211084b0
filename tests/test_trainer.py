"""Assembly of the trainer: each part once, in a fixed order, overridable in a subclass."""

import warnings

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultTrainer, HookBase, SimpleTrainer
from detectron2.evaluation import DatasetEvaluator
from detectron2.solver import build_optimizer
from fpn_ext.engine import resuming
from fpn_ext.engine.best import StopTraining, stoppable
from fpn_ext.engine.repeatable import RepeatableTrainLoader, SeededIterations
from fpn_ext.engine.steps import MicroBatchTrainer, build_step
from fpn_ext.engine.trainer import Trainer
from tiny import DATASET, config, register
from torch import nn

AMP = ("SOLVER.AMP.ENABLED", True, "SOLVER.FPN_EXT.AMP_DTYPE", "bfloat16")
TESTED = ("DATASETS.TEST", f"('{DATASET}',)", "INPUT.MIN_SIZE_TEST", 64)


@pytest.fixture(scope="module", autouse=True)
def images(tmp_path_factory):
    register(tmp_path_factory.mktemp("images") / "tiny")
    yield
    DatasetCatalog.remove(DATASET)
    MetadataCatalog.remove(DATASET)


class AP(DatasetEvaluator):
    """Returns the given score for every model."""

    def __init__(self, value):
        self.value = value

    def reset(self):
        pass

    def process(self, inputs, outputs):
        pass

    def evaluate(self):
        return {"bbox": {"AP": self.value}}


class Names(HookBase):
    """Records the hooks' class names in call order."""

    def __init__(self, names):
        self.names = names

    def before_step(self):
        self.names.append(type(self).__name__)


# The order of construction


@pytest.mark.parametrize(
    ("opts", "kind"),
    [
        ((), SimpleTrainer),
        (AMP, MicroBatchTrainer),
        (("SOLVER.FPN_EXT.ACCUMULATE", 2), MicroBatchTrainer),
    ],
)
def test_the_step_is_built_once(tmp_path, monkeypatch, opts, kind):
    """And no GradScaler is built needlessly, which makes AMPTrainer warn on a CPU."""
    built = []
    construct = SimpleTrainer.__init__

    def counted(self, *args, **kwargs):
        built.append(type(self))
        construct(self, *args, **kwargs)

    monkeypatch.setattr(SimpleTrainer, "__init__", counted)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*GradScaler")
        trainer = Trainer(config(tmp_path, *opts))
    assert built == [kind] and type(trainer.step) is kind


@pytest.mark.parametrize("opts", [(), AMP])
def test_all_parts_belong_together(tmp_path, opts):
    trainer = Trainer(config(tmp_path, *opts, "SOLVER.FPN_EXT.EMA_DECAY", 0.5))
    assert trainer.model is trainer.step.model is trainer.checkpointer.model
    assert trainer.optimizer is trainer.step.optimizer is trainer.scheduler.optimizer
    assert trainer.data_loader is trainer.step.data_loader
    weights = {id(p) for p in trainer.model.parameters()}
    assert {id(p) for g in trainer.optimizer.param_groups for p in g["params"]} <= weights
    assert trainer.evaluated_model is trainer.averaged.model is not trainer.model
    assert (trainer.start_iter, trainer.iter, trainer.max_iter) == (0, 0, 8)
    other = nn.Linear(1, 1)
    trainer.model = other
    assert trainer.step.model is other


def test_the_parts_are_built_in_detectron2s_order(tmp_path):
    def built_by(base):
        calls = []

        def noted(name):
            def build(cls, *args):
                calls.append(name)
                return getattr(super(Noting, cls), name)(*args)

            return classmethod(build)

        names = ("build_model", "build_optimizer", "build_train_loader", "build_lr_scheduler")
        Noting = type("Noting", (base,), {name: noted(name) for name in names})
        Noting.build_hooks = lambda self: calls.append("build_hooks") or []
        Noting(config(tmp_path))
        return calls

    assert built_by(Trainer) == built_by(DefaultTrainer)
    assert built_by(Trainer)[-1] == "build_hooks"


@pytest.mark.parametrize(
    ("opts", "expected"),
    [
        ((), "Seeded Timer LR Checkpointer Eval Writer Guard"),
        (
            ("SOLVER.FPN_EXT.EMA_DECAY", 0.5, "TEST.FPN_EXT.BEST_METRIC", "bbox/AP"),
            "Seeded Timer LR Averaged Checkpointer Best Writer Guard",
        ),
    ],
)
def test_the_order_of_the_hooks(tmp_path, opts, expected):
    """The average is in the checkpoint, which comes before an evaluation that may fail."""
    kinds = [type(hook).__name__ for hook in Trainer(config(tmp_path, *opts)).build_hooks()]
    assert len(kinds) == len(expected.split())
    for kind, part in zip(kinds, expected.split(), strict=True):
        assert part in kind, kinds


def test_what_a_checkpoint_holds(tmp_path):
    """Older checkpoints are resumed by these names."""
    opts = (*AMP, *TESTED, "SOLVER.FPN_EXT.EMA_DECAY", 0.5, "TEST.FPN_EXT.BEST_METRIC", "bbox/AP")
    trainer = Trainer(config(tmp_path, *opts, "TEST.EVAL_PERIOD", 8))
    trainer.checkpointer.save("model_0000001", iteration=1)
    saved = torch.load(tmp_path / "model_0000001.pth", weights_only=True)
    assert list(saved) == ["model", "trainer", "ema", "trained_on", "iteration"]
    assert list(saved["trainer"]) == ["iteration", "hooks", "_trainer", "schedule", "config"]
    assert set(saved["trainer"]["hooks"]) == {"SeededIterations", "LRScheduler", "BestCheckpoint"}
    assert set(saved["trainer"]["_trainer"]) == {"iteration", "optimizer"}


# A subclass


def test_a_subclass_has_its_evaluator_and_loaders(tmp_path):
    class Mine(Trainer):
        @classmethod
        def build_evaluator(cls, cfg, dataset_name, output_folder=None):
            return AP(12.5)

        @classmethod
        def build_train_loader(cls, cfg):
            loader = RepeatableTrainLoader(cfg)
            loader.seed = 7
            return loader

        @classmethod
        def build_test_loader(cls, cfg, dataset_name):
            loader = list(super().build_test_loader(cfg, dataset_name))[:2]
            seen.append((dataset_name, len(loader)))
            return loader

    seen = []
    keys = (*TESTED, "SOLVER.MAX_ITER", 1)
    trainer = Mine(config(tmp_path, *keys, "TEST.EXPECTED_RESULTS", "[['bbox', 'AP', 12.5, 0.1]]"))
    assert trainer.data_loader.seed == 7
    assert trainer.train() == {"bbox": {"AP": 12.5}} == trainer.last_results
    assert seen == [(DATASET, 2)]
    assert Mine.test(trainer.cfg, trainer.model, AP(3.0)) == {"bbox": {"AP": 3.0}}
    with pytest.raises(ValueError, match=r"2 evaluators for the 1 datasets of DATASETS\.TEST"):
        Mine.test(trainer.cfg, trainer.model, [AP(1.0), AP(2.0)])
    wrong = Mine(config(tmp_path, *keys, "TEST.EXPECTED_RESULTS", "[['bbox', 'AP', 99.0, 0.1]]"))
    with pytest.raises(SystemExit):
        wrong.train()


def test_a_subclass_has_its_hooks_and_model(tmp_path):
    class Mine(Trainer):
        def build_hooks(self):
            return [*super().build_hooks(), Names(called)]

        def build_writers(self):
            return []

        @classmethod
        def build_model(cls, cfg):
            model = super().build_model(cfg)
            model.backbone.requires_grad_(False)
            return model

        @classmethod
        def build_optimizer(cls, cfg, model):
            optimizer = build_optimizer(cfg, model)
            optimizer.param_groups[0]["momentum"] = 0.25
            return optimizer

        @classmethod
        def build_lr_scheduler(cls, cfg, optimizer):
            return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=0.5, total_iters=100)

    called = []
    trainer = Mine(config(tmp_path, "SOLVER.MAX_ITER", 2))
    trainer.resume_or_load(False)
    before = {k: v.clone() for k, v in trainer.model.named_parameters()}
    trainer.train()
    assert called == ["Names"] * 2 and not (tmp_path / "metrics.json").exists()
    changed = {k for k, v in trainer.model.named_parameters() if not torch.equal(v, before[k])}
    assert changed and not any(name.startswith("backbone") for name in changed)
    assert trainer.optimizer.param_groups[0]["momentum"] == 0.25
    assert trainer.optimizer.param_groups[0]["lr"] == 0.01 * 0.5


def test_a_loader_that_is_not_ours_trains(tmp_path, caplog):
    class Mine(Trainer):
        @classmethod
        def build_train_loader(cls, cfg):
            return batches

    batches = [next(iter(RepeatableTrainLoader(config(tmp_path))))] * 3
    trainer = Mine(config(tmp_path, "SOLVER.MAX_ITER", 3))
    assert "build_train_loader returned a list: which images it gives after --resume" in caplog.text
    assert not any(isinstance(hook, SeededIterations) for hook in trainer.build_hooks())
    trainer.train()
    assert trainer.iter == 3
    assert Mine(config(tmp_path)).resume_or_load(True) is None, "and it is resumed"


def test_results_that_are_expected_and_never_made(tmp_path):
    class Mine(Trainer):
        def build_hooks(self):
            return []

    keys = ("SOLVER.MAX_ITER", 1, "TEST.EXPECTED_RESULTS", "[['bbox', 'AP', 12.5, 0.1]]")
    with pytest.raises(ValueError, match=r"EXPECTED_RESULTS cannot be verified"):
        Mine(config(tmp_path, *keys)).train()


# The pieces, each alone


def sgd(*shapes):
    return torch.optim.SGD([nn.Parameter(torch.zeros(s)) for s in shapes], lr=1.0, momentum=0.5)


def stepped(*shapes):
    optimizer = sgd(*shapes)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.full_like(parameter, 3.0)
    optimizer.step()
    return optimizer.state_dict()


def test_moments_without_rates():
    optimizer = sgd((2, 3), 4)
    optimizer.param_groups[0].update(lr=0.125, momentum=0.75)
    resuming.take_moments(stepped((2, 3), 4), optimizer)
    moments = [s["momentum_buffer"] for s in optimizer.state.values()]
    assert [m.shape for m in moments] == [(2, 3), (4,)] and all((m == 3.0).all() for m in moments)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["momentum"]) == (0.125, 0.75)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 3),), r"parameters per group \[2\], now \[1\]"),
        (((2, 3), 5), r"shapes \['\(4,\) for \(5,\)'\]"),
    ],
)
def test_moments_of_another_model(shapes, message):
    optimizer = sgd(*shapes)
    with pytest.raises(ValueError, match=message):
        resuming.take_moments(stepped((2, 3), 4), optimizer)
    assert not optimizer.state


def test_what_can_be_gone_on_from():
    resuming.check_can_resume("a.pth", {"iteration": 6}, 7, 8, finished=False)
    resuming.check_can_resume("a.pth", {"iteration": 6}, 7, 8, finished=True)  # of fewer
    resuming.check_can_resume("a.pth", {"iteration": 7}, 8, 8, finished=False)
    with pytest.raises(ValueError, match=r"a\.pth has done 8 of SOLVER\.MAX_ITER 8"):
        resuming.check_can_resume("a.pth", {"iteration": 7}, 8, 8, finished=True)
    with pytest.raises(ValueError, match=r"a\.pth has done 9 of SOLVER\.MAX_ITER 8"):
        resuming.check_can_resume("a.pth", {"iteration": 8}, 9, 8, finished=False)
    with pytest.raises(ValueError, match=r"a\.pth holds weights alone"):
        resuming.check_can_resume("a.pth", {}, 1, 8, finished=False)


def test_stopping_is_no_error_and_errors_are():
    with stoppable():
        raise StopTraining("enough")
    with pytest.raises(ValueError), stoppable():
        raise ValueError


def test_a_step_of_the_config(tmp_path):
    model = nn.Linear(1, 1)
    parts = model, [], torch.optim.SGD(model.parameters(), lr=1.0)
    step = build_step(config(tmp_path, *AMP, "SOLVER.FPN_EXT.ACCUMULATE", 3), *parts)
    assert (step.batches, step.dtype) == (3, torch.bfloat16)
    assert type(build_step(config(tmp_path), *parts)) is SimpleTrainer
