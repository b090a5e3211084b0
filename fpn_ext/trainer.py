"""Detectron2's DefaultTrainer, made to be killed at any moment and gone on with."""

import logging
import weakref
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.engine.train_loop import TrainerBase
from detectron2.solver import LRMultiplier

from .checkpoint import SafeCheckpointer
from .config import flat
from .repeatable import RepeatableTrainLoader, SeededIterations

logger = logging.getLogger(__name__)


class ResumableTrainer(DefaultTrainer):
    """A training that ends with the same bits whether or not it was killed on its way.

    That holds where the arithmetic gives the same bits every time: on one machine, on a CPU with
    the same number of threads. ``MODEL.FPN_EXT.DETERMINISTIC`` asks PyTorch for it on a GPU.
    ``TEST.PRECISE_BN`` is outside: Detectron2's hook reads images in an order of its own.

    Three ways to begin, each of which says in the log what it took: ``resume_or_load`` takes
    everything, or weights alone; :meth:`extend` takes weights and the optimizer's state.
    """

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> RepeatableTrainLoader:
        return RepeatableTrainLoader(cfg)

    def build_hooks(self) -> list[HookBase]:
        # Here, because DefaultTrainer makes its own checkpointer just before it asks for the hooks.
        self.checkpointer = SafeCheckpointer(
            self.model, self.cfg.OUTPUT_DIR, trainer=weakref.proxy(self)
        )
        self._restored: dict[str, Any] = {}
        seeded = SeededIterations(self.data_loader, self.cfg.MODEL.FPN_EXT.ACCUMULATE)
        return [seeded, *super().build_hooks()]

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        state["_trainer"] = self._trainer.state_dict()  # v0.6 leaves it out, and the optimizer
        state["schedule"] = self._schedule()
        state["config"] = self._told_apart_by()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        TrainerBase.load_state_dict(self, state)
        self._restored = state
        if "_trainer" in state:
            _check_fits(state["_trainer"]["optimizer"], self.optimizer)
            self._trainer.load_state_dict(state["_trainer"])
        else:
            logger.warning(
                "The checkpoint holds no state of the optimizer, as those of Detectron2 v0.6: "
                "momentum begins at zero"
            )

    def resume_or_load(self, resume: bool = True) -> None:
        """Begin with everything of OUTPUT_DIR's last checkpoint; else with MODEL.WEIGHTS' weights.

        With ``resume`` and a folder that never held a checkpoint: as without.

        Raises:
            ValueError: nothing is left to train, or the checkpoint holds weights alone, or another
                model's; or what :meth:`fpn_ext.checkpoint.SafeCheckpointer.resume_or_load` raises.
        """
        configured = list(self.scheduler.base_lrs)
        super().resume_or_load(resume)
        if not (resume and self.checkpointer.has_checkpoint()):
            weights = self.cfg.MODEL.WEIGHTS
            self._say(f"Begun with the weights of {weights}" if weights else "Begun from scratch")
            return
        file = self.checkpointer.file
        if not self._restored:
            raise ValueError(
                f"{file} holds weights alone, so --resume cannot go on from it: start without "
                f"--resume, with MODEL.WEIGHTS {file}"
            )
        if self.start_iter >= self.max_iter:
            raise ValueError(
                f"{file} has done {self.start_iter} of SOLVER.MAX_ITER {self.max_iter} iterations: "
                "nothing is left. Raise SOLVER.MAX_ITER to go on, take --extend for a new schedule "
                "from its weights, or --eval-only to evaluate it"
            )
        if self.scheduler.base_lrs != configured:
            logger.warning(
                "SOLVER: base learning rates %s of the checkpoint go on, not %s of the config; "
                "--extend begins a new schedule",
                sorted(set(self.scheduler.base_lrs)),
                sorted(set(configured)),
            )
        if isinstance(self.scheduler, LRMultiplier):  # SOLVER.STEPS or MAX_ITER may have changed
            rates = self.scheduler.get_lr()
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
        before = self._restored.get("config", {})
        for key, value in self._told_apart_by().items():
            if before.get(key, value) != value:
                logger.warning("%s was %s in %s; it is now %s", key, before[key], file, value)
        self._say(f"Resumed {file}: weights, optimizer, learning rate, order of images")

    def extend(self) -> None:
        """Begin a new schedule with the weights and the optimizer's state of MODEL.WEIGHTS.

        The iteration is 0; learning rate, steps, weight decay and momentum's factor are those of
        the config.

        Raises:
            ValueError: MODEL.WEIGHTS holds no state of an optimizer, or that of another model.
        """
        file = self.cfg.MODEL.WEIGHTS
        state = self.checkpointer.load(file, checkpointables=[]).get("trainer", {})
        if "_trainer" not in state:
            raise ValueError(
                f"--extend: {file} holds no state of an optimizer; leave --extend out to begin "
                "with its weights alone"
            )
        saved = state["_trainer"]["optimizer"]
        _check_fits(saved, self.optimizer)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
        self._restored = state
        self._say(f"Extended {file}: its weights and optimizer, a new schedule")

    def _schedule(self) -> dict[str, Any]:
        solver = self.cfg.SOLVER
        return {key: solver[key] for key in ("BASE_LR", "STEPS", "MAX_ITER")}

    def _told_apart_by(self) -> dict[str, str]:
        """Each key of the config with its value; without the schedule, and what changes no bit."""
        aside = {f"SOLVER.{key}" for key in self._schedule()}
        aside |= {"OUTPUT_DIR", "MODEL.WEIGHTS", "DATALOADER.NUM_WORKERS"}
        return {key: str(value) for key, value in flat(self.cfg).items() if key not in aside}

    def _say(self, what: str) -> None:
        old = self._restored.get("schedule", {})
        schedule = [
            f"{key} {value}" + (f" (was {old[key]})" if old.get(key, value) != value else "")
            for key, value in self._schedule().items()
        ]
        done = f" after {self._restored['iteration'] + 1} iterations" if self._restored else ""
        logger.info(
            "%s%s. Next: iteration %d, learning rate %g; %s",
            what,
            done,
            self.start_iter,
            self.optimizer.param_groups[0]["lr"],
            ", ".join(schedule),
        )


def _check_fits(saved: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer's state that was made for other parameters."""
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    saved_sizes = [len(group["params"]) for group in saved["param_groups"]]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    others = [
        f"{tuple(value.shape)} for {tuple(parameters[number].shape)}"
        for number, values in saved["state"].items()
        for value in values.values()
        if sizes == saved_sizes
        and isinstance(value, torch.Tensor)
        and value.dim()
        and value.shape != parameters[number].shape
    ]
    if sizes != saved_sizes or others:
        raise ValueError(
            "the checkpoint's optimizer was made for another model or other SOLVER keys "
            f"(parameters per group {saved_sizes}, now {sizes}; shapes {others[:3]}): use the keys "
            "it was written with, or begin with its weights alone, without --resume or --extend"
        )
