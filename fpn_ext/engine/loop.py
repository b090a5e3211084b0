"""The loop of iterations, which a signal stops after any of them without loss."""

import logging
from pathlib import Path
from typing import Any

import torch
from detectron2.engine import SimpleTrainer, hooks
from detectron2.engine.train_loop import TrainerBase
from detectron2.utils import comm
from torch import nn

from ..files.checkpoint import SafeCheckpointer
from .best import stoppable
from .interrupts import Interrupted, Interrupts

logger = logging.getLogger(__name__)


class TrainingLoop(TrainerBase):
    """Detectron2's TrainerBase around a trainer of one iteration.

    Attributes:
        step (SimpleTrainer): does one iteration; holds ``model``, ``optimizer``, ``data_loader``.
        checkpointer (SafeCheckpointer): of everything to resume from.
        interrupts (Interrupts): replace it by that of
            :func:`fpn_ext.engine.interrupts.interruptible` to have signals stop the training, as
            ``fpn-ext train`` does.
    """

    step: SimpleTrainer
    checkpointer: SafeCheckpointer

    def __init__(self) -> None:
        super().__init__()
        self.interrupts = Interrupts()
        self._completed = 0  # iterations

    @property
    def model(self) -> nn.Module:
        return self.step.model

    @model.setter
    def model(self, value: nn.Module) -> None:
        self.step.model = value

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.step.optimizer

    @optimizer.setter
    def optimizer(self, value: torch.optim.Optimizer) -> None:
        self.step.optimizer = value

    @property
    def data_loader(self) -> Any:
        return self.step.data_loader

    @data_loader.setter
    def data_loader(self, value: Any) -> None:
        self.step.data_loader = value

    def loop(self) -> None:
        """Iterate from ``start_iter`` to ``max_iter``, or until stopped early.

        Raises:
            Interrupted: by a signal; a checkpoint of the completed iterations has been written.
        """
        self._completed = self.start_iter
        try:
            with stoppable():
                super().train(self.start_iter, self.max_iter)
        except Interrupted as interrupted:
            self._save_completed()
            logger.info(
                "%s: stopped after %d of %d iterations",
                *(interrupted.name, self._completed, self.max_iter),
            )
            raise

    def run_step(self) -> None:
        self.step.iter = self.iter
        self.step.run_step()

    def after_step(self) -> None:
        self._completed = self.iter + 1
        super().after_step()

    def after_train(self) -> None:
        """As Detectron2's; after an interruption without evaluations, which resuming does."""
        self.storage.iter = self.iter
        interrupted = None
        for hook in self._hooks:
            if self.interrupts.raised and isinstance(hook, hooks.EvalHook):
                continue
            try:
                hook.after_train()
            except Interrupted as signalled:
                interrupted = signalled
        if interrupted:
            raise interrupted

    def _save_completed(self) -> None:
        """Write a checkpoint of the completed iterations, unless that is there."""
        name = f"model_{self._completed - 1:07d}"
        last = Path(self.checkpointer.get_checkpoint_file()).name
        is_written = last == f"{name}.pth" or self._completed == self.max_iter
        if self._completed > self.start_iter and not is_written:
            self.iter = self._completed - 1  # the last completed
            self.checkpointer.save(name, iteration=self.iter)
        comm.synchronize()
