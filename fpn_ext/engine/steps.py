"""One training step: mixed precision, gradient accumulation, several processes.

``SOLVER.AMP.ENABLED`` and ``SOLVER.FPN_EXT.ACCUMULATE`` use MicroBatchTrainer; all other trainings
use Detectron2's SimpleTrainer.
"""

import contextlib
import logging
import time
import weakref
from collections import Counter
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase, SimpleTrainer, create_ddp_model
from detectron2.engine.train_loop import TrainerBase
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..keys import declare, own_keys
from .nonfinite import amp_dtype

declare(
    "SOLVER.FPN_EXT.AMP_DTYPE",
    "float16",
    "What SOLVER.AMP.ENABLED computes in: float16 (GPU only), as Detectron2, or bfloat16.",
    "training",
)
declare(
    "SOLVER.FPN_EXT.ACCUMULATE",
    1,
    "Batches of SOLVER.IMS_PER_BATCH images per iteration: one step with the mean of "
    "their gradients. SOLVER.BASE_LR stays as it is.",
    "training",
)

logger = logging.getLogger(__name__)

MOST_SKIPPED = 30  # steps in a row; from GradScaler's first scale, 2^16, down to 2^-14


def in_all_processes(model: nn.Module) -> nn.Module:
    """The model, wrapped in DistributedDataParallel where there are several processes."""
    on_cpu = next(model.parameters()).device.type == "cpu"
    # By default Detectron2 passes a GPU id even for a model on the CPU.
    device_ids = None if on_cpu else [comm.get_local_rank()]
    return create_ddp_model(model, broadcast_buffers=False, device_ids=device_ids)


def build_step(
    cfg: CfgNode, model: nn.Module, data_loader: Iterable[Any], optimizer: torch.optim.Optimizer
) -> SimpleTrainer:
    """The trainer of one iteration, as configured by ``SOLVER.AMP`` and ``ACCUMULATE``.

    Args:
        cfg: ``SOLVER.AMP.ENABLED``, ``SOLVER.FPN_EXT.AMP_DTYPE`` and ``ACCUMULATE`` are read.
        model, data_loader, optimizer: as in :class:`MicroBatchTrainer`; the model may be wrapped
            in DistributedDataParallel, and is set to training mode.

    Raises:
        ValueError: ``SOLVER.FPN_EXT.EPOCHS`` has not been made ``SOLVER.MAX_ITER``.
    """
    if epochs := own_keys(cfg, "SOLVER").EPOCHS:
        raise ValueError(
            f"SOLVER.FPN_EXT.EPOCHS {epochs} has not been made SOLVER.MAX_ITER: take the config "
            "from fpn_ext.prepare(..., training=True)"
        )
    batches, dtype = own_keys(cfg, "SOLVER").ACCUMULATE, amp_dtype(cfg)
    if batches == 1 and dtype is None:
        return SimpleTrainer(model, data_loader, optimizer)
    return MicroBatchTrainer(model, data_loader, optimizer, batches, dtype)


class AfterBackward(HookBase):
    """Passes the inner step's ``after_backward`` on to the hooks of the outer trainer.

    Registered with the step. Detectron2's DefaultTrainer, made of the same two parts, does not do
    so. On v0.6 a SimpleTrainer never calls ``after_backward``; a MicroBatchTrainer does.

    Args:
        trainer: whose hooks are told, each that has an ``after_backward``.
    """

    def __init__(self, trainer: TrainerBase):
        self._of_all = weakref.proxy(trainer)

    def after_backward(self) -> None:
        _tell_after_backward(self._of_all._hooks)


def _tell_after_backward(hooks: Iterable[HookBase]) -> None:
    for hook in hooks:
        if hasattr(hook, "after_backward"):
            hook.after_backward()


class MicroBatchTrainer(SimpleTrainer):
    """Detectron2's SimpleTrainer and AMPTrainer, on any device, with gradient accumulation.

    A step runs, for each of ``batches`` batches, the forward pass under autocast and the backward
    pass of the losses divided by ``batches``; then the hooks' ``after_backward``, if they have one,
    and the optimizer step. So gradients and logged losses are means over the batches. Under
    DistributedDataParallel, gradients are synchronized once, in the last backward pass.

    Only float16 needs loss scaling: if the scaled gradients are infinite or NaN, PyTorch's
    GradScaler skips the step and halves the scale. This is not an error; it is logged, and counted
    in the metric ``skipped_steps`` beside ``loss_scale``.

    Args:
        model: returns a dict of losses, or a single loss.
        data_loader: an endless iterable of batches.
        optimizer: of the model's parameters.
        batches: per step, at least 1.
        dtype: for autocast: float16, bfloat16; None for float32 throughout.
        scaler: for the losses; by default a GradScaler for float16.

    Raises:
        FloatingPointError: from ``run_step``: a loss is infinite or NaN, or the gradients were in
            ``MOST_SKIPPED`` consecutive steps, which no scale can fix.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable[Any],
        optimizer: torch.optim.Optimizer,
        batches: int = 1,
        dtype: torch.dtype | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ):
        super().__init__(model, data_loader, optimizer)
        self.batches = batches
        self.dtype = dtype
        self.device = next(model.parameters()).device.type
        if scaler is None:
            scaler = torch.amp.GradScaler(self.device, enabled=dtype == torch.float16)
        self.scaler = scaler
        self.num_skipped = 0
        self._skipped_in_a_row = 0

    def run_step(self) -> None:
        assert self.model.training, "the model was changed to eval mode"
        self.optimizer.zero_grad()
        means: Counter[str] = Counter()
        data_time = 0.0
        for number in range(self.batches):
            start = time.perf_counter()
            batch = next(self._data_loader_iter)
            data_time += time.perf_counter() - start
            with self._exchange(last=number == self.batches - 1):
                losses = self._backward(batch)
            for name, loss in losses.items():
                means[name] += loss.detach() / self.batches  # type: ignore[assignment]
        self.after_backward()
        self._write_metrics(means, data_time)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.is_enabled():
            self._note_scale(scale)

    def after_backward(self) -> None:
        """Between the last backward pass of a step and the optimizer: the hooks that ask for it.

        Detectron2 main's trainers call their hooks' ``after_backward`` there; v0.6 knows none.
        """
        _tell_after_backward(self._hooks)

    def _exchange(self, last: bool) -> AbstractContextManager[Any]:
        if last or not isinstance(self.model, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.model.no_sync()

    def _backward(self, batch: Any) -> dict[str, torch.Tensor]:
        """Accumulate the batch's gradients; return its losses."""
        with _autocast(self.device, self.dtype):
            losses = self.model(batch)
            if isinstance(losses, torch.Tensor):
                losses = {"total_loss": losses}
            total = sum(losses.values())
        # Checked per batch, not on the mean: the guard must rerun this very batch.
        if not total.isfinite():
            values = {name: loss.item() for name, loss in losses.items()}
            raise FloatingPointError(f"a loss became infinite or NaN: {values}")
        self.scaler.scale(total / self.batches).backward()
        return losses

    def _note_scale(self, before: float) -> None:
        scale = self.scaler.get_scale()
        if scale < before:
            self.num_skipped += 1
            self._skipped_in_a_row += 1
            logger.info(
                "gradients overflowed in float16: this step is skipped (%d so far), the losses' "
                "scale is now %g",
                self.num_skipped,
                scale,
            )
        else:
            self._skipped_in_a_row = 0
        if self._skipped_in_a_row >= MOST_SKIPPED:
            raise FloatingPointError(
                f"gradients were infinite or NaN in {MOST_SKIPPED} steps on end, down to a loss "
                f"scale of {scale:g}"
            )
        values = {"loss_scale": scale, "skipped_steps": self.num_skipped}
        get_event_storage().put_scalars(**values, smoothing_hint=False)

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if self.scaler.is_enabled():
            state["grad_scaler"] = self.scaler.state_dict()  # Detectron2's name
            state["skipped_steps"] = [self.num_skipped, self._skipped_in_a_row]
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if not self.scaler.is_enabled():
            return
        if "grad_scaler" not in state:
            logger.warning(
                "the checkpoint was not trained in float16: the losses' scale begins at %g",
                self.scaler.get_scale(),
            )
            return
        self.scaler.load_state_dict(state["grad_scaler"])
        self.num_skipped, self._skipped_in_a_row = state.get("skipped_steps", [0, 0])


def _autocast(device: str, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    return contextlib.nullcontext() if dtype is None else torch.autocast(device, dtype)
