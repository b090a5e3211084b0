"""The trainer: assembles everything that a training consists of.

A counterpart of Detectron2's DefaultTrainer. :mod:`fpn_ext.engine.steps` does one iteration;
:mod:`fpn_ext.engine.repeatable` defines data order and random numbers;
:mod:`fpn_ext.engine.resuming` restores checkpoints, :mod:`fpn_ext.files.checkpoint` writes them.
Keys of ``SOLVER.FPN_EXT`` and ``TEST.FPN_EXT`` (docs/guides/training.md) enable
:mod:`fpn_ext.engine.best`, :mod:`fpn_ext.engine.ema` and :mod:`fpn_ext.engine.validation_loss`.
"""

import logging
import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase, default_writers, hooks
from detectron2.evaluation import DatasetEvaluator, verify_results
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler, build_optimizer
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from detectron2.utils.logger import setup_logger
from fvcore.nn.precise_bn import get_bn_modules
from torch import nn

from ..bottom_up.freezing import freeze
from ..evaluation.evaluators import build_evaluator
from ..files.checkpoint import SafeCheckpointer
from ..keys import own_keys
from ..proposals.loader import build_test_loader, build_validation_loader, training_data
from ..registries.lookup import is_pyramid
from ..speed.folded_norms import fold_frozen_norms
from ..speed.winograd_training import train_with_winograd
from . import resuming, testing
from .best import StopTraining, build_best_checkpoint
from .ema import AveragedWeights
from .finished import is_finished, mark_finished, mark_unfinished
from .loop import TrainingLoop
from .nonfinite import NonFiniteGuard
from .progress import ProgressWriter
from .repeatable import RepeatableTrainLoader, seeded_iterations
from .schedule import scale_schedule
from .steps import AfterBackward, build_step, in_all_processes
from .testing import changed
from .trained_on import (
    check_data_to_go_on_with,
    record_in,
    say_what_is_other,
    write_beside_config,
)
from .validation_loss import validation_loss

logger = logging.getLogger(__name__)


class Trainer(TrainingLoop):
    """Trains, evaluates and checkpoints the model of a config; subclass it as DefaultTrainer.

    A subclass may override each of ``build_model``, ``build_optimizer``, ``build_train_loader``,
    ``build_lr_scheduler``, ``build_test_loader``, ``build_evaluator``, ``build_hooks``,
    ``build_writers``, ``test`` and ``test_with_TTA``.

    A killed and resumed training ends with the same bits as an uninterrupted one, provided that
    arithmetic is deterministic: one machine, and on CPU the same number of threads; on a GPU,
    ``SOLVER.FPN_EXT.DETERMINISTIC`` requests it from PyTorch. Exceptions: ``TEST.PRECISE_BN``,
    as Detectron2's hook reads images in a different order, and a ``build_train_loader`` that
    returns anything other than a RepeatableTrainLoader.

    Three ways to start, each logging what it loads: :meth:`resume_or_load` loads everything, or
    only weights; :meth:`extend` loads weights and the optimizer state.

    Args:
        cfg: a config made by :func:`fpn_ext.get_cfg`; scaled to the number of processes here
            (:func:`fpn_ext.engine.schedule.scale_schedule`).

    Attributes:
        cfg (CfgNode): the scaled config, with ``TEST.AUG.ENABLED`` False: test-time augmentation
            is slow and runs only after training.
        step (SimpleTrainer): does one iteration; holds ``model`` (in DistributedDataParallel if
            there are several processes), ``optimizer`` and ``data_loader``.
        scheduler: the learning-rate scheduler.
        checkpointer (SafeCheckpointer): of model, optimizer, hooks and trainer state.
        averaged (AveragedWeights or None): with ``SOLVER.FPN_EXT.EMA_DECAY``.
        trained_on (TrainedOn): what is in every checkpoint.
        best (BestCheckpoint or None): with ``TEST.FPN_EXT.BEST_METRIC``.
        last_results (dict or None): the latest results of ``test``.
        iter, start_iter, max_iter (int): as in Detectron2: the current iteration, the first of
            this run, and the total number.
    """

    def __init__(self, cfg: CfgNode):
        super().__init__()
        if not logging.getLogger("detectron2").isEnabledFor(logging.INFO):
            setup_logger()  # unless the script did; as DefaultTrainer does
        cfg, _ = scale_schedule(cfg, comm.get_world_size())
        self.cfg = changed(cfg, "TEST.AUG.ENABLED", False) if cfg.TEST.AUG.ENABLED else cfg

        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        self.step = build_step(cfg, in_all_processes(model), data_loader, optimizer)
        self.step.register_hooks([AfterBackward(self)])
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.max_iter = cfg.SOLVER.MAX_ITER

        self.checkpointer = SafeCheckpointer(
            self.model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self)
        )
        self.trained_on = record_in(self.checkpointer, cfg, data_loader)
        self._restored: dict[str, Any] = {}
        self.last_results: dict[str, Any] | None = None
        self._validation_loaders = [
            build_validation_loader(cfg, name)
            for name in (cfg.DATASETS.TEST if own_keys(cfg, "TEST").VALIDATION_LOSS else ())
        ]
        self.best = build_best_checkpoint(cfg, self.evaluate, self._export_best)
        self.averaged: AveragedWeights | None = None
        decay = own_keys(cfg, "SOLVER").EMA_DECAY
        if decay > 0:
            self.averaged = AveragedWeights(self.model, decay, self.checkpointer)

        self.register_hooks(self.build_hooks())
        if cfg.TEST.AUG.ENABLED:
            self.register_hooks([hooks.EvalHook(0, self._evaluate_augmented)])  # at the end

    # ------------------------------------------------------------------ components

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """The model of ``MODEL.META_ARCHITECTURE``, frozen and optimized as configured."""
        keys = own_keys(cfg)
        model = build_model(cfg)
        logger.info("Model:\n%s", model)
        freeze(model, keys.FREEZE)
        if keys.FOLD_NORMS:
            fold_frozen_norms(model)
        if keys.WINOGRAD:
            train_with_winograd(model)
        return model

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        """An endless loader: a RepeatableTrainLoader, or any that Detectron2 accepts."""
        return RepeatableTrainLoader(cfg, **training_data(cfg))

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer) -> Any:
        return build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        return build_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None
    ) -> DatasetEvaluator:
        """The evaluator selected by a dataset's metadata; it writes to a folder per dataset.

        In Detectron2's single folder, the second dataset overwrites the files of the first.
        """
        folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name)
        return build_evaluator(cfg, dataset_name, folder)

    def build_hooks(self) -> list[HookBase]:
        """The hooks, in order of execution."""
        cfg, main_process = self.cfg, comm.is_main_process()
        around = [
            seeded_iterations(self.data_loader, own_keys(cfg, "SOLVER").ACCUMULATE),
            hooks.IterationTimer(warmup_iter=1),  # the first line of progress has a time
            hooks.LRScheduler(),
            self._precise_bn(),
            self.averaged,  # before the checkpoint that holds it
            hooks.PeriodicCheckpointer(self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD)
            if main_process
            else None,
            # After the checkpoint: a failing evaluation loses nothing.
            self.best or hooks.EvalHook(cfg.TEST.EVAL_PERIOD, self.evaluate),
            ProgressWriter(self.build_writers()) if main_process else None,
            NonFiniteGuard(cfg),  # last: it raises
        ]
        return [hook for hook in around if hook is not None]

    def build_writers(self) -> list[EventWriter]:
        """Writers of metrics: Detectron2's log lines, metrics.json and TensorBoard."""
        return default_writers(self.cfg.OUTPUT_DIR, self.max_iter)

    def _precise_bn(self) -> hooks.PreciseBN | None:
        cfg = self.cfg
        if not (cfg.TEST.PRECISE_BN.ENABLED and get_bn_modules(self.model)):
            return None
        loader = self.build_train_loader(changed(cfg, "DATALOADER.NUM_WORKERS", 0))
        test = cfg.TEST
        return hooks.PreciseBN(test.EVAL_PERIOD, self.model, loader, test.PRECISE_BN.NUM_ITER)

    # ------------------------------------------------------------------ starting

    def resume_or_load(self, resume: bool = True) -> None:
        """Start from OUTPUT_DIR's last checkpoint, else from the weights of MODEL.WEIGHTS.

        Without any checkpoint in the folder, ``resume`` has no effect. If all iterations are done,
        what remains of :func:`fpn_ext.engine.finished.files_of` is.

        Raises:
            ValueError: nothing remains, the training was stopped early, the checkpoint holds
                only weights or those of another model; or what
                :meth:`fpn_ext.files.checkpoint.SafeCheckpointer.resume_or_load` raises.
        """
        weights = self.cfg.MODEL.WEIGHTS
        configured = list(self.scheduler.base_lrs)
        checkpoint = self.checkpointer.resume_or_load(weights, resume=resume)
        if not (resume and self.checkpointer.has_checkpoint()):
            say_what_is_other(self.cfg, weights, checkpoint, self.trained_on)
            weights = weights or (is_pyramid(self.cfg) and own_keys(self.cfg).BOTTOM_UP_WEIGHTS)
            self._say(f"Begun with the weights of {weights}" if weights else "Begun from scratch")
            return
        file = self.checkpointer.file
        self.start_iter = self.iter + 1  # a checkpoint holds the last completed iteration
        finished = comm.all_gather(is_finished(Path(self.cfg.OUTPUT_DIR)))[0]
        resuming.check_can_resume(file, self._restored, self.start_iter, self.max_iter, finished)
        if self.best and self.best.exhausted and finished:
            raise ValueError(
                f"{file} was stopped early after {self.start_iter} iterations: {self.best}. Raise "
                "TEST.FPN_EXT.EARLY_STOP_PATIENCE, or set it to 0, to go on; or evaluate it with "
                "fpn-ext eval --resume"
            )
        resuming.follow_schedule(self.scheduler, self.optimizer)
        resuming.warn_of_changes(
            file, self._restored, self.cfg, self.scheduler.base_lrs, configured
        )
        check_data_to_go_on_with(self.cfg, file, checkpoint, self.trained_on)
        self._say(f"Resumed {file}: weights, optimizer, learning rate, order of images")

    def extend(self) -> None:
        """Start a new schedule with the weights and optimizer state of MODEL.WEIGHTS.

        The iteration is 0; learning rate, steps, weight decay and momentum are the config's.

        Raises:
            ValueError: MODEL.WEIGHTS holds no optimizer state, or another model's.
        """
        file = self.cfg.MODEL.WEIGHTS
        checkpoint = self.checkpointer.load(file, checkpointables=[])
        state = checkpoint.get("trainer", {})
        if "_trainer" not in state:
            raise ValueError(
                f"--extend: {file} holds no state of an optimizer; leave --extend out to begin "
                "with its weights alone"
            )
        resuming.take_moments(state["_trainer"]["optimizer"], self.optimizer)
        self._restored = state
        say_what_is_other(self.cfg, file, checkpoint, self.trained_on)
        self._say(f"Extended {file}: its weights and optimizer, a new schedule")

    def _say(self, what: str) -> None:
        rate = self.optimizer.param_groups[0]["lr"]
        resuming.say_begun(what, self.cfg, self.start_iter, rate, self._restored)

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        state["_trainer"] = self.step.state_dict()
        state["schedule"] = resuming.schedule_of(self.cfg)
        state["config"] = resuming.compared_keys(self.cfg)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._restored = state
        if "_trainer" in state:
            resuming.check_optimizer(state["_trainer"]["optimizer"], self.optimizer)
            self.step.load_state_dict(state["_trainer"])
        else:
            logger.warning(
                "The checkpoint holds no state of the optimizer, as those of Detectron2 v0.6: "
                "momentum begins at zero"
            )

    # ------------------------------------------------------------------ training

    def train(self) -> dict[str, Any] | None:
        """Train from ``start_iter`` to ``max_iter``, or until the patience is exhausted.

        Returns:
            With ``TEST.EXPECTED_RESULTS``, in the main process: the latest results of ``test``.

        Raises:
            ValueError: results are expected but nothing was evaluated.
            Interrupted: by a signal, see ``interrupts``; everything is in a checkpoint.
        """
        if 0 < self.start_iter == self.max_iter and comm.is_main_process():
            # Killed between the checkpoint of the last iteration and this one.
            self.checkpointer.save("model_final", iteration=self.iter)
        self.loop()
        if comm.is_main_process():
            mark_finished(self.cfg, self.max_iter)
        if not (self.cfg.TEST.EXPECTED_RESULTS and comm.is_main_process()):
            return None
        if self.last_results is None:
            raise ValueError(
                "TEST.EXPECTED_RESULTS cannot be verified, for nothing was evaluated: keep the "
                "EvalHook in build_hooks, or leave the key empty"
            )
        verify_results(self.cfg, self.last_results)
        return self.last_results

    def before_train(self) -> None:
        super().before_train()
        write_beside_config(self.trained_on, self.cfg.OUTPUT_DIR)
        if comm.is_main_process():
            mark_unfinished(self.cfg)
        self._stop_if_exhausted(self.start_iter)

    def after_step(self) -> None:
        super().after_step()
        self._stop_if_exhausted(self.iter + 1)
        self.interrupts.check()

    def _stop_if_exhausted(self, iterations: int) -> None:
        # Not in a hook: hooks registered after it would miss the last iteration.
        if not (self.best and self.best.exhausted):
            return
        self.iter = iterations - 1  # the last completed iteration
        self.checkpointer.save("model_final", iteration=self.iter)
        self.iter = self.max_iter = iterations
        raise StopTraining(f"Stopped early after {iterations} iterations: {self.best}")

    # ------------------------------------------------------------------ evaluation

    @property
    def evaluated_model(self) -> nn.Module:
        """The trained model; with ``SOLVER.FPN_EXT.EMA_DECAY``, the one with averaged weights."""
        return self.averaged.model if self.averaged else self.model

    def evaluate(self) -> dict[str, Any]:
        """Results of ``test``, plus ``validation_loss`` with ``TEST.FPN_EXT.VALIDATION_LOSS``."""
        model = self.evaluated_model
        with self.interrupts.at_once(), testing.during_training(self.cfg):
            results = self.last_results = self.test(self.cfg, model)
            if self._validation_loaders:
                losses = validation_loss(model, self._validation_loaders)
                results = {**results, "validation_loss": losses}
        return results

    def _evaluate_augmented(self) -> dict[str, Any]:
        with self.interrupts.at_once(), testing.during_training(self.cfg):
            return self.test_with_TTA(self.cfg, self.evaluated_model)

    def _export_best(self, **kwargs: Any) -> None:
        self.checkpointer.export("model_best", self.evaluated_model, **kwargs)

    @classmethod
    def test(
        cls,
        cfg: CfgNode,
        model: nn.Module,
        evaluators: DatasetEvaluator | Sequence[DatasetEvaluator] | None = None,
    ) -> dict[str, Any]:
        """Scores of a model on ``DATASETS.TEST``; called in all processes.

        With ``TEST.AUG.ENABLED`` and no ``evaluators`` given, also the results of
        :meth:`test_with_TTA`. Files go to ``OUTPUT_DIR/inference/DATASET``.

        Args:
            model: with loaded weights; may be wrapped in DistributedDataParallel.
            evaluators: one per dataset, instead of those of ``build_evaluator``.

        Returns:
            {dataset: {task: {metric: value}}}; {task: ...} for a single dataset.

        Raises:
            ValueError: the number of evaluators is not that of datasets.
        """
        build = cls.build_test_loader, cls.build_evaluator
        results = testing.score(cfg, model, *build, evaluators)
        if cfg.TEST.AUG.ENABLED and evaluators is None:
            augmented = testing.by_dataset(cfg, cls.test_with_TTA(cfg, model))
            for name, scores in results.items():
                scores.update(augmented[name])
        return testing.unnested(results)

    @classmethod
    def test_with_TTA(cls, cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
        """Scores with Detectron2's test-time augmentation: an image pyramid and flips.

        As :meth:`test`, with task names ending in ``_TTA``; ``TEST.AUG`` sets the sizes. Files go
        to ``OUTPUT_DIR/inference_TTA/DATASET``.
        """
        build = cls.build_test_loader, cls.build_evaluator
        return testing.unnested(testing.score_augmented(cfg, model, *build))
