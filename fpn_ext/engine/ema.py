"""Exponential moving average (EMA) of the weights: ``SOLVER.FPN_EXT.EMA_DECAY``."""

import logging

from detectron2.engine import HookBase
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..files.checkpoint import SafeCheckpointer
from ..keys import declare
from ..unwrap import unwrapped

declare(
    "SOLVER.FPN_EXT.EMA_DECAY",
    0.0,
    "Keep an exponential moving average of the weights, e.g. 0.999 of it per iteration; "
    "evaluations during training are of the average. 0 for none.",
    "training",
)

logger = logging.getLogger(__name__)


class AveragedWeights(HookBase):
    """After every iteration: average = ``decay`` * average + (1 - ``decay``) * weights.

    The average starts from the initial weights. Buffers, such as running statistics of batch norm,
    are copied. It is saved in every checkpoint under ``ema``, and at the end of training in
    ``model_final_ema.pth``, usable as ``MODEL.WEIGHTS``. Training itself is not affected. Register
    it before the hook that writes checkpoints.

    Args:
        model: the model to train, before its weights are loaded.
        decay: in [0, 1).
        checkpointer: the trainer's.

    Attributes:
        model: a copy of the model, with the averaged weights once training has started.
    """

    def __init__(self, model: nn.Module, decay: float, checkpointer: SafeCheckpointer):
        self._averaged = AveragedModel(
            unwrapped(model), multi_avg_fn=get_ema_multi_avg_fn(decay)
        ).requires_grad_(False)
        self._checkpointer = checkpointer
        checkpointer.add_checkpointable("ema", self._averaged)

    @property
    def model(self) -> nn.Module:
        return self._averaged.module

    def before_train(self) -> None:
        if self._averaged.n_averaged == 0:
            logger.info("the average of the weights (SOLVER.FPN_EXT.EMA_DECAY) begins with these")
            self.after_step()  # the first call copies

    def after_step(self) -> None:
        self._averaged.update_parameters(unwrapped(self.trainer.model))

    def after_train(self) -> None:
        if self.trainer.iter >= self.trainer.max_iter:
            self._checkpointer.export("model_final_ema", self.model)
