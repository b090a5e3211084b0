"""Best checkpoint, early stopping, validation loss, EMA weights; alone, together, resumed."""

import contextlib
from typing import ClassVar

import fpn_ext
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from fpn_ext.bottom_up.freezing import freeze
from fpn_ext.engine.best import StopTraining
from fpn_ext.engine.ema import AveragedWeights
from fpn_ext.engine.repeatable import RepeatableTrainLoader, SeededIterations
from fpn_ext.engine.trainer import Trainer
from fpn_ext.engine.validation_loss import validation_loss
from fpn_ext.files.checkpoint import SafeCheckpointer
from fpn_ext.proposals.loader import build_validation_loader
from tiny import DATASET, config, leaves, register
from torch import nn


@pytest.fixture(scope="module", autouse=True)
def images(tmp_path_factory):
    register(tmp_path_factory.mktemp("images") / "tiny")
    yield
    DatasetCatalog.remove(DATASET)
    MetadataCatalog.remove(DATASET)


class Killed(Exception):
    """Simulates a kill."""


class Watch(HookBase):
    """Records the losses of each iteration; stops early."""

    def __init__(self, stop_after=None):
        self.losses = []
        self.stop_after = stop_after

    def after_step(self):
        self.losses.append(self.trainer.storage.latest()["total_loss"][0])
        if len(self.losses) == self.stop_after:
            raise Killed


class Scored(Trainer):
    """Its AP is a number by iteration."""

    scores: ClassVar = {2: 20.0, 4: 30.0, 6: 10.0, 8: 30.0}

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        return {}

    def evaluate(self):
        done = min(self.iter + 1, self.max_iter)
        super().evaluate()
        self.evaluated = [*getattr(self, "evaluated", []), done]
        return {"bbox": {"AP": self.scores[done], "AP50": 1.0}, "other": {"AP": 2.0}}


class Detectron2Trainer(DefaultTrainer):
    """Detectron2's trainer, with our data order and random numbers."""

    @classmethod
    def build_train_loader(cls, cfg):
        return RepeatableTrainLoader(cfg)

    def build_hooks(self):
        return [SeededIterations(self.data_loader), *super().build_hooks()]


class Losses(Trainer):
    """It has no scores but the losses on the test sets."""

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        return {}


def evaluated(folder, *opts):
    """A config that evaluates after each checkpoint."""
    opts = ("DATASETS.TEST", f"('{DATASET}',)", "INPUT.MIN_SIZE_TEST", 64, *opts)
    return config(folder, "TEST.EVAL_PERIOD", 2, *opts)


def train(trainer_class, cfg, resume=False, stop_after=None):
    torch.manual_seed(0)  # first weights
    trainer = trainer_class(cfg)
    trainer.watch = Watch(stop_after)
    trainer.register_hooks([trainer.watch])
    trainer.resume_or_load(resume)
    with contextlib.suppress(Killed):
        trainer.train()
    return trainer


def content(file):
    return leaves(torch.load(file, weights_only=True))


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    for path, value in one.items():
        same = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: a == b
        assert same(value, other[path]), path


@pytest.fixture
def log(caplog):
    caplog.set_level("INFO", logger="fpn_ext")
    return lambda: "\n".join(r.getMessage() for r in caplog.records if r.name.startswith("fpn_"))


EVERYTHING = [
    *(
        "SOLVER.AMP.ENABLED",
        True,
        "SOLVER.FPN_EXT.AMP_DTYPE",
        "bfloat16",
        "SOLVER.FPN_EXT.ACCUMULATE",
        2,
    ),
    *("SOLVER.FPN_EXT.EMA_DECAY", 0.5, "TEST.FPN_EXT.VALIDATION_LOSS", True),
    *("TEST.FPN_EXT.BEST_METRIC", "validation_loss/total_loss", "TEST.FPN_EXT.BEST_MODE", "min"),
]


@pytest.fixture(scope="module")
def straight(images, tmp_path_factory):
    """The folder and losses of 8 uninterrupted iterations with everything enabled."""
    folder = tmp_path_factory.mktemp("straight")
    return folder, train(Losses, evaluated(folder, *EVERYTHING)).watch.losses


@pytest.fixture(scope="module")
def plain(images, tmp_path_factory):
    """The folder and the trainer of 8 iterations without any of it."""
    folder = tmp_path_factory.mktemp("plain")
    return folder, train(Trainer, config(folder))


@pytest.mark.parametrize("stop_after", [3, 4, 6])
def test_stopped_and_resumed_ends_with_the_same_bits(straight, tmp_path, stop_after):
    """Stopped after 4 and 6, the evaluation due there is not in the checkpoint."""
    folder, losses = straight
    cfg = evaluated(tmp_path, *EVERYTHING)
    train(Losses, cfg, stop_after=stop_after)
    resumed = train(Losses, cfg, resume=True)
    begun = stop_after - stop_after % 2
    assert resumed.watch.losses == losses[begun:]
    names = {f.name for f in folder.glob("*.pth")}
    assert {"model_0000003.pth", "model_best.pth", "model_final.pth", "model_final_ema.pth"} < names
    for name in names:
        assert_same_bits(content(folder / name), content(tmp_path / name))


def test_a_config_without_the_keys_is_trained_as_by_detectron2(plain, tmp_path):
    """Losses, weights and momentum are those of DefaultTrainer, to the bit."""
    _, ours = plain
    theirs = train(Detectron2Trainer, config(tmp_path))
    assert ours.watch.losses == theirs.watch.losses and len(ours.watch.losses) == 8
    for part in ("model", "optimizer", "scheduler"):
        one, other = (leaves(getattr(t, part).state_dict()) for t in (ours, theirs))
        assert_same_bits(one, other)


def test_watching_a_training_does_not_alter_it(plain, tmp_path):
    """With validation loss, EMA and best checkpoint: the same weights, moments, losses."""
    folder, unwatched = plain
    trainer = train(Losses, evaluated(tmp_path, *EVERYTHING[6:]))
    assert trainer.watch.losses == unwatched.watch.losses
    before, after = content(folder / "model_final.pth"), content(tmp_path / "model_final.pth")
    kept = [p for p in before if p.startswith(("/model/", "/trainer/_trainer/"))]
    assert len(kept) > 100 and any("running_mean" in p for p in kept)
    assert_same_bits({p: before[p] for p in kept}, {p: after[p] for p in kept})


class CountsBackward(HookBase):
    def __init__(self):
        self.counted = 0

    def after_backward(self):
        self.counted += 1


def test_hooks_of_the_trainer_are_told_of_the_backward_pass(tmp_path):
    """Once an iteration, of two batches each."""
    trainer = Trainer(config(tmp_path, "SOLVER.FPN_EXT.ACCUMULATE", 2, "SOLVER.MAX_ITER", 3))
    counts = CountsBackward()
    trainer.register_hooks([counts])
    trainer.train()
    assert counts.counted == 3


# The best checkpoint and early stopping.


def best(tmp_path):
    file = torch.load(tmp_path / "model_best.pth", weights_only=True)
    return file["best"]


def test_the_best_by_a_metric(tmp_path):
    trainer = train(Scored, evaluated(tmp_path, "TEST.FPN_EXT.BEST_METRIC", "bbox/AP"))
    assert trainer.evaluated == [2, 4, 6, 8]
    assert best(tmp_path) == {"metric": "bbox/AP", "score": 30.0, "iteration": 4}
    weights = content(tmp_path / "model_0000003.pth")
    saved = content(tmp_path / "model_best.pth")
    names = [p for p in saved if p.startswith("/model/")]
    assert_same_bits({p: saved[p] for p in names}, {p: weights[p] for p in names})
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth", "to resume from"


def test_the_best_of_a_metric_to_be_small(tmp_path):
    keys = ("TEST.FPN_EXT.BEST_METRIC", "bbox/AP", "TEST.FPN_EXT.BEST_MODE", "min")
    train(Scored, evaluated(tmp_path, *keys))
    assert best(tmp_path)["iteration"] == 6


def test_the_best_is_remembered(tmp_path):
    """Detectron2's hook would start over and take the first score, that of iteration 6."""
    cfg = evaluated(tmp_path, "TEST.FPN_EXT.BEST_METRIC", "bbox/AP")
    train(Scored, cfg, stop_after=5)
    resumed = train(Scored, cfg, resume=True)
    assert resumed.evaluated == [4, 6, 8], "after 4 the checkpoint came first"
    assert best(tmp_path)["iteration"] == 4


def test_a_finished_training_that_goes_on_knows_its_last_score(tmp_path):
    class Longer(Scored):
        scores: ClassVar = {**Scored.scores, 7: 50.0, 10: 40.0}

    keys = ("SOLVER.MAX_ITER", 7, "TEST.FPN_EXT.BEST_METRIC", "bbox/AP")
    train(Longer, evaluated(tmp_path, *keys))
    assert best(tmp_path)["iteration"] == 7
    cfg = evaluated(tmp_path, *keys, "SOLVER.MAX_ITER", 10)
    assert train(Longer, cfg, resume=True).evaluated == [7, 8, 10]
    assert best(tmp_path)["iteration"] == 7


def test_other_data_to_score_on_begin_anew(tmp_path, caplog):
    """The score of iteration 2 was on other boxes."""

    class Better(Scored):
        scores: ClassVar = {**Scored.scores, 2: 90.0}

    cfg = evaluated(tmp_path, "TEST.FPN_EXT.BEST_METRIC", "bbox/AP")
    train(Better, cfg, stop_after=5)
    assert best(tmp_path)["iteration"] == 2
    read = DatasetCatalog.get(DATASET)
    original = DatasetCatalog.pop(DATASET)
    corrected = [{**record, "annotations": record["annotations"][:1]} for record in read]
    DatasetCatalog.register(DATASET, lambda: corrected)
    try:
        train(Better, cfg, resume=True)
    finally:
        DatasetCatalog.remove(DATASET)
        DatasetCatalog.register(DATASET, original)
    assert (
        "(DATASETS.TEST) changed since the checkpoint, whose best bbox/AP was 90.0" in caplog.text
    )
    assert best(tmp_path)["iteration"] == 4


def test_another_metric_begins_anew(tmp_path, caplog):
    train(Scored, evaluated(tmp_path, "TEST.FPN_EXT.BEST_METRIC", "bbox/AP"), stop_after=5)
    train(Scored, evaluated(tmp_path, "TEST.FPN_EXT.BEST_METRIC", "other/AP"), resume=True)
    assert "was bbox/AP (max) and is other/AP (max): looking for the best anew" in caplog.text
    assert best(tmp_path)["metric"] == "other/AP"


def test_a_metric_that_is_none(tmp_path):
    message = (
        r"BEST_METRIC: no score of this evaluation is named 'bbox/AP5'; nearest valid: "
        r"'bbox/AP50', 'bbox/AP'\. All: bbox/AP, bbox/AP50, other/AP"
    )
    with pytest.raises(ValueError, match=message):
        train(Scored, evaluated(tmp_path, "TEST.FPN_EXT.BEST_METRIC", "bbox/AP5"))
    assert (tmp_path / "model_0000001.pth").is_file(), "nothing is lost"


def test_scores_that_are_no_numbers(tmp_path):
    """Like AP without detections: not the best, and no reason to stop before the first score."""

    class Late(Scored):
        scores: ClassVar = {2: float("nan"), 4: float("nan"), 6: 1.0, 8: float("nan")}

    keys = ("TEST.FPN_EXT.BEST_METRIC", "bbox/AP", "TEST.FPN_EXT.EARLY_STOP_PATIENCE", 1)
    assert train(Late, evaluated(tmp_path, *keys)).evaluated == [2, 4, 6, 8]
    assert best(tmp_path)["iteration"] == 6


def test_scores_of_0_before_anything_is_found_are_no_reason_to_stop(tmp_path):
    class Slow(Scored):
        scores: ClassVar = {2: 0.0, 4: 0.0, 6: 1.0, 8: 1.0}

    keys = ("TEST.FPN_EXT.BEST_METRIC", "bbox/AP", "TEST.FPN_EXT.EARLY_STOP_PATIENCE", 1)
    trainer = train(Slow, evaluated(tmp_path, *keys))
    assert trainer.evaluated == [2, 4, 6, 8] and best(tmp_path)["iteration"] == 6
    assert trainer.best.num_worse == 1, "counted from iteration 6"


def test_a_loss_of_0_is_a_score_to_count_from(tmp_path):
    class Perfect(Scored):
        scores: ClassVar = {2: 0.0, 4: 0.0, 6: 1.0, 8: 1.0}

    keys = ("TEST.FPN_EXT.BEST_METRIC", "bbox/AP", "TEST.FPN_EXT.EARLY_STOP_PATIENCE", 1)
    trainer = train(Perfect, evaluated(tmp_path, *keys, "TEST.FPN_EXT.BEST_MODE", "min"))
    assert trainer.evaluated == [2, 4]


@pytest.mark.parametrize("period", [0, 2, 3])
@pytest.mark.parametrize("metric", ["", "bbox/AP"])
def test_the_last_iteration_is_evaluated_once(tmp_path, period, metric):
    class Counted(Scored):
        scores: ClassVar = {3: 1.0, **Scored.scores}

    if metric and not period:
        return  # refused: a best checkpoint needs a period
    keys = ("TEST.FPN_EXT.BEST_METRIC", metric or "''", "TEST.EVAL_PERIOD", period)
    trainer = train(Counted, evaluated(tmp_path, *keys))
    assert trainer.evaluated == {0: [8], 2: [2, 4, 6, 8], 3: [3, 6, 8]}[period]


PATIENCE = (
    "TEST.FPN_EXT.BEST_METRIC",
    "bbox/AP",
    "TEST.FPN_EXT.EARLY_STOP_PATIENCE",
    1,
    "SOLVER.FPN_EXT.EMA_DECAY",
    0.5,
)


def test_early_stopping_ends_as_training_does(tmp_path, log):
    trainer = train(Scored, evaluated(tmp_path, *PATIENCE))
    assert len(trainer.watch.losses) == 6 == trainer.iter
    assert trainer.evaluated == [2, 4, 6], "the last one once"
    assert trainer.storage.latest()["bbox/AP"] == (10.0, 5), "and it is logged"
    assert (
        "Stopped early after 6 iterations: bbox/AP was no better than 30.0 of iteration 4 in 1 "
        "evaluations (TEST.FPN_EXT.EARLY_STOP_PATIENCE 1)" in log()
    )
    assert content(tmp_path / "model_final.pth")["/iteration"] == 5
    assert (tmp_path / "model_final_ema.pth").is_file()
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"

    message = r"model_final\.pth was stopped early after 6 iterations: bbox/AP was no better than"
    with pytest.raises(ValueError, match=message):
        train(Scored, evaluated(tmp_path, *PATIENCE), resume=True)
    patient = train(Scored, evaluated(tmp_path, *PATIENCE[:3], 3), resume=True)
    assert patient.iter == 8 and patient.evaluated == [8]


def test_a_kill_before_the_early_stop(tmp_path):
    """After the checkpoint of 6 iterations, before their evaluation."""
    train(Scored, evaluated(tmp_path, *PATIENCE[:2]), stop_after=6)
    (tmp_path / "last_checkpoint").write_text("model_0000005.pth")
    resumed = train(Scored, evaluated(tmp_path, *PATIENCE), resume=True)
    assert resumed.watch.losses == [] and resumed.iter == 6
    assert resumed.evaluated == [6], "once"
    assert content(tmp_path / "model_final.pth")["/iteration"] == 5


def test_a_stop_is_no_error():
    assert not issubclass(StopTraining, Exception), "Detectron2 logs those with a traceback"


# The validation loss.


class DropPath(nn.Module):
    """As timm's: a class of its own, which training drops."""

    def forward(self, x):
        return x * 0 if self.training else x


class Model(nn.Module):
    """Its losses: the image through norms and dropout; and a random number."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.BatchNorm1d(1, affine=False), DropPath())
        self.head = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(1))
        self.register_buffer("count", torch.zeros(()), persistent=False)
        self.normalizer = 1.0

    def forward(self, batch):
        assert self.training
        self.count = self.count + 1
        self.normalizer *= 2
        images = torch.stack([record["image"] for record in batch])
        return {"loss_a": self.head(self.backbone(images)).mean(), "loss_b": torch.rand(()) * 0.5}


def one_by_one(*values):
    return [[{"image": torch.tensor([value])}] for value in values]


def test_validation_loss_is_a_mean_over_all_images():
    """By hand: norms with mean 0 and variance 1 leave an image as it is, up to their epsilon."""
    torch.manual_seed(0)
    drawn = torch.rand(()).item() * 0.5
    losses = validation_loss(Model(), [one_by_one(1.0, 2.0), one_by_one(6.0)])
    expected = {"loss_a": 3.0, "loss_b": drawn, "total_loss": 3.0 + drawn}
    assert losses == pytest.approx(expected, rel=1e-4)


def test_validation_loss_leaves_nothing_behind():
    model = Model()
    model.head.eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    with EventStorage() as storage:
        first = validation_loss(model, [one_by_one(1.0, 2.0)])
    assert torch.equal(torch.get_rng_state(), random)
    assert first == validation_loss(model, [one_by_one(1.0, 2.0)])
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.training and model.backbone.training and not model.head.training
    assert model.normalizer == 1.0 and model.count == 0
    assert not storage.latest()


def test_validation_loss_of_a_detector(images, tmp_path):
    cfg = evaluated(tmp_path)
    loaders = [build_validation_loader(cfg, DATASET)]
    assert {min(record["image"].shape[1:]) for (record,) in loaders[0]} == {64}
    model = build_model(cfg)
    losses = validation_loss(model, loaders)
    names = {"loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"}
    assert set(losses) == {*names, "total_loss"}
    assert losses["total_loss"] == pytest.approx(sum(losses[n] for n in names))
    assert validation_loss(model, loaders) == losses


def test_validation_loss_needs_ground_truth(images, tmp_path, monkeypatch):
    records = [{"file_name": "a.jpg", "height": 8, "width": 8, "image_id": 1, "annotations": []}]
    monkeypatch.setattr(fpn_ext.proposals.loader, "load_records", lambda names: records)
    cfg = evaluated(tmp_path, "TEST.FPN_EXT.VALIDATION_LOSS", True)
    with pytest.raises(ValueError, match=r"VALIDATION_LOSS needs ground truth: .*tiny_train"):
        fpn_ext.proposals.loader.build_validation_loader(cfg, "tiny_train")


def test_validation_loss_is_logged(straight):
    metrics = (straight[0] / "metrics.json").read_text()
    for name in ("loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc", "total_loss"):
        assert f'"validation_loss/{name}"' in metrics


# Averaged weights.


def test_the_average_by_hand(tmp_path):
    """Decay 3/4: from 8, with the weights 0 and 4 then, to 6 and to 5.5. Buffers are copied."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1))
    model[0].weight.data.fill_(8)
    checkpointer = SafeCheckpointer(model, str(tmp_path))
    hook = AveragedWeights(model, 0.75, checkpointer)
    hook.trainer = type("Trainer", (), {"model": model, "iter": 2, "max_iter": 2})
    hook.before_train()
    for weight, average in ((0.0, 6.0), (4.0, 5.5)):
        model[0].weight.data.fill_(weight)
        model[1].running_mean.fill_(weight)
        hook.after_step()
        assert hook.model[0].weight.item() == average
        assert hook.model[1].running_mean.item() == weight
    assert model[0].weight.item() == 4.0 and model[0].weight.requires_grad

    checkpointer.save("model_0000001")
    hook.after_train()
    exported = torch.load(tmp_path / "model_final_ema.pth", weights_only=True)
    assert exported["model"]["0.weight"].item() == 5.5
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"

    other = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1))
    checkpointer = SafeCheckpointer(other, str(tmp_path))
    again = AveragedWeights(other, 0.75, checkpointer)
    again.trainer = type("Trainer", (), {"model": other})
    checkpointer.resume_or_load("")
    again.before_train()
    assert (other[0].weight.item(), again.model[0].weight.item()) == (4.0, 5.5)


def test_the_average_of_frozen_weights_is_theirs(small_cfg, tmp_path):
    model = build_model(small_cfg)
    freeze(model, ["backbone.bottom_up"])
    hook = AveragedWeights(model, 0.999, SafeCheckpointer(model, str(tmp_path)))
    hook.trainer = type("Trainer", (), {"model": model})
    hook.before_train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    for _ in range(5):
        hook.after_step()
    averaged = hook.model.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(averaged[name], value) == name.startswith("backbone.bottom_up"), name


def test_averaged_weights_are_evaluated_and_exported(straight):
    folder, _ = straight
    final, ema = content(folder / "model_final.pth"), content(folder / "model_final_ema.pth")
    for path, value in ema.items():
        if path.startswith("/trained_on/"):
            assert value == final[path]
            continue
        assert torch.equal(value, final[path.replace("/model/", "/ema/module.")])
    parameters = [p for p in ema if "fpn_" in p and p.endswith(("weight", "bias"))]
    # P5 pools few boxes: this weight has moved from 1 by four roundings, too few for an average.
    still = {p for p in parameters if (final[p] - 1).abs().max() < 1e-6}
    assert still <= {"/model/backbone.fpn_output5.norm.weight"}
    assert len(parameters) == 8 * 3, "convolution, and weight and bias of its norm"
    assert not any(torch.equal(ema[p], final[p]) for p in parameters if p not in still)
    chosen = content(folder / "model_best.pth")
    iteration = chosen["/best/iteration"]
    name = "model_final.pth" if iteration == 8 else f"model_{iteration - 1:07}.pth"
    averaged = content(folder / name)
    for path in (p for p in ema if p.endswith("weight")):
        assert torch.equal(chosen[path], averaged[path.replace("/model/", "/ema/module.")])


def test_an_exported_file_is_begun_with(straight, tmp_path, log):
    file = straight[0] / "model_final_ema.pth"
    trainer = Losses(config(tmp_path, "MODEL.WEIGHTS", file, "SOLVER.FPN_EXT.EMA_DECAY", 0.9))
    trainer.resume_or_load(False)
    weights = torch.load(file, weights_only=True)["model"]
    assert all(torch.equal(v, weights[k]) for k, v in trainer.model.state_dict().items())
    assert f"Begun with the weights of {file}" in log()


# What check_config says.


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (
            ["SOLVER.FPN_EXT.AMP_DTYPE", "half"],
            r"AMP_DTYPE must be one of \('float16', 'bfloat16'\), got 'half'",
        ),
        (["SOLVER.FPN_EXT.ACCUMULATE", 0], "ACCUMULATE must be at least 1, got 0"),
        (["TEST.FPN_EXT.BEST_MODE", "best"], "BEST_MODE must be one of"),
        (["TEST.FPN_EXT.EARLY_STOP_PATIENCE", -1], "EARLY_STOP_PATIENCE must be 0"),
        (
            ["TEST.FPN_EXT.EARLY_STOP_PATIENCE", 2],
            "EARLY_STOP_PATIENCE needs the score to go by: set",
        ),
        (["SOLVER.FPN_EXT.EMA_DECAY", 1.0], "EMA_DECAY must be 0 .none. or more, under 1, got 1.0"),
        (["TEST.FPN_EXT.BEST_METRIC", "validation_loss/loss_cls"], "needs VALIDATION_LOSS True"),
        (["TEST.FPN_EXT.BEST_METRIC", "validation_loss/loss_cls"], "is a loss: set BEST_MODE min"),
        (
            ["TEST.FPN_EXT.BEST_METRIC", "bbox/AP"],
            "BEST_METRIC needs evaluations during training: set TEST",
        ),
        (
            ["TEST.FPN_EXT.VALIDATION_LOSS", True],
            "VALIDATION_LOSS needs evaluations during training: set TEST",
        ),
        (
            ["TEST.FPN_EXT.VALIDATION_LOSS", True],
            "VALIDATION_LOSS needs a dataset in DATASETS.TEST, which is",
        ),
    ],
)
def test_keys_that_do_not_fit(tmp_path, opts, message):
    cfg = config(tmp_path, *opts)
    with pytest.raises(ValueError, match=message):
        fpn_ext.check_config(cfg, training=True)


def test_float16_on_a_cpu(tmp_path):
    cfg = config(tmp_path, "SOLVER.AMP.ENABLED", True)
    with pytest.raises(ValueError, match=r"float16 needs a GPU; on CPU set .*AMP_DTYPE bfloat16"):
        fpn_ext.check_config(cfg, training=True)
    fpn_ext.check_config(cfg)
    cfg.SOLVER.FPN_EXT.AMP_DTYPE = "bfloat16"
    fpn_ext.check_config(cfg, training=True)
