"""The trainer that a config's recipe asks for: what it adds to Detectron2's, part by part.

Mixed precision and several batches a step are :mod:`fpn_ext.steps`, averaged weights
:mod:`fpn_ext.ema`, the best checkpoint and early stopping :mod:`fpn_ext.best`, losses on the test
sets :mod:`fpn_ext.validation_loss`. A config without their keys gets ResumableTrainer's training.
"""

import warnings
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.engine.hooks import EvalHook, PeriodicCheckpointer
from torch import nn

from .best import BestCheckpoint, StoppableLoop, StopTraining
from .ema import AveragedWeights
from .nonfinite import amp_dtype
from .proposal_loader import build_validation_loader
from .steps import MicroBatchTrainer
from .trainer import ResumableTrainer
from .validation_loss import validation_loss


class RecipeTrainer(ResumableTrainer, StoppableLoop):
    """ResumableTrainer with what ``MODEL.FPN_EXT`` and ``SOLVER.AMP`` ask for.

    docs/guides/training.md describes each.

    Evaluations are of :attr:`evaluated_model`. All of it is in the checkpoints, and a resumed
    training ends as one that was not interrupted.
    """

    def __init__(self, cfg: CfgNode):
        with warnings.catch_warnings():  # of the AMPTrainer that build_hooks replaces
            warnings.filterwarnings("ignore", message=".*torch.cuda.amp.GradScaler")
            super().__init__(cfg)

    def build_hooks(self) -> list[HookBase | None]:
        hooks: list[HookBase | None] = list(super().build_hooks())
        cfg, own = self.cfg, self.cfg.MODEL.FPN_EXT
        if cfg.SOLVER.AMP.ENABLED or own.ACCUMULATE > 1:
            parts = self.model, self.data_loader, self.optimizer
            self._trainer = MicroBatchTrainer(*parts, own.ACCUMULATE, amp_dtype(cfg))
        self._losses_on = [
            build_validation_loader(cfg, name)
            for name in (cfg.DATASETS.TEST if own.VALIDATION_LOSS else ())
        ]
        evaluation = _index(hooks, EvalHook)
        self._best = None
        if own.BEST_METRIC:
            self._best = BestCheckpoint(
                cfg.TEST.EVAL_PERIOD,
                self.evaluate,
                lambda **kwargs: self.checkpointer.export(
                    "model_best", self.evaluated_model, **kwargs
                ),
                own.BEST_METRIC,
                own.BEST_MODE,
                own.EARLY_STOP_PATIENCE,
            )
        hooks[evaluation] = self._best or EvalHook(cfg.TEST.EVAL_PERIOD, self.evaluate)
        self._averaged = None
        if own.EMA_DECAY > 0:
            self._averaged = AveragedWeights(self.model, own.EMA_DECAY, self.checkpointer)
            hooks.insert(_index(hooks, PeriodicCheckpointer | EvalHook), self._averaged)
        return hooks

    @property
    def evaluated_model(self) -> nn.Module:
        """The model that is trained; with ``MODEL.FPN_EXT.EMA_DECAY`` that of averaged weights."""
        return self._averaged.model if self._averaged else self.model

    def evaluate(self) -> dict[str, Any]:
        """What ``test`` gives, and with ``MODEL.FPN_EXT.VALIDATION_LOSS`` ``validation_loss``."""
        model = self.evaluated_model
        results = self._last_eval_results = self.test(self.cfg, model)
        if self._losses_on:
            results = {**results, "validation_loss": validation_loss(model, self._losses_on)}
        return results

    def resume_or_load(self, resume: bool = True) -> None:
        """As the parent's.

        Raises:
            ValueError: also, the training was stopped early.
        """
        super().resume_or_load(resume)
        if self._best and self._best.exhausted:
            raise ValueError(
                f"{self.checkpointer.file} was stopped early after {self.start_iter} iterations: "
                f"{self._best}. Raise MODEL.FPN_EXT.EARLY_STOP_PATIENCE, or set it to 0, to go on; "
                "or take --eval-only to evaluate it"
            )

    def before_train(self) -> None:
        super().before_train()
        self._stop_if_exhausted(self.start_iter)

    def after_step(self) -> None:
        super().after_step()
        self._stop_if_exhausted(self.iter + 1)

    def _stop_if_exhausted(self, iterations: int) -> None:
        if not (self._best and self._best.exhausted):
            return
        self.iter = iterations - 1  # what a checkpoint has done last
        self.checkpointer.save("model_final", iteration=self.iter)
        self.iter = self.max_iter = iterations
        raise StopTraining(f"Stopped early after {iterations} iterations: {self._best}")


def _index(hooks: list[HookBase | None], kind: Any) -> int:
    return next(i for i, hook in enumerate(hooks) if isinstance(hook, kind))
