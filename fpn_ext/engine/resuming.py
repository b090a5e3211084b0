"""Resuming from a checkpoint: what is restored, refused and logged.

A checkpoint holds ``model``, ``trainer`` (iteration, hooks, optimizer, loss scale) and, with
``SOLVER.FPN_EXT.EMA_DECAY``, ``ema``; the data order follows from SEED and the iteration.
Refused here: a finished training, weights only, another model's optimizer; in
:mod:`fpn_ext.engine.trainer` one that was stopped early; in :mod:`fpn_ext.files.checkpoint` files
that are damaged or match no tensor of the model.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.solver import LRMultiplier

from ..config.defaults import flat

logger = logging.getLogger(__name__)

State = Mapping[str, Any]

_SCHEDULE = ("BASE_LR", "STEPS", "MAX_ITER")  # of SOLVER
_WITHOUT_EFFECT = {"OUTPUT_DIR", "MODEL.WEIGHTS", "DATALOADER.NUM_WORKERS"}


def schedule_of(cfg: CfgNode) -> dict[str, Any]:
    """The ``SOLVER`` keys that may change on resume; changes are logged.

    >>> from fpn_ext import get_cfg
    >>> schedule_of(get_cfg())
    {'BASE_LR': 0.001, 'STEPS': (30000,), 'MAX_ITER': 40000}
    """
    return {key: cfg.SOLVER[key] for key in _SCHEDULE}


def compared_keys(cfg: CfgNode) -> dict[str, str]:
    """Config keys and values as text, except the schedule and keys that do not affect results.

    >>> from fpn_ext import get_cfg
    >>> keys = compared_keys(get_cfg())
    >>> keys["SOLVER.MOMENTUM"], "SOLVER.MAX_ITER" in keys, "OUTPUT_DIR" in keys
    ('0.9', False, False)
    """
    left_out = {f"SOLVER.{key}" for key in _SCHEDULE} | _WITHOUT_EFFECT
    return {key: str(value) for key, value in flat(cfg).items() if key not in left_out}


def check_can_resume(file: str, restored: State, done: int, max_iter: int, finished: bool) -> None:
    """Raise unless a checkpoint can be resumed from and something remains to be done.

    Args:
        file: the checkpoint's name, for the message.
        restored: its trainer state; empty if it holds only weights.
        done: completed iterations.
        max_iter: ``SOLVER.MAX_ITER``.
        finished: what follows the iterations is done too (:mod:`fpn_ext.engine.finished`).

    Raises:
        ValueError: it holds only weights, or nothing remains.
    """
    if not restored:
        raise ValueError(
            f"{file} holds weights alone, so --resume cannot go on from it: start without "
            f"--resume, with MODEL.WEIGHTS {file}"
        )
    if done > max_iter or (done == max_iter and finished):
        raise ValueError(
            f"{file} has done {done} of SOLVER.MAX_ITER {max_iter} iterations: "
            "nothing is left. Raise SOLVER.MAX_ITER to go on, take --extend for a new schedule "
            "from its weights, or evaluate it with fpn-ext eval --resume"
        )


def check_optimizer(saved: State, optimizer: torch.optim.Optimizer) -> None:
    """Raise unless a saved optimizer state matches this optimizer's parameters.

    Args:
        saved: an optimizer's ``state_dict()``.

    Raises:
        ValueError: a group's number of parameters differs, or parameter shapes do.
    """
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    saved_sizes = [len(group["params"]) for group in saved["param_groups"]]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    other_shapes = [
        f"{tuple(value.shape)} for {tuple(parameters[number].shape)}"
        for number, values in saved["state"].items()
        for value in values.values()
        if sizes == saved_sizes
        and isinstance(value, torch.Tensor)
        and value.dim()
        and value.shape != parameters[number].shape
    ]
    if sizes != saved_sizes or other_shapes:
        raise ValueError(
            "the checkpoint's optimizer was made for another model or other SOLVER keys "
            f"(parameters per group {saved_sizes}, now {sizes}; shapes {other_shapes[:3]}): use "
            "the keys it was written with, or begin with its weights alone, without --resume or "
            "--extend"
        )


def take_moments(saved: State, optimizer: torch.optim.Optimizer) -> None:
    """Load a saved optimizer's moments; keep the current learning rates, decay and momentum.

    Raises:
        ValueError: as :func:`check_optimizer`.
    """
    check_optimizer(saved, optimizer)
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})


def follow_schedule(scheduler: Any, optimizer: torch.optim.Optimizer) -> None:
    """Set the learning rates of Detectron2's schedule at its current iteration.

    The optimizer's state holds those of the saved schedule; ``SOLVER.STEPS`` or
    ``SOLVER.MAX_ITER`` may have changed since.
    """
    if isinstance(scheduler, LRMultiplier):
        for group, rate in zip(optimizer.param_groups, scheduler.get_lr(), strict=True):
            group["lr"] = rate


def warn_of_changes(
    file: str, restored: State, cfg: CfgNode, rates: Sequence[float], configured: Sequence[float]
) -> None:
    """Log the config keys that differ from those the checkpoint was written with.

    Args:
        file: the checkpoint's name, for the message.
        restored: its trainer state.
        rates: base learning rates in use, per parameter group.
        configured: those in the config.
    """
    if list(rates) != list(configured):
        logger.warning(
            "SOLVER: base learning rates %s of the checkpoint go on, not %s of the config; "
            "--extend begins a new schedule",
            sorted(set(rates)),
            sorted(set(configured)),
        )
    old = restored.get("schedule", {})
    for key, now in schedule_of(cfg).items():
        if key != "BASE_LR" and old.get(key, now) != now:  # of the rate, see above
            logger.warning(
                "SOLVER.%s was %s in %s; it is now %s, as this command's config and overrides say: "
                "--resume takes none from the checkpoint",
                key,
                old[key],
                file,
                now,
            )
    before = restored.get("config", {})
    for key, value in compared_keys(cfg).items():
        if before.get(key, value) != value:
            logger.warning("%s was %s in %s; it is now %s", key, before[key], file, value)


def say_begun(
    what: str, cfg: CfgNode, next_iteration: int, rate: float, restored: State | None = None
) -> None:
    """Log what a training starts from, its first iteration and its schedule.

    Args:
        what: what was loaded, and from where.
        next_iteration: the first iteration of this run.
        rate: the learning rate of the first parameter group.
        restored: the checkpoint's trainer state, if any.
    """
    restored = restored or {}
    old = restored.get("schedule", {})
    schedule = [
        f"{key} {value}" + (f" (was {old[key]})" if old.get(key, value) != value else "")
        for key, value in schedule_of(cfg).items()
    ]
    done = f" after {restored['iteration'] + 1} iterations" if restored else ""
    logger.info(
        "%s%s. Next: iteration %d, learning rate %g; %s",
        what,
        done,
        next_iteration,
        rate,
        ", ".join(schedule),
    )
