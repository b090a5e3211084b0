"""Diagnose NaN or infinity in training: the first module, tensor, image and level, and the cause.

:class:`NonFiniteGuard` is a hook for Detectron2's trainers. It checks the gradients once per step.
If any is not finite, it saves the batch and the weights, reruns the batch checking every module,
and ends the training with a report.
"""

import math
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import nn

from ..keys import own_keys
from ..unwrap import unwrapped
from .first_nonfinite import Diagnosis, diagnose, first_line
from .nonfinite_causes import causes_in_config, causes_in_diagnosis, causes_in_losses
from .nonfinite_inputs import image_name
from .saved_batches import Batch, save

# Seconds that a process with a good batch waits before it ends: a launcher reports the first to end
# and stops the others, while the one with the bad batch is still rerunning its images.
OTHERS_FIRST = 30.0
_NOT_AGAIN = "not found by running this process's batch again"


class NonFiniteGuard(HookBase):
    """Ends training on NaN or infinity, reporting what, where and why; register it last.

    Detectron2's trainers check losses themselves (FloatingPointError); this also checks gradients,
    before the optimizer's step can corrupt the weights. It writes to
    ``OUTPUT_DIR/nonfinite/iteration_N``: ``batch.pth`` (for
    :func:`fpn_ext.engine.saved_batches.load_batch`), ``model.pth`` (the weights before the batch,
    BatchNorm's running statistics after it) and ``report.json``.

    Raises:
        FloatingPointError: from the training loop, with the report.
    """

    def __init__(self, cfg: CfgNode):
        self.cfg = cfg
        self._handles: list[Any] = []
        self._batch: Batch = []
        self._random_state: list[torch.Tensor] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> "NonFiniteGuard":
        # Copies of the model, made for inference, share this hook: do not copy the trainer.
        return self

    def before_train(self) -> None:
        model = unwrapped(self.trainer.model)
        self._handles = [
            model.register_forward_pre_hook(self._keep_batch),
            self.trainer.optimizer.register_step_pre_hook(check_gradients),
        ]

    def _keep_batch(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        if model.training and torch.is_grad_enabled():
            self._batch = args[0]
            self._random_state = random_state()

    def after_train(self) -> None:
        # Detectron2 calls this in a `finally`, while the error propagates.
        for handle in self._handles:
            handle.remove()
        error = sys.exc_info()[1]
        # NaN trips some of Detectron2's asserts, which have no message: examine any assertion.
        suspicious = isinstance(error, AssertionError) or says_non_finite(error)
        if error is None or not suspicious or not self._batch:
            return
        model = unwrapped(self.trainer.model)
        weights = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
        with random_numbers(self._random_state):
            found = diagnose(model, self._batch, amp_dtype(self.cfg))
        if found.first is None and not isinstance(error, FloatingPointError):
            return
        report = self._report(error, found, weights)
        if found.first is None and comm.get_world_size() > 1:
            time.sleep(OTHERS_FIRST)
        raise FloatingPointError(report) from error

    def _report(
        self, error: BaseException, found: Diagnosis, weights: dict[str, torch.Tensor]
    ) -> str:
        """Log the report, and write it beside the batch and the weights."""
        cfg, iteration = self.cfg, self.trainer.iter
        causes = list(causes_in_diagnosis(found))
        if not (found.first and found.first.is_input):
            causes += causes_in_config(cfg, self.trainer.optimizer, iteration)
            causes += causes_in_losses(self.trainer.storage)
        rank = f"_rank_{comm.get_rank()}" if comm.get_world_size() > 1 else ""
        folder = Path(cfg.OUTPUT_DIR, "nonfinite", f"iteration_{iteration}{rank}")
        content = {
            "iteration": iteration,
            "error": first_line(error),
            **asdict(found),
            "likely_causes": causes,
            "batch": [image_name(record, i) for i, record in enumerate(self._batch)],
        }
        try:
            save(folder, self._batch, weights, content)
            saved = f"saved: {folder}/batch.pth, model.pth, report.json"
        except (OSError, RuntimeError) as failure:  # a full disk is PyTorch's RuntimeError
            saved = f"not saved: {failure}"
        return "\n".join(
            [
                f"training met NaN or infinity in iteration {iteration}: {first_line(error)}",
                f"first: {found.first or _NOT_AGAIN}",
                f"images that go wrong alone: {_listed(found.images) or 'none'}",
                "likely causes:",
                *(f"  - {cause}" for cause in causes or ["none that can be seen from here"]),
                saved,
            ]
        )


def check_gradients(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Check, before an optimizer step, that all its gradients are finite.

    Raises:
        FloatingPointError: one is NaN or infinite.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = [p.grad for p in parameters if p.grad is not None]
    # The max absolute value preserves NaN and infinity and cannot overflow.
    largest = torch._foreach_norm(gradients, math.inf) if gradients else ()
    if largest and not torch.stack([n.float() for n in largest]).isfinite().all():
        raise FloatingPointError("a gradient became infinite or NaN")


def says_non_finite(error: BaseException | None) -> bool:
    """Whether an error of a training step reports NaN or infinity.

    Detectron2's trainers and RPN raise FloatingPointError, its Boxes an AssertionError, PyTorch's
    sampling a RuntimeError.

    >>> says_non_finite(AssertionError("Box tensor contains infinite or NaN!"))
    True
    >>> says_non_finite(RuntimeError("CUDA out of memory"))
    False
    """
    if isinstance(error, AssertionError | RuntimeError):
        return bool(re.search(r"\bnan\b", str(error), re.I))
    return isinstance(error, FloatingPointError)


def amp_dtype(cfg: CfgNode) -> torch.dtype | None:
    """The autocast dtype set by ``SOLVER.AMP``; None for float32."""
    return getattr(torch, own_keys(cfg, "SOLVER").AMP_DTYPE) if cfg.SOLVER.AMP.ENABLED else None


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def random_state() -> list[torch.Tensor]:
    """The RNG states of the CPU and, if in use, the current GPU."""
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if cuda else [])]


class random_numbers:
    """Replays the random numbers of the failed step, then restores the RNG state."""

    def __init__(self, state: list[torch.Tensor]):
        self.state = state

    def __enter__(self) -> None:
        self.before = random_state()
        _set_random_state(self.state)

    def __exit__(self, *_: object) -> None:
        _set_random_state(self.before)


def _set_random_state(state: list[torch.Tensor]) -> None:
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state(state[1])
