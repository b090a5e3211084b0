"""Signals: the iteration is finished, a checkpoint written, and resuming loses nothing."""

import os
import signal
import subprocess
import sys
import time
from typing import ClassVar

import pytest
import torch
import two_processes
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import HookBase
from detectron2.engine.hooks import EvalHook
from fpn_ext.__main__ import main
from fpn_ext.engine import distributed, finished
from fpn_ext.engine.interrupts import (
    Interrupted,
    Interrupts,
    interruptible,
    leave_signals_to_the_trainer,
)
from fpn_ext.engine.trainer import Trainer
from fpn_ext.tools.train import signal_number
from test_distributed import options_of
from tiny import DATASET, FILE, config, leaves, options, register


@pytest.fixture(scope="module", autouse=True)
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images") / "tiny"
    register(folder)
    yield folder
    DatasetCatalog.remove(DATASET)
    MetadataCatalog.remove(DATASET)


@pytest.fixture(autouse=True)
def usual_handlers():
    """Python's: in the background of a script, SIGINT is ignored."""
    usual = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
        signal.SIGUSR1: signal.SIG_DFL,
    }
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Before(HookBase):
    """Does something before an iteration, counted from 1."""

    def __init__(self, iteration, do):
        self.iteration = iteration
        self.do = do

    def before_step(self):
        if self.trainer.iter + 1 == self.iteration:
            self.do()


def signal_in(iteration, number=signal.SIGTERM):
    """A hook that sends this process a signal."""
    return Before(iteration, lambda: os.kill(os.getpid(), number))


class Scored(Trainer):
    """Its AP is a number; the evaluation after some iterations is met by a signal."""

    signals: ClassVar = {}

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        return {"bbox": {"AP": 1.0}}

    def evaluate(self):
        done = min(self.iter + 1, self.max_iter)
        self.evaluated = [*getattr(self, "evaluated", []), done]
        return super().evaluate()


class ScoredOnce(Scored):
    """The evaluation after 4 iterations is met by a signal."""

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        if cls.signals.pop("next", None):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
            pytest.fail("the evaluation went on")
        return super().test(cfg, model, evaluators)


def begun(cfg, trainer_class=Trainer, resume=False):
    torch.manual_seed(0)  # first weights
    trainer = trainer_class(cfg)
    trainer.resume_or_load(resume)
    return trainer


def content(file):
    return leaves(torch.load(file, weights_only=True))


def same_bits(one, other):
    equal = lambda a, b: torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b  # noqa: E731
    return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)


@pytest.fixture(scope="module")
def straight(images, tmp_path_factory):
    """The folder of 8 iterations that nothing interrupted."""
    folder = tmp_path_factory.mktemp("straight")
    begun(config(folder)).train()
    return folder


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"])
@pytest.mark.parametrize(("iteration", "checkpoint"), [(3, "0000002"), (8, "final")])
def test_the_iteration_is_finished_and_nothing_is_lost(
    straight, tmp_path, name, iteration, checkpoint
):
    number = signal.Signals[name]
    trainer = begun(config(tmp_path))
    trainer.register_hooks([signal_in(iteration, number)])
    with pytest.raises(Interrupted) as info, interruptible([signal.SIGUSR1]) as trainer.interrupts:
        trainer.train()
    assert (info.value.name, info.value.status) == (name, 128 + number)
    assert (tmp_path / "last_checkpoint").read_text() == f"model_{checkpoint}.pth"
    assert content(tmp_path / f"model_{checkpoint}.pth")["/iteration"] == iteration - 1
    assert not finished.is_finished(tmp_path)
    begun(config(tmp_path), resume=True).train()
    assert same_bits(content(straight / "model_final.pth"), content(tmp_path / "model_final.pth"))
    assert finished.is_finished(tmp_path)


def test_evaluations_of_ones_own_are_left_to_resuming(tmp_path):
    scored = []
    trainer = begun(config(tmp_path))
    trainer.register_hooks([EvalHook(0, lambda: scored.append("interrupted")), signal_in(8)])
    with pytest.raises(Interrupted), interruptible() as trainer.interrupts:
        trainer.train()
    resumed = begun(config(tmp_path), resume=True)
    resumed.register_hooks([EvalHook(0, lambda: scored.append("resumed"))])
    resumed.train()
    assert scored == ["resumed"]


@pytest.mark.parametrize("evaluation", [4, 8])
def test_an_evaluation_is_left_at_once_and_done_by_resuming(tmp_path, evaluation):
    opts = "TEST.EVAL_PERIOD", 4, "TEST.FPN_EXT.BEST_METRIC", "bbox/AP"
    cfg = config(tmp_path, *opts, "DATASETS.TEST", f"('{DATASET}',)")

    trainer = begun(cfg, ScoredOnce)
    trainer.register_hooks([Before(evaluation, lambda: ScoredOnce.signals.update(next=True))])
    with pytest.raises(Interrupted), interruptible() as trainer.interrupts:
        trainer.train()
    assert trainer.evaluated[-1] == evaluation
    resumed = begun(cfg, Scored, resume=True)
    resumed.train()
    assert resumed.evaluated == list(range(evaluation, 9, 4)), "each once"
    assert content(tmp_path / "model_best.pth")["/best/score"] == 1.0


def test_what_was_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a script's background
    try:
        with interruptible() as interrupts:
            os.kill(os.getpid(), signal.SIGINT)
            interrupts.check()
    finally:
        signal.signal(signal.SIGINT, before)


def test_handlers_are_those_of_before_afterwards():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with interruptible():
        assert signal.getsignal(signal.SIGTERM) is not before[0]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_signal_that_comes_twice_within_a_second_is_one():
    with interruptible() as interrupts:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Interrupted, match=str(int(signal.SIGTERM))):
            interrupts.check()


def test_without_handlers_nothing_is_asked():
    Interrupts().check()


def wait_for(files):
    deadline = time.monotonic() + 120
    while not all(file.exists() for file in files):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def in_a_process(function):
    """How a forked process ended that called a function: its exit status, or -signal."""
    process = os.fork()
    if not process:
        status = 1
        try:
            function()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def test_a_second_signal_ends_at_once():
    def twice():
        with interruptible():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1.2)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)

    assert in_a_process(twice) == -signal.SIGTERM


def test_a_process_that_loads_data_leaves_signals_to_the_trainer():
    def signalled():
        leave_signals_to_the_trainer(0)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            os.kill(os.getpid(), number)
        time.sleep(0.2)

    assert in_a_process(signalled) == 0


def test_a_process_that_loads_data_ends_when_its_trainer_says_so():
    ready, tell = os.pipe()
    process = os.fork()
    if not process:
        leave_signals_to_the_trainer(0)
        os.write(tell, b"!")
        time.sleep(30)
        os._exit(0)
    os.read(ready, 1)
    os.kill(process, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 128 + signal.SIGTERM


def test_the_command_exits_as_shells_count(tmp_path, images):
    """Workers that load data get the signal too, as from a terminal."""
    words = options(tmp_path, "DATALOADER.NUM_WORKERS", 2, "SOLVER.MAX_ITER", 4000)
    command = ["train", "--config-file", FILE, "--stop-signal", "usr2", *words]
    process = subprocess.Popen(
        [sys.executable, "tests/tiny_command.py", images, *command],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
    )
    wait_for([tmp_path / "model_0000001.pth"])
    os.killpg(process.pid, signal.SIGUSR2)
    assert process.wait(60) == 128 + signal.SIGUSR2
    last = (tmp_path / "last_checkpoint").read_text()
    done = content(tmp_path / last)["/iteration"] + 1
    assert last == f"model_{done - 1:07d}.pth"
    log = (tmp_path / "log.txt").read_text()
    assert f"SIGUSR2: stopped after {done} of 4000 iterations" in log
    assert "the same command with --resume goes on" in log
    assert not (tmp_path / "run.lock").exists()


@pytest.mark.parametrize("name", ["KILL", "SIGSTOP", "nothing", ""])
def test_no_signal_to_react_to(name, capsys):
    assert main(["train", "--config-file", FILE, "--stop-signal", name]) == 2
    assert "is no signal that can be reacted to" in capsys.readouterr().err


def test_names_of_signals():
    assert signal_number("usr1") == signal_number("SIGUSR1") == signal.SIGUSR1


@pytest.mark.slow
@pytest.mark.parametrize("asked", ["launcher", "rank 1"])
def test_both_of_two_processes_stop(tmp_path, asked):
    """The launcher passes it on and exits as a single process would; one process asks the other."""
    args = options_of(["--num-processes", "2"])
    args.folder = tmp_path
    launcher = os.fork()
    if not launcher:
        os.setpgid(0, 0)
        status = 1
        try:
            distributed.launch(two_processes.wait_for_a_signal, args, "cpu")
        except SystemExit as end:
            status = end.code
        finally:
            os._exit(status)
    files = [tmp_path / f"waiting_{rank}" for rank in (0, 1)]
    wait_for(files)
    time.sleep(0.1)
    os.kill(launcher if asked == "launcher" else int(files[1].read_text()), signal.SIGTERM)
    deadline = time.monotonic() + 60
    while not (ended := os.waitpid(launcher, os.WNOHANG))[0] and time.monotonic() < deadline:
        time.sleep(0.05)
    if not ended[0]:
        os.killpg(launcher, signal.SIGKILL)
        ended = os.waitpid(launcher, 0)
    assert os.waitstatus_to_exitcode(ended[1]) == 128 + signal.SIGTERM
    rounds = [(tmp_path / f"rounds_{rank}").read_text() for rank in (0, 1)]
    assert rounds[0] == rounds[1] != "0"


# What a finished training consists of.

EMA = "SOLVER.FPN_EXT.EMA_DECAY", 0.5


def test_what_is_missing_after_the_last_iteration_is_completed(tmp_path):
    opts = *EMA, "DATASETS.TEST", f"('{DATASET}',)", "INPUT.MIN_SIZE_TEST", 64
    cfg = config(tmp_path, *opts)
    begun(cfg).train()
    names = finished.files_of(cfg)
    assert names == [
        "model_final.pth",
        "model_final_ema.pth",
        f"inference/{DATASET}/results.json",
    ]
    before = {name: (tmp_path / name).read_bytes() for name in names}
    with pytest.raises(ValueError, match=r"done 8 of SOLVER\.MAX_ITER 8 iterations: nothing"):
        begun(cfg, resume=True)
    for missing in names:  # as a kill before the record was written leaves it
        for name in (missing, finished.RECORD):
            (tmp_path / name).unlink()
        if missing == names[0]:
            (tmp_path / "last_checkpoint").write_text("model_0000007.pth")
        begun(cfg, resume=True).train()
        assert {name: (tmp_path / name).read_bytes() for name in names} == before
    (tmp_path / names[1]).unlink()
    assert not finished.is_finished(tmp_path), "whatever became of it"


def test_a_training_that_goes_on_is_not_finished(tmp_path):
    begun(config(tmp_path)).train()
    trainer = begun(config(tmp_path, "SOLVER.MAX_ITER", 10), resume=True)
    trainer.register_hooks([signal_in(9)])
    with pytest.raises(Interrupted), interruptible() as trainer.interrupts:
        trainer.train()
    assert not finished.is_finished(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", '{"files": 3}', "{}"])
def test_a_record_that_is_none(tmp_path, content):
    (tmp_path / finished.RECORD).write_text(content)
    assert not finished.is_finished(tmp_path)
